"""What a router is fitted to predict of every expert, as a number per token, and how its scores are held against it.

Shapes: T tokens, B tokens of a batch, D width, N neurons, E routed experts, F neurons per expert.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from moefy.methods.routers.baselines import expert_norms
from moefy.methods.selections import top_mask
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


ALWAYS_ACTIVE = 0.9

Loss = Callable[[Tensor, Tensor, int], Tensor]
"""`(scores_BE, target_BE, k) -> loss`, the target as `moefy.methods.targets` has it."""


def weighted_topk(scores_BE: Tensor, target_BE: Tensor, k: int) -> Tensor:
    """Cross-entropy on the best `k`, every expert weighing as its squared target does (ours)."""
    weight_BE = target_BE.square()
    weight_BE = weight_BE / weight_BE.mean(1, keepdim=True).clamp_min(1e-30)
    return binary_cross_entropy_with_logits(
        scores_BE, top_mask(target_BE, k).to(scores_BE.dtype), weight=weight_BE
    )


def share_of_largest(scores_BE: Tensor, target_BE: Tensor, k: int) -> Tensor:
    """Cross-entropy with the target over the batch's largest as a probability (MoEfication)."""
    return binary_cross_entropy_with_logits(scores_BE, target_BE / target_BE.max().clamp_min(1e-30))


def norm_mse(scores_BE: Tensor, target_BE: Tensor, k: int) -> Tensor:
    """Mean squared error to the target itself (D2DMoE)."""
    return mse_loss(scores_BE, target_BE)


def any_active(scores_BE: Tensor, target_BE: Tensor, k: int) -> Tensor:
    """Cross-entropy on whether the expert is active at all (Deja Vu).

    Weighed as in its code: 1 for active, the share of active ones plus 0.005 for the others. Where
    activations are hardly ever zero (SiLU, GELU), the token's `k` largest count as active.
    """
    active_BE = target_BE > 0
    if active_BE.float().mean() > ALWAYS_ACTIVE:
        active_BE = top_mask(target_BE, k)
    active_BE = active_BE.to(scores_BE.dtype)
    share = active_BE.mean() + 0.005
    return binary_cross_entropy_with_logits(
        scores_BE, active_BE, weight=active_BE * (1 - share) + share
    )


LOSSES: dict[str, Loss] = {
    "weighted_topk": weighted_topk,
    "share_of_largest": share_of_largest,
    "norm_mse": norm_mse,
    "any_active": any_active,
}
