"""Static scores: the same for every token, which is pruning. A control, not a router.

Shapes: T tokens, E routed experts.
"""

import torch
from torch import Tensor

from moefy.methods.base import Router
from moefy.methods.routers.oracle import expert_norms
from moefy.models.mlp import DenseMlp


class StaticRouter(Router):
    """Scores the root mean square contribution of each expert over a sample."""

    trainable = False
    reads_input_alone = True
    score_E: Tensor

    def __init__(self, width: int, experts: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("score_E", torch.zeros(experts))

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, whole: DenseMlp) -> None:
        """Measure the contributions on `x_TD`."""
        norm_TE = expert_norms(mlp.hidden(x_TD.float()), mlp.down_ND, len(self.score_E))
        self.score_E.copy_(norm_TE.square().mean(0).sqrt())

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`, every row the same."""
        return self.score_E.expand(len(x_TD), -1)

    def weights_read(self, mlp: DenseMlp) -> int:
        """None: what never runs need not be stored."""
        return 0
