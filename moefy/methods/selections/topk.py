"""Static top-k: the same number of experts for every token.

Shapes: T tokens, E routed experts, K experts that run.
"""

import torch
from torch import Tensor

from moefy.methods.base import Context, Selection
from moefy.models.schema import Field, whole


class TopK(Selection):
    """The `k` experts of highest score."""

    def __init__(self, k: int) -> None:
        self.k = k

    @classmethod
    def declared(cls, experts: int) -> dict[str, Field]:
        """What its settings may be."""
        return {"k": whole(0, experts)}

    @classmethod
    def fit(cls, scores_TE: Tensor, active: float, most: int | None = None) -> "TopK":
        """`active` rounded is `k`; the scores are not looked at."""
        return cls(round(active) if most is None else min(round(active), most))

    def __call__(self, scores_TE: Tensor, context: Context | None = None) -> Tensor:
        """The mask `[T, E]` with exactly `k` experts a token."""
        return top_mask(scores_TE, self.k)


def top_mask(scores_TE: Tensor, k: int) -> Tensor:
    """Mask `[T, E]` of the `k` highest scores of each token."""
    ids_TK = scores_TE.topk(k, dim=-1).indices
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(-1, ids_TK, True)


def capped(mask_TE: Tensor, scores_TE: Tensor, most: int | None) -> Tensor:
    """The mask with at most the `most` highest scores of each token on."""
    if most is None or most >= mask_TE.shape[1]:
        return mask_TE
    return mask_TE & top_mask(scores_TE, most)
