"""What a router is fitted to predict of every expert, as a number per token.

Shapes: T tokens, D width, N neurons, E routed experts, F neurons per expert.
"""

from collections.abc import Callable

from torch import Tensor

from moefy.methods.routers.oracle import expert_norms
from moefy.models.mlp import DenseMlp

Target = Callable[[Tensor, DenseMlp, int], Tensor]
"""`(h_TN, mlp, experts) -> [T, E]`, never negative."""


def contribution(h_TN: Tensor, mlp: DenseMlp, experts: int) -> Tensor:
    """Norm of what the expert adds to the output: the error of leaving it out (ours, D2DMoE)."""
    return expert_norms(h_TN, mlp.down_ND, experts)


def activation(h_TN: Tensor, mlp: DenseMlp, experts: int) -> Tensor:
    """Sum of the sizes of the expert's activations (MoEfication, whose neurons are ReLU)."""
    return h_TN.abs().view(len(h_TN), experts, -1).sum(-1)


def deviation(h_TN: Tensor, mlp: DenseMlp, experts: int, mean_N: Tensor | None = None) -> Tensor:
    """Sum of squared distances of the activations from their mean (G-MoEfication).

    `mean_N` is the mean over the whole sample, where `h_TN` is only a part of it.
    """
    centred_TN = h_TN - (h_TN.mean(0) if mean_N is None else mean_N)
    return centred_TN.square().view(len(h_TN), experts, -1).sum(-1)


TARGETS: dict[str, Target] = {
    "contribution": contribution,
    "activation": activation,
    "deviation": deviation,
}
