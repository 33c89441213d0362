"""Expert MLPs as functions of plain tensors. Imports torch and triton only, never moefy.

Every operation computes the same function as its PyTorch twin in `reference.py`:

    y[t] = sum over experts e with mask[t, e] of  act(gate_e x[t]) * (up_e x[t])  @ down_e  + bias

Shapes: T tokens, D width, N neurons, E experts, F = N/E neurons per expert.
"""

from moefy_kernels.expert_views import expert_views_mlp
from moefy_kernels.reference import ExpertWeights, masked_mlp

__all__ = ["ExpertWeights", "expert_views_mlp", "masked_mlp"]
