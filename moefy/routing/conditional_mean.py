"""Conditional mean: an expert that is off adds its mean output *over tokens on which it is off*.

The unconditional mean (G-MoEfication) is dominated by the tokens on which the expert runs and makes
the output worse than adding nothing; the mean given that it is off is the best constant there is.

Shapes: T tokens, D width, N neurons, E routed experts, F neurons per expert.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from moefy.mlp import DenseMlp
from moefy.routing.base import Compensation


class ConditionalMean(Compensation):
    """Adds `sum over e off of m_e`, exactly zero where every expert runs."""

    mean_ED: Tensor

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.register_buffer("mean_ED", torch.zeros(experts, width))

    def fit(self, chunks: Iterable[tuple[Tensor, Tensor]], mlp: DenseMlp) -> None:
        """`m_e = E[y_e | e off]`; an expert that is never off keeps zero."""
        experts = len(self.mean_ED)
        sum_EF = mlp.down_ND.new_zeros(experts, mlp.neurons // experts)
        count_E = sum_EF.new_zeros(experts)
        for h_TN, mask_TE in chunks:
            off_TE = (~mask_TE).to(h_TN.dtype)
            sum_EF += torch.einsum("te,tef->ef", off_TE, h_TN.view(len(h_TN), experts, -1))
            count_E += off_TE.sum(0)
        mean_EF = sum_EF / count_E[:, None].clamp_min(1)
        down_EFD = mlp.down_ND.view(experts, -1, mlp.width)
        self.mean_ED.copy_(torch.einsum("ef,efd->ed", mean_EF, down_EFD))

    def forward(self, x_TD: Tensor, mask_TE: Tensor) -> Tensor:
        """The compensation `[T, D]`."""
        return (~mask_TE).to(self.mean_ED.dtype) @ self.mean_ED
