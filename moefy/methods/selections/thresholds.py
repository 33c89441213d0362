"""Selections by a level that scores reach, so that tokens differ in cost, and how the level is found.

Shapes: T tokens, E routed experts.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moefy.errors import RecipeError
from moefy.methods.base import Context, Selection
from moefy.methods.selections.ranked import capped
from moefy.models.schema import Field, number, optional, whole

STEPS = 50
SLACK = 1.0005
"""How far the mean may exceed what is wanted."""


def bisect(mask_of: Callable[[float], Tensor], active: float) -> float:
    """The share in [0, 1] whose mask `[T, E]` has nearest to `active` experts on per token, not more.

    `mask_of` turns on more experts the larger the share. Scores that tie (of ReLU neurons that are off)
    come and go together: they then stay off. Where every share turns on more, the least does.
    """
    low, high = 0.0, 1.0
    if _mean(mask_of(1.0)) <= active * SLACK:
        return 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        if _mean(mask_of(middle)) <= active * SLACK:
            low = middle
        else:
            high = middle
    return low if _mean(mask_of(low)) > 0 else high


def _mean(mask_TE: Tensor) -> float:
    return mask_TE.sum().item() / len(mask_TE)


class Threshold(Selection):
    """Threshold: an expert runs where its score is above a fixed value, so tokens differ in cost.

    Experts with a score above `threshold`: from none of them to `most` for one token.
    """

    varies = True

    def __init__(self, threshold: float, most: int | None = None) -> None:
        self.threshold = threshold
        self.most = most

    @classmethod
    def declared(cls, experts: int) -> dict[str, Field]:
        """What its settings may be."""
        return {"threshold": number(), "most": optional(whole(0))}

    @classmethod
    def fit(cls, scores_TE: Tensor, active: float, most: int | None = None) -> "Threshold":
        """The value with which `active` experts a token run on average over these scores."""
        scores_TE = scores_TE.detach().float().cpu()
        # Below every score, so that all run where all should; a cap leaves some of them no chance.
        lowest = scores_TE.min().item() - 1
        score_N = scores_TE.flatten().clone()
        if most is not None:
            able_TE = torch.ones_like(scores_TE, dtype=torch.bool)
            score_N[~capped(able_TE, scores_TE, most).flatten()] = lowest
        wanted = int(active * SLACK * len(scores_TE))
        if wanted >= len(score_N):
            return cls(lowest, most)
        # Strictly above the next lower score: those that tie with it come and go together. In place:
        # the scores of a sample are the largest thing in memory.
        value_N = score_N.numpy()
        at = len(value_N) - wanted - 1
        value_N.partition(at)
        highest, threshold = float(value_N[at:].max()), float(value_N[at])
        if threshold == highest:
            below_N = value_N[value_N < highest]
            return cls(float(below_N.max()) if len(below_N) else lowest, most)
        return cls(threshold, most)

    def __call__(self, scores_TE: Tensor, context: Context | None = None) -> Tensor:
        """The mask `[T, E]`."""
        return capped(scores_TE > self.threshold, scores_TE, self.most)


class DynamicK(Selection):
    """Dynamic k: experts whose score comes near to the token's best (D2DMoE, Szatkowski et al. 2024).

    Expert `e` runs where `s_e >= (1 - tau) max s`; for scores that are never negative.
    """

    varies = True

    def __init__(self, tau: float, most: int | None = None) -> None:
        self.tau = tau
        self.most = most

    @classmethod
    def declared(cls, experts: int) -> dict[str, Field]:
        """What its settings may be."""
        return {"tau": number(0, 1), "most": optional(whole(0))}

    @classmethod
    def fit(cls, scores_TE: Tensor, active: float, most: int | None = None) -> "DynamicK":
        """The `tau` with which `active` experts a token run on average.

        Raises `RecipeError` for scores below zero, whose sizes mean nothing.
        """
        scores_TE = scores_TE.float()
        if (scores_TE < 0).any():
            raise RecipeError(
                "selection 'dynamic_k' compares sizes of scores that are never negative, and this "
                "router's are; choose router norm_regression, or selection threshold or top_p"
            )
        return cls(bisect(lambda tau: cls(tau, most)(scores_TE), active), most)

    def __call__(self, scores_TE: Tensor, context: Context | None = None) -> Tensor:
        """The mask `[T, E]`; the best expert always runs."""
        scores_TE = scores_TE.float()
        least_T1 = (1 - self.tau) * scores_TE.amax(1, keepdim=True)
        return capped(scores_TE >= least_T1, scores_TE, self.most)


WIDEST = 4.0
"""Spread of the scores beyond which they are scaled down: a softmax of wider ones is 0 or 1."""


class TopP(Selection):
    """Top-p: the fewest experts that hold a share `p` of the token's softmax (nucleus selection).

    The experts of highest probability until their sum reaches `p`; at least one, at 1 all.
    """

    varies = True

    def __init__(self, p: float, most: int | None = None, scale: float = 1.0) -> None:
        self.p = p
        self.most = most
        self.scale = scale

    @classmethod
    def declared(cls, experts: int) -> dict[str, Field]:
        """What its settings may be."""
        return {"p": number(0, 1), "most": optional(whole(0)), "scale": number(0, above=True)}

    @classmethod
    def fit(cls, scores_TE: Tensor, active: float, most: int | None = None) -> "TopP":
        """The `p` with which `active` experts a token run on average."""
        scores_TE = scores_TE.double()
        spread = (scores_TE - scores_TE.mean(1, keepdim=True)).square().mean().sqrt().item()
        scale = min(1.0, WIDEST / spread) if spread else 1.0
        return cls(bisect(lambda p: cls(p, most, scale)(scores_TE), active), most, scale)

    def __call__(self, scores_TE: Tensor, context: Context | None = None) -> Tensor:
        """The mask `[T, E]`."""
        ranked_TE, ids_TE = (scores_TE.double() * self.scale).sort(dim=-1, descending=True)
        p_TE = torch.softmax(ranked_TE, -1)
        before_TE = p_TE.cumsum(-1) - p_TE
        kept_TE = (before_TE < self.p) | (self.p >= 1)
        mask_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(-1, ids_TE, kept_TE)
        return capped(mask_TE, scores_TE, self.most)
