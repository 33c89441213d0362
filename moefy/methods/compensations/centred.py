"""Centred: a neuron that is off stands at its mean over the tokens on which it is off, not at zero.

`h_j(x) = c_j + (h_j(x) - c_j)`, so `y = (b + sum_j c_j d_j) + sum_j (h_j - c_j) d_j` is the same function.
Leaving a neuron out of the second sum puts it at `c_j` (mean ablation); the first is paid once,
whatever is off. Centres say as well which neurons matter: those far from theirs. Under GELU that is
another set than the largest ones, since a neuron at rest is a little below zero.

Which neurons are off depends on the centres and the centres on that: both are found in turn, as in
Lloyd's k-means, from the mean over all tokens (ours). `conditional_mean` differs in that it is fitted
after the routing, as one vector for each expert, which moves the choice of experts nowhere.
`CentredResidual` adds a low-rank residual of what centred neurons still leave.

Shapes: T tokens, D width, N routed neurons, E routed experts.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from moefy.methods.base import Compensation
from moefy.methods.compensations.residual import Residual
from moefy.methods.routers.baselines import expert_norms
from moefy.methods.selections.thresholds import Threshold
from moefy.models.mlp import DenseMlp

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
