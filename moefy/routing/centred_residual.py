"""Centred neurons and a low-rank residual of what they still leave.

Shapes: T tokens, D width, N routed neurons, E routed experts.
"""

from collections.abc import Iterable

from torch import Tensor

from moefy.mlp import DenseMlp
from moefy.routing.base import Compensation
from moefy.routing.centred import Centred
from moefy.routing.residual import Residual


class CentredResidual(Centred):
    """`centred` and `residual` together."""

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
