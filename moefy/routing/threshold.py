"""Threshold: an expert runs where its score is above a fixed value, so tokens differ in cost.

Shapes: T tokens, E routed experts.
"""

import torch
from torch import Tensor

from moefy.routing.base import Context, Selection
from moefy.routing.bisect import SLACK
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
        # Below every score, so that all run where all should; a cap leaves some of them no chance.
        lowest = scores_TE.min().item() - 1
        able_TE = torch.ones_like(scores_TE, dtype=torch.bool)
        score_N = scores_TE.masked_fill(~capped(able_TE, scores_TE, most), lowest).flatten()
        wanted = int(active * SLACK * len(scores_TE))
        if wanted >= len(score_N):
            return cls(lowest, most)
        # Strictly above the next lower score: those that tie with it come and go together.
        highest, threshold = score_N.max(), score_N.kthvalue(len(score_N) - wanted).values
        if threshold == highest:
            below_N = score_N[score_N < highest]
            return cls(below_N.max().item() if len(below_N) else lowest, most)
        return cls(threshold.item(), most)

    def __call__(self, scores_TE: Tensor, context: Context | None = None) -> Tensor:
        """The mask `[T, E]`."""
        return capped(scores_TE > self.threshold, scores_TE, self.most)
