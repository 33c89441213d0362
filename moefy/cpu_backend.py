"""The native CPU kernel as a backend: a mask and the weights of a layer in, its output out.

Shapes: T tokens, D width, E experts.
"""

import torch
from torch import Tensor

from moefy.kernel_activations import ACTIVATIONS
from moefy.mlp import DecidedMlp, DenseMlp
from moefy_kernels import ExpertWeights
from moefy_kernels.cpu.experts import native_experts, serves


def fits(x_TD: Tensor, weights: ExpertWeights) -> bool:
    """Whether the native kernel computes this layer for these inputs: fp32 or bf16, no gradients."""
    mlp = weights.mlp if isinstance(weights, DecidedMlp) else weights
    if type(mlp) is not DenseMlp or mlp.activation not in ACTIVATIONS:
        return False
    vectors = (mlp.up_bias_N, mlp.gate_bias_N, mlp.centre_N, mlp.down_bias_D)
    trained = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in vectors)
    return not trained and serves(x_TD, mlp.up_ND, mlp.down_ND, mlp.gate_ND)


def native_backend(x_TD: Tensor, weights: ExpertWeights, mask_TE: Tensor) -> Tensor:
    """Output `[T, D]`, the same function as `reference.masked_mlp`; `ValueError` for what does not fit."""
    active_TN = weights.active_TN if isinstance(weights, DecidedMlp) else None
    mlp = weights.mlp if isinstance(weights, DecidedMlp) else weights
    assert isinstance(mlp, DenseMlp)
    decided = active_TN is not None
    return native_experts(
        x_TD,
        mask_TE,
        mlp.down_ND,
        ACTIVATIONS[mlp.activation],
        None if decided else mlp.selecting_ND,
        None if mlp.gate_ND is None else mlp.up_ND,
        active_TN=active_TN,
        selecting_bias_N=None if decided else mlp.deciding_bias_N,
        up_bias_N=None if mlp.gate_ND is None else mlp.up_bias_N,
        centre_N=mlp.centre_N,
        down_bias_D=mlp.down_bias_D,
    )
