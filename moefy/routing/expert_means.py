"""What both mean compensations share: one vector per expert, added while the expert is off.

Shapes: T tokens, D width, E routed experts, F neurons per expert.
"""

import torch
from torch import Tensor

from moefy.mlp import DenseMlp
from moefy.routing.base import Compensation, frozen, off


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
