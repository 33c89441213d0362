"""Balanced k-means on input weights: neurons that look for the same thing form an expert.

MoEfication (Zhang et al. 2022, "MoEfication: Transformer Feed-forward Layers are Mixtures of
Experts") clusters the L2-normalised rows of the input projection under equal sizes; with a gated
MLP the rows of the gate take their place. Rows longer than 256 are first put on their leading 256
singular directions.

Shapes: T tokens, D model width, N neurons.
"""

from torch import Tensor
from torch.nn.functional import normalize

from moefy.methods.partition.balanced import balanced_kmeans
from moefy.methods.partition.signals import MOST_FEATURES, principal
from moefy.models.mlp import DenseMlp


def kmeans(mlp: DenseMlp, x_TD: Tensor, num_experts: int, seed: int) -> Tensor:
    """Owner `[N]` of each neuron. Reads no tokens."""
    rows_ND = normalize(mlp.up_ND if mlp.gate_ND is None else mlp.gate_ND, dim=1)
    return balanced_kmeans(principal(rows_ND, MOST_FEATURES, seed), num_experts, seed)
