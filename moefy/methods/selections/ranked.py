"""Selections of the same number of experts for every token.

Shapes: T tokens, E routed experts, K experts that run.
"""

import math

import torch
from torch import Tensor

from moefy.methods.base import Context, Selection
from moefy.models.schema import Field, number, whole


class TopK(Selection):
    """Static top-k: the same number of experts for every token.

    The `k` experts of highest score.
    """

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


_SPREAD = 2.0**-16
"""Spread of a token's scaled scores.

A larger one bends the weights, which moves the inputs of later layers, where experts of like score
then swap places. Other sets than weight-1 routing, of all tokens and layers, in fp32: six random
layers, E = 64, k = 16: 2 % at 2**-10, 1 % at 2**-13, none at 2**-16; E = 256, k = 64: 10 %, 6 %, 1 %;
a trained model of six layers, E = 32, k = 8: 0.9 %, 0.4 %, none. A smaller one loses scores: fp32
tells apart those that differ by about 2**-8 of their spread, as finely as bf16 holds them. On the
trained model sets in bf16 begin to suffer at 2**-17 (other sets than in fp32: 7.6 % from 2**-10 to
2**-14, 8.2 % at 2**-16, 11 % at 2**-17). Cross-entropy is the same at all of these.
"""


class SoftmaxTopK(Selection):
    """Top-k of an almost flat softmax: exactly what a stock top-k-softmax architecture computes.

    A stock mixture of experts weighs its experts by the softmax of the router; with the router scaled
    by a small `eps` the chosen weights are all `1/k` up to `eps`, so that experts cut from a dense MLP
    add up as they should. In fp32 such a softmax has ties, and its top-k is not always that of the
    scores: a model meant for export is therefore fitted and evaluated with this selection itself.

    The `k` experts of highest `softmax(eps * score)` in fp32.
    """

    def __init__(self, k: int, eps: float) -> None:
        self.k = k
        self.eps = eps

    @classmethod
    def declared(cls, experts: int) -> dict[str, Field]:
        """What its settings may be."""
        return {"k": whole(0, experts), "eps": number(0, above=True)}

    @classmethod
    def fit(cls, scores_TE: Tensor, active: float, most: int | None = None) -> "SoftmaxTopK":
        """`k` is `active` rounded; `eps` is a power of two: a token's scores come nearest to `_SPREAD`.

        What all scores of a token have in common changes no softmax and does not count. A power of
        two keeps the scaled router exact in bf16 and fp32.
        """
        scores_TE = scores_TE.float()
        spread = (scores_TE - scores_TE.mean(1, keepdim=True)).square().mean().sqrt().item()
        return cls(round(active), 2.0 ** round(math.log2(_SPREAD / spread)) if spread else _SPREAD)

    def __call__(self, scores_TE: Tensor, context: Context | None = None) -> Tensor:
        """The mask `[T, E]` with exactly `k` experts a token."""
        return top_mask(torch.softmax(scores_TE.float() * self.eps, dim=-1), self.k)
