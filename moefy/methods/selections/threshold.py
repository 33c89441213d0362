"""Threshold: an expert runs where its score is above a fixed value, so tokens differ in cost.

Shapes: T tokens, E routed experts.
"""

import torch
from torch import Tensor

from moefy.methods.base import Context, Selection
from moefy.methods.selections.bisect import SLACK
from moefy.methods.selections.topk import capped
from moefy.models.schema import Field, number, optional, whole


class Threshold(Selection):
    """Experts with a score above `threshold`: from none of them to `most` for one token."""

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
