"""Mean-gate router: each expert's mean gate vector, unfitted (ExpertWeaver, arXiv 2602.15521).

Shapes: T tokens, D width, E routed experts.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from moefy.methods.base import Router
from moefy.models.mlp import DenseMlp


class MeanGateRouter(Router):
    """Scores `x . mean of the expert's gate rows`, the up rows where there is no gate."""

    trainable = False
    mean_ED: Tensor

    def __init__(self, width: int, experts: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean_ED", torch.zeros(experts, width))

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, whole: DenseMlp) -> None:
        """Take the means."""
        self.mean_ED.copy_(mlp.selecting_ND.float().view(len(self.mean_ED), -1, mlp.width).mean(1))

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`."""
        return linear(x_TD.float(), self.mean_ED.float())
