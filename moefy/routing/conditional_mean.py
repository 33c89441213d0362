"""Conditional mean: an expert that is off adds its mean output *over tokens on which it is off*.

The unconditional mean (G-MoEfication) is dominated by the tokens on which the expert runs and makes
the output worse than adding nothing; the mean given that it is off is the best constant there is.

Shapes: T tokens, D width, N neurons, E routed experts, F neurons per expert.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from moefy.mlp import DenseMlp
from moefy.routing.expert_means import ExpertMeans


class ConditionalMean(ExpertMeans):
    """`m_e = E[y_e | e off]`; an expert that is never off keeps zero."""

    def fit(self, chunks: Iterable[tuple[Tensor, Tensor, Tensor]], mlp: DenseMlp) -> None:
        """Average the activations where the expert is off, then apply the down projection."""
        experts = len(self.mean_ED)
        sum_EF = mlp.down_ND.new_zeros(experts, mlp.neurons // experts)
        count_E = sum_EF.new_zeros(experts)
        for _, h_TN, mask_TE in chunks:
            off_TE = (~mask_TE).to(h_TN.dtype)
            sum_EF += torch.einsum("te,tef->ef", off_TE, h_TN.view(len(h_TN), experts, -1))
            count_E += off_TE.sum(0)
        self.set_activations(sum_EF / count_E[:, None].clamp_min(1), mlp)
