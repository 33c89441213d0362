"""MLP router: two layers with a ReLU between them (MoEfication, Zhang et al. 2022, section 3.3).

MoEfication has as many hidden units as experts and a tanh; a ReLU and a free width fit better, as
in D2DMoE (Szatkowski et al. 2024).

Shapes: T tokens, D width, H hidden width, E routed experts.
"""

from torch import Tensor, nn

from moefy.methods.base import Router
from moefy.models.mlp import DenseMlp


class MlpRouter(Router):
    """Scores `V relu(W x + a) + b`."""

    reads_input_alone = True

    def __init__(self, width: int, experts: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, experts)

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`."""
        x_TD = x_TD.to(self.hidden.weight.dtype)
        return self.output(self.hidden(x_TD).relu())  # type: ignore[no-any-return]
