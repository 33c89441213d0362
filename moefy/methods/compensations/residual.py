"""Low-rank residual: what the experts that are off would add, predicted from the layer's input.

`share off * (V U x + b)`, a small always-on linear layer. What is off is many weak neurons, whose sum
is of low rank and nearly linear in the input. The best rank-r map for squared error is known in closed
form: reduced-rank regression (Izenman 1975), here with a ridge. `MeanResidual` has a constant per expert
beside it: the conditional means are fitted first, the residual to what they leave.

Shapes: T tokens, D width, N neurons, E routed experts, R rank.
"""

from collections.abc import Iterable

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor

from moefy.methods.base import Compensation, frozen, off
from moefy.methods.compensations.mean import ConditionalMean
from moefy.models.mlp import DenseMlp

RIDGE = 1e-3
"""Penalty over the mean variance of the inputs."""


class Residual(Compensation):
    """Low-rank residual: what the experts that are off would add, predicted from the layer's input.

    Adds `share off * (V U x + b)`, exactly zero where every expert runs.
    """

    def __init__(self, width: int, experts: int, rank: int) -> None:
        super().__init__()
        self.down_RD = frozen(rank, width)
        self.up_RD = frozen(rank, width)
        self.bias_D = frozen(width)

    def fit(self, chunks: Iterable[tuple[Tensor, Tensor, Tensor]], mlp: DenseMlp) -> None:
        """Regress the output of the experts that are off on the input."""
        self.fit_to(((x, m, missing(h, m, mlp)) for x, h, m in chunks))

    def fit_to(self, chunks: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Regress targets `[T, D]`, given with inputs `[T, D]` and masks, in one pass over chunks."""
        width = self.bias_D.numel()
        square = torch.zeros(width + 1, width + 1, dtype=torch.float64)
        cross = torch.zeros(width + 1, width, dtype=torch.float64)
        for x_TD, mask_TE, target_TD in chunks:
            share_T1 = off(mask_TE).mean(1, keepdim=True)
            input_TI = torch.cat([x_TD, torch.ones_like(share_T1)], 1) * share_T1
            square += (input_TI.T @ input_TI).double().cpu()
            cross += (input_TI.T @ target_TD).double().cpu()
        if not square[-1, -1]:
            return
        # The bias is free: partial it out, so that the rank is spent on the input alone.
        along_D, size = square[-1, :-1], square[-1, -1]
        left_DD = square[:-1, :-1] - along_D[:, None] * along_D / size
        wanted_DD = cross[:-1] - along_D[:, None] * cross[-1] / size
        left_DD.diagonal().add_(RIDGE * square.diagonal()[:-1].mean())
        factor_DD = torch.linalg.cholesky(left_DD)
        # Directions of the output in which the predictions vary most.
        seen_DD = torch.linalg.solve_triangular(factor_DD, wanted_DD, upper=False)
        kept_DR = _strongest(seen_DD, len(self.down_RD))
        down_DR = torch.cholesky_solve(wanted_DD @ kept_DR, factor_DD)
        bias_D = (cross[-1] - along_D @ down_DR @ kept_DR.T) / size
        with torch.no_grad():
            self.up_RD.copy_(kept_DR.T)
            self.down_RD.copy_(down_DR.T)
            self.bias_D.copy_(bias_D)

    def forward(self, x_TD: Tensor, mask_TE: Tensor) -> Tensor | None:
        """The compensation `[T, D]`."""
        x_TD = x_TD.to(self.down_RD.dtype)
        full_TD = torch.addmm(self.bias_D, x_TD @ self.down_RD.T, self.up_RD)
        return off(mask_TE).mean(1, keepdim=True) * full_TD

    def weights_read(self, active: float) -> float:
        """Both matrices and the bias, for every token."""
        return self.down_RD.numel() + self.up_RD.numel() + self.bias_D.numel()


def _strongest(matrix_DD: Tensor, rank: int) -> Tensor:
    """The right singular vectors `[D, R]` of the `rank` largest singular values."""
    width = len(matrix_DD)
    if not matrix_DD.any():
        return torch.zeros(width, rank, dtype=matrix_DD.dtype)
    if 2 * rank > width:
        kept_RD = torch.linalg.svd(matrix_DD).Vh[:rank]
        return torch.nn.functional.pad(kept_RD, (0, 0, 0, rank - len(kept_RD))).T
    # A few of thousands: Lanczos, from a fixed start, so that the same sample gives the same bytes.
    _, _, kept_RD = svds(matrix_DD.numpy(), k=rank, v0=np.ones(width))
    return torch.from_numpy(kept_RD.copy()).T


def missing(h_TN: Tensor, mask_TE: Tensor, mlp: DenseMlp) -> Tensor:
    """What the experts that are off would add `[T, D]`."""
    h_TEF = h_TN.view(*mask_TE.shape, -1) * off(mask_TE)[..., None].to(h_TN.dtype)
    return h_TEF.view(h_TN.shape) @ mlp.down_ND


class MeanResidual(Compensation):
    """Mean and residual: `conditional_mean`, and a `residual` of what it leaves."""

    def __init__(self, width: int, experts: int, rank: int) -> None:
        super().__init__()
        self.mean = ConditionalMean(width, experts, rank)
        self.residual = Residual(width, experts, rank)

    def fit(self, chunks: Iterable[tuple[Tensor, Tensor, Tensor]], mlp: DenseMlp) -> None:
        """First the means, then the residual of what they leave."""
        self.mean.fit(chunks, mlp)

        def left() -> Iterable[tuple[Tensor, Tensor, Tensor]]:
            for x_TD, h_TN, mask_TE in chunks:
                target_TD = missing(h_TN, mask_TE, mlp)
                added_TD = self.mean(x_TD, mask_TE)
                yield x_TD, mask_TE, target_TD - added_TD

        self.residual.fit_to(left())

    def forward(self, x_TD: Tensor, mask_TE: Tensor) -> Tensor | None:
        """The compensation `[T, D]`."""
        added: Tensor = self.mean(x_TD, mask_TE) + self.residual(x_TD, mask_TE)
        return added

    def weights_read(self, active: float) -> float:
        """Those of both."""
        return self.mean.weights_read(active) + self.residual.weights_read(active)
