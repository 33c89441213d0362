"""MoEfication's own router: two layers of E units with a tanh between (Zhang et al. 2022).

As in its code: the token is normalised, the first layer starts as the mean of each expert's
normalised rows, the second as the identity, neither has a bias.

Shapes: T tokens, D width, E routed experts.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from moefy.methods.base import Router
from moefy.models.mlp import DenseMlp


class TanhMlpRouter(Router):
    """Scores `V tanh(W x/|x|)`."""

    def __init__(self, width: int, experts: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, experts, bias=False)
        self.output = nn.Linear(experts, experts, bias=False)

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, whole: DenseMlp) -> None:
        """Means of normalised gate (or up) rows, and the identity."""
        experts = self.output.out_features
        rows_ND = normalize(mlp.selecting_ND.float(), dim=-1)
        self.hidden.weight.data.copy_(rows_ND.view(experts, -1, mlp.width).mean(1))
        self.output.weight.data.copy_(torch.eye(experts))

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`."""
        x_TD = normalize(x_TD.to(self.hidden.weight.dtype), dim=-1)
        return self.output(self.hidden(x_TD).tanh())  # type: ignore[no-any-return]
