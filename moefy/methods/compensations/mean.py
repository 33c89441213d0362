"""Means: an expert that is off adds one constant vector.

`MeanOutput` is its mean over all tokens (G-MoEfication). It makes the output worse than nothing wherever
the tokens on which an expert runs dominate its mean, and is here to compare with. `ConditionalMean` is
its mean *over tokens on which it is off*: given that it is off, the best constant there is.

Shapes: T tokens, D width, N neurons, E routed experts, F neurons per expert.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from moefy.methods.base import Compensation, frozen, off
from moefy.models.mlp import DenseMlp


class ExpertMeans(Compensation):
    """Adds `sum over e off of m_e`, exactly zero where every expert runs."""

    def __init__(self, width: int, experts: int, rank: int) -> None:
        super().__init__()
        self.mean_ED = frozen(experts, width)
        self._summed: tuple[object, Tensor] | None = None

    def set_activations(self, mean_EF: Tensor, mlp: DenseMlp) -> None:
        """Take the means from mean activations, one row per expert."""
        down_EFD = mlp.down_ND.view(*mean_EF.shape, mlp.width)
        with torch.no_grad():
            self.mean_ED.copy_(torch.einsum("ef,efd->ed", mean_EF, down_EFD))

    def forward(self, x_TD: Tensor, mask_TE: Tensor) -> Tensor | None:
        """The compensation `[T, D]`."""
        training = torch.is_grad_enabled() and self.mean_ED.requires_grad
        one = len(mask_TE) == 1 and not mask_TE.is_floating_point()
        graph = torch.compiler.is_compiling()  # cannot hold what depends on the mask
        if one and not training and not graph and mask_TE.device.type == "cpu":
            # One token reads only the rows it needs: this is what `weights_read` counts.
            return self._one_token(mask_TE[0])[None]
        off_TE = off(mask_TE)
        wide = torch.promote_types(off_TE.dtype, self.mean_ED.dtype)
        return off_TE.to(wide) @ self.mean_ED.to(wide)

    def _one_token(self, mask_E: Tensor) -> Tensor:
        off_K = (~mask_E).nonzero()[:, 0]
        if 2 * len(off_K) <= len(mask_E):
            return self.mean_ED[off_K].sum(0)
        return self._total_D() - self.mean_ED[mask_E.nonzero()[:, 0]].sum(0)

    def _total_D(self) -> Tensor:
        """The sum of all means, kept until they change: whoever changes them in place counts up."""
        mean_ED = self.mean_ED
        if mean_ED.is_inference():
            return mean_ED.sum(0)
        version = (mean_ED._version, mean_ED.data_ptr(), mean_ED.dtype)
        if self._summed is None or self._summed[0] != version:
            self._summed = (version, mean_ED.detach().sum(0))
        return self._summed[1]

    def weights_read(self, active: float) -> float:
        """The rows of the experts that are off; or, if fewer, of those on, and the sum of all."""
        experts, width = self.mean_ED.shape
        return min(experts - active, active + 1) * width


class MeanOutput(ExpertMeans):
    """Mean: an expert that is off adds its mean over all tokens, `m_e = E[y_e]` (G-MoEfication)."""

    def fit(self, chunks: Iterable[tuple[Tensor, Tensor, Tensor]], mlp: DenseMlp) -> None:
        """Average the activations, then apply the down projection."""
        experts = len(self.mean_ED)
        sum_N, tokens = mlp.down_ND.new_zeros(mlp.neurons), 0
        for _, h_TN, _ in chunks:
            sum_N += h_TN.sum(0)
            tokens += len(h_TN)
        self.set_activations((sum_N / max(tokens, 1)).view(experts, -1), mlp)


class ConditionalMean(ExpertMeans):
    """Conditional mean: an expert that is off adds its mean over the tokens on which it is off.

    `m_e = E[y_e | e off]`; an expert that is never off keeps zero.
    """

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
