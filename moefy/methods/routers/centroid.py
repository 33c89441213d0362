"""Centroid router: closeness of the token to the mean direction of each expert's neurons.

MoEfication's similarity selection (Zhang et al. 2022): nothing is fitted.

Shapes: T tokens, D width, N neurons, E routed experts, F neurons per expert.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moefy.methods.base import Router
from moefy.models.mlp import DenseMlp


class CentroidRouter(Router):
    """Scores `-||x/|x| - c_e||` with `c_e` the mean of the expert's normalised input rows."""

    trainable = False
    centroid: Tensor

    def __init__(self, width: int, experts: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("centroid", torch.zeros(experts, width))

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, whole: DenseMlp) -> None:
        """Take the centroids from the gate rows, or the up rows where there is no gate."""
        rows_ND = normalize(mlp.selecting_ND.float(), dim=-1)
        self.centroid.copy_(rows_ND.view(len(self.centroid), -1, mlp.width).mean(1))

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`, between -2 and 0."""
        return -torch.cdist(normalize(x_TD.float(), dim=-1), self.centroid.float())
