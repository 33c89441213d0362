"""Threshold: an expert runs where its score is above a fixed value, so tokens differ in cost.

Shapes: T tokens, E routed experts.
"""

from torch import Tensor

from moefy.routing.base import Context, Selection
from moefy.routing.bisect import bisect
from moefy.routing.topk import capped


class Threshold(Selection):
    """Experts with a score above `threshold`: from none of them to `most` for one token."""

    varies = True

    def __init__(self, threshold: float, most: int | None = None) -> None:
        self.threshold = threshold
        self.most = most

    @classmethod
    def fit(cls, scores_TE: Tensor, active: float, most: int | None = None) -> "Threshold":
        """The value with which `active` experts a token run on average over these scores."""
        scores_TE = scores_TE.float()
        # Below every score, so that all run where all should.
        low = scores_TE.min().item() - 1

        def made(share: float) -> Threshold:
            return cls(low + (scores_TE.max().item() - low) * (1 - share), most)

        return made(bisect(lambda s: made(s)(scores_TE), active))

    def __call__(self, scores_TE: Tensor, context: Context | None = None) -> Tensor:
        """The mask `[T, E]`."""
        return capped(scores_TE > self.threshold, scores_TE, self.most)
