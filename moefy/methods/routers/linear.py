"""Linear router: one row per expert, no bias, so that a stock architecture can hold it.

Shapes: T tokens, D width, E routed experts.
"""

import torch
from torch import Tensor, nn

from moefy.methods.base import Router
from moefy.models.mlp import DenseMlp
from moefy_kernels.cpu.linear import linear


class LinearRouter(Router):
    """Scores `W x`. It starts as the mean input row of each expert's neurons."""

    reads_input_alone = True

    def __init__(self, width: int, experts: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, width))

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, whole: DenseMlp) -> None:
        """Mean gate (or up) row per expert, small, so that fitting decides."""
        rows_EFD = mlp.selecting_ND.float().view(len(self.weight), -1, mlp.width)
        mean_ED = nn.functional.normalize(rows_EFD.mean(1), dim=-1)
        self.weight.data.copy_(mean_ED / mlp.width**0.5)

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`, in the wider dtype of inputs and router."""
        wide = torch.promote_types(x_TD.dtype, self.weight.dtype)
        return linear(x_TD.to(wide), self.weight.to(wide))
