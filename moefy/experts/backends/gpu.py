"""The Triton kernels as backends: a mask and the weights of a layer in, its output out.

Each computes the same function as masked dense. An MLP whose gates a router has computed already runs as
experts of one neuron that are weighed by their gates.

Shapes: T tokens, D width, N neurons, E experts, F neurons per expert.
"""

import torch
from torch import Tensor

from moefy.experts.backends.base import ACTIVATIONS, Request
from moefy.models.mlp import DecidedMlp, DenseMlp
from moefy_kernels import ExpertWeights
from moefy_kernels.decode import decode
from moefy_kernels.expert_mlp import ExpertMlp
from moefy_kernels.grouped import grouped
from moefy_kernels.routing import listed
from moefy_kernels.union import union


def fits(weights: ExpertWeights) -> bool:
    """Whether kernels know all that this layer computes."""
    if isinstance(weights, DecidedMlp):
        return weights.mlp.centre_N is None
    return type(weights) is DenseMlp and weights.activation in ACTIVATIONS


def serves(request: Request) -> str | None:
    """None where kernels compute this."""
    if not fits(request.weights):
        return "no Triton kernel computes such a layer"
    if request.x_TD.dtype != request.mlp.up_ND.dtype:
        return f"its kernels take inputs in {request.mlp.up_ND.dtype}"
    decided, soft = isinstance(request.weights, DecidedMlp), request.mask_TE.dtype != torch.bool
    if request.learns and (decided or soft):
        # A mask that carries a gradient asks for the outputs of experts that are off.
        return "it has no gradient for gates or masks that have one"
    return None


def decode_experts(x_TD: Tensor, weights: ExpertWeights, mask_TE: Tensor) -> Tensor:
    """A few tokens, every expert read by each token that runs it."""
    mlp, weight_TE = _arguments(x_TD, weights, mask_TE)
    expert_TK, count_T = listed(weight_TE)
    weight_TK = None
    if isinstance(weights, DecidedMlp):
        weight_TK = weight_TE.gather(1, expert_TK.long().clamp(max=mlp.experts - 1))
    return decode(x_TD, mlp, expert_TK, weight_TK, count_T, weights.down_bias_D)


def union_experts(x_TD: Tensor, weights: ExpertWeights, mask_TE: Tensor) -> Tensor:
    """A small batch, every expert read once."""
    return union(x_TD, *_arguments(x_TD, weights, mask_TE), weights.down_bias_D)


def grouped_experts(x_TD: Tensor, weights: ExpertWeights, mask_TE: Tensor) -> Tensor:
    """Many tokens, sorted by expert; the only one of the three with gradients."""
    return grouped(x_TD, *_arguments(x_TD, weights, mask_TE), weights.down_bias_D)


def _arguments(x_TD: Tensor, weights: ExpertWeights, mask_TE: Tensor) -> tuple[ExpertMlp, Tensor]:
    """The weights as experts, and what each of them counts for every token."""
    experts = mask_TE.shape[1]
    if isinstance(weights, DecidedMlp):
        mlp = weights.mlp
        mask_TN = mask_TE.repeat_interleave(mlp.neurons // experts, 1)
        weight_TN = weights.active_TN * mask_TN
        if mlp.gate_ND is None:  # nothing is left to compute: every neuron is what its gate says
            ones_N = mlp.up_ND.new_ones(mlp.neurons)
            zeros_ND = mlp.up_ND.new_zeros(1, 1).expand(mlp.up_ND.shape)
            return ExpertMlp.of(
                mlp.neurons, "linear", zeros_ND, mlp.down_ND, up_bias_N=ones_N
            ), weight_TN
        return ExpertMlp.of(
            mlp.neurons, "linear", mlp.up_ND, mlp.down_ND, up_bias_N=mlp.up_bias_N
        ), weight_TN
    assert isinstance(weights, DenseMlp)
    return ExpertMlp.of(
        experts, ACTIVATIONS[weights.activation], weights.up_ND, weights.down_ND,
        weights.gate_ND, weights.up_bias_N, weights.gate_bias_N, weights.centre_N,
    ), mask_TE  # fmt: skip
