"""Random router: a fixed random projection of the token. A control, not a method.

Shapes: T tokens, D width, E routed experts.
"""

import torch
from torch import Tensor

from moefy.methods.base import Router
from moefy.models.mlp import DenseMlp


class RandomRouter(Router):
    """Scores `R x`, standardised per expert so that every expert runs about as often."""

    trainable = False
    reads_input_alone = True
    weight: Tensor
    mean_E: Tensor

    def __init__(self, width: int, experts: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(experts, width))
        self.register_buffer("mean_E", torch.zeros(experts))

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, whole: DenseMlp) -> None:
        """Centre and scale the projections on `x_TD`."""
        scores_TE = x_TD.float() @ self.weight.T
        std_E = scores_TE.std(0).clamp_min(1e-12)
        self.weight /= std_E[:, None]
        self.mean_E.copy_(scores_TE.mean(0) / std_E)

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`."""
        return x_TD.float() @ self.weight.T - self.mean_E
