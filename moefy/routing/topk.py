"""Static top-k: the same number of experts for every token.

Shapes: T tokens, E routed experts, K experts that run.
"""

import torch
from torch import Tensor

from moefy.routing.base import Selection


class TopK(Selection):
    """The `k` experts of highest score."""

    def __init__(self, k: int) -> None:
        self.k = k

    @classmethod
    def fit(cls, scores_TE: Tensor, active: int) -> "TopK":
        """`active` is `k`; the scores are not looked at."""
        return cls(active)

    def __call__(self, scores_TE: Tensor) -> Tensor:
        """The mask `[T, E]` with exactly `k` experts a token."""
        ids_TK = scores_TE.topk(self.k, dim=-1).indices
        return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(-1, ids_TK, True)
