"""Threshold: an expert runs where its score is above a fixed value, so tokens differ in cost.

Shapes: T tokens, E routed experts.
"""

import torch
from torch import Tensor

from moefy.routing.base import Selection


class Threshold(Selection):
    """Experts with a score above `threshold`; the number that runs varies from 0 to E."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    @classmethod
    def fit(cls, scores_TE: Tensor, active: int) -> "Threshold":
        """The value that `active` experts a token exceed on average over these scores."""
        tokens, experts = scores_TE.shape
        if active >= experts:
            return cls(torch.finfo(torch.float32).min)
        ordered = scores_TE.flatten().float().sort(descending=True).values
        return cls(ordered[tokens * active].item())

    def __call__(self, scores_TE: Tensor) -> Tensor:
        """The mask `[T, E]`."""
        return scores_TE > self.threshold
