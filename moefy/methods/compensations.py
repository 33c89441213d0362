"""Compensations: what stands in for experts that are off. `tables.py` has the table.

Means: an expert that is off adds one constant vector. `MeanOutput` is its mean over all tokens
(G-MoEfication). It makes the output worse than nothing wherever the tokens on which an expert runs dominate
its mean, and is here to compare with. `ConditionalMean` is its mean *over tokens on which it is off*: given
that it is off, the best constant there is.

Residuals: `share off * (V U x + b)`, a small always-on linear layer. What is off is many weak neurons, whose
sum is of low rank and nearly linear in the input. The best rank-r map for squared error is known in closed
form: reduced-rank regression (Izenman 1975), here with a ridge. `MeanResidual` has a constant per expert
beside it: the conditional means are fitted first, the residual to what they leave.

Centres: `h_j(x) = c_j + (h_j(x) - c_j)`, so `y = (b + sum_j c_j d_j) + sum_j (h_j - c_j) d_j` is the same
function. Leaving a neuron out of the second sum puts it at `c_j` (mean ablation); the first is paid once,
whatever is off. Centres say as well which neurons matter: those far from theirs. Under GELU that is
another set than the largest ones, since a neuron at rest is a little below zero. Which neurons are off depends
on the centres and the centres on that: both are found in turn, as in Lloyd's k-means, from the mean over all
tokens (ours). `conditional_mean` differs in that it is fitted after the routing, as one vector for each
expert, which moves the choice of experts nowhere. `CentredResidual` adds a residual of what centred neurons
still leave.

Shapes: T tokens, D width, N neurons, E routed experts, F neurons per expert, R rank.
"""

from collections.abc import Iterable

import numpy as np
import torch
from scipy.sparse.linalg import svds
from torch import Tensor
from torch.nn.functional import pad

from moefy.methods.base import Compensation, frozen, off
from moefy.methods.routers.baselines import expert_norms
from moefy.methods.selections import Threshold
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
    if rank == 0:
        return matrix_DD.new_zeros(width, 0)
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


ROUNDS = 4


class Centred(Compensation):
    """Centred: a neuron that is off stands at its mean over the tokens on which it is off, not at zero.

    Adds nothing to the output: what runs is the MLP that counts from `centre_N`.
    """

    centres = True
    centre_N: Tensor
    constant_D: Tensor

    def __init__(self, width: int, experts: int, neurons: int) -> None:
        super().__init__()
        self.experts = experts
        self.register_buffer("centre_N", torch.zeros(neurons))
        self.register_buffer("constant_D", torch.zeros(width))

    @classmethod
    def make(cls, width: int, experts: int, neurons: int, rank: int) -> "Compensation":
        """A compensation of `neurons` centres."""
        return cls(width, experts, neurons)

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, active: int) -> None:
        """Find the centres: from the mean, choose `active` experts a token and average the others."""
        h_TN = torch.cat([mlp.hidden(x) for x in x_TD.split(1024)])
        centre_N = h_TN.mean(0)
        for _ in range(ROUNDS):
            score_TE = expert_norms(h_TN - centre_N, mlp.down_ND, self.experts)
            off_TE = ~Threshold.fit(score_TE, active)(score_TE)
            off_TN = off_TE.repeat_interleave(mlp.neurons // self.experts, 1)
            # An expert that is always on keeps its centre.
            count_N, sum_N = off_TN.sum(0), (h_TN * off_TN).sum(0)
            centre_N = torch.where(count_N > 0, sum_N / count_N.clamp_min(1), centre_N)
        self.centre_N.copy_(centre_N)
        self.follow(mlp)

    def centred(self, mlp: DenseMlp) -> DenseMlp:
        """The same function counted from the centres; shared neurons, which come first, from zero."""
        centre_N = pad(self.centre_N, (mlp.neurons - len(self.centre_N), 0))
        learns = torch.is_grad_enabled() and mlp.down_ND.requires_grad
        return mlp.centred(centre_N, self._constant(mlp) if learns else self.constant_D)

    def follow(self, mlp: DenseMlp) -> None:
        """Keep `constant_D` what the centres make of the down projection."""
        self.constant_D.copy_(self._constant(mlp))

    def _constant(self, mlp: DenseMlp) -> Tensor:
        return self.centre_N @ mlp.down_ND[mlp.neurons - len(self.centre_N) :].float()

    def weights_read(self, active: float) -> float:
        """The centres and the constant."""
        return self.centre_N.numel() + self.constant_D.numel()


class CentredResidual(Centred):
    """Centred residual: `centred`, and a `residual` of what it leaves."""

    def __init__(self, width: int, experts: int, neurons: int, rank: int) -> None:
        super().__init__(width, experts, neurons)
        self.residual = Residual(width, experts, rank)

    @classmethod
    def make(cls, width: int, experts: int, neurons: int, rank: int) -> Compensation:
        """A compensation of `neurons` centres and a residual of rank `rank`."""
        return cls(width, experts, neurons, rank)

    def fit(self, chunks: Iterable[tuple[Tensor, Tensor, Tensor]], mlp: DenseMlp) -> None:
        """Fit the residual; `mlp` and its activations are the centred ones already."""
        self.residual.fit(chunks, mlp)

    def forward(self, x_TD: Tensor, mask_TE: Tensor) -> Tensor | None:
        """What the residual adds `[T, D]`."""
        added: Tensor = self.residual(x_TD, mask_TE)
        return added

    def weights_read(self, active: float) -> float:
        """Those of both."""
        return super().weights_read(active) + self.residual.weights_read(active)
