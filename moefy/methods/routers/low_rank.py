"""Low-rank router: two matrices with nothing between them (Deja Vu, Liu et al. 2023).

Deja Vu's code has no nonlinearity in its predictor, so its scores are of rank H; with few hidden
units it is the cheapest router that is fitted.

Shapes: T tokens, D width, H rank, E routed experts.
"""

from torch import Tensor, nn

from moefy.methods.base import Router
from moefy.models.mlp import DenseMlp


class LowRankRouter(Router):
    """Scores `V W x` with `router.hidden` rows in `W`, no biases."""

    reads_input_alone = True

    def __init__(self, width: int, experts: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(hidden, experts, bias=False)

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`."""
        return self.up(self.down(x_TD.to(self.down.weight.dtype)))  # type: ignore[no-any-return]
