"""Top-k of an almost flat softmax: exactly what a stock top-k-softmax architecture computes.

A stock mixture of experts weighs its experts by the softmax of the router; with the router scaled
by a small `eps` the chosen weights are all `1/k` up to `eps`, so that experts cut from a dense MLP
add up as they should. In fp32 such a softmax has ties, and its top-k is not always that of the
scores: a model meant for export is therefore fitted and evaluated with this selection itself.

Shapes: T tokens, E routed experts, K experts that run.
"""

import torch
from torch import Tensor

from moefy.routing.base import Selection


class SoftmaxTopK(Selection):
    """The `k` experts of highest `softmax(eps * score)` in fp32."""

    def __init__(self, k: int, eps: float) -> None:
        self.k = k
        self.eps = eps

    @classmethod
    def fit(cls, scores_TE: Tensor, active: int) -> "SoftmaxTopK":
        """`k = active`; `eps` is the power of two nearest to 1e-3 over the spread of the scores.

        A power of two keeps the scaled router exact in every dtype.
        """
        spread = scores_TE.float().std().clamp_min(1e-12)
        return cls(active, float(torch.exp2(torch.log2(1e-3 / spread).round())))

    def __call__(self, scores_TE: Tensor) -> Tensor:
        """The mask `[T, E]` with exactly `k` experts a token."""
        p_TE = torch.softmax(scores_TE.float() * self.eps, dim=-1)
        ids_TK = p_TE.topk(self.k, dim=-1).indices
        return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(-1, ids_TK, True)
