"""Conditional mean and low-rank residual together: a constant per expert, and what the input tells.

The means are fitted first, the residual to what they leave.

Shapes: T tokens, D width, N neurons, E routed experts.
"""

from collections.abc import Iterable

from torch import Tensor

from moefy.mlp import DenseMlp
from moefy.routing.base import Compensation
from moefy.routing.conditional_mean import ConditionalMean
from moefy.routing.residual import Residual, missing


class MeanResidual(Compensation):
    """The sum of `conditional_mean` and `residual`."""

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
