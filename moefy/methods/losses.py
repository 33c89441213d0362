"""How the scores of a router are held against its target.

Shapes: B tokens of a batch, E routed experts.
"""

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss

from moefy.methods.selections.topk import top_mask

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
