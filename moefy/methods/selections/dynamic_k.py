"""Dynamic k: experts whose score comes near to the token's best (D2DMoE, Szatkowski et al. 2024).

Shapes: T tokens, E routed experts.
"""

from torch import Tensor

from moefy.errors import RecipeError
from moefy.methods.base import Context, Selection
from moefy.methods.selections.bisect import bisect
from moefy.methods.selections.topk import capped
from moefy.models.schema import Field, number, optional, whole


class DynamicK(Selection):
    """Expert `e` runs where `s_e >= (1 - tau) max s`; for scores that are never negative."""

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
