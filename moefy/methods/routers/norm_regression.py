"""Norm router: an MLP whose output is the norm of what each expert would add (D2DMoE).

Szatkowski et al. 2024: depth two, width 128, ReLU between, and the absolute value of the output,
fitted with the `norm_mse` loss. Its scores are on the scale of contributions, so that `dynamic_k`
may compare them.

Shapes: T tokens, D width, H hidden width, E routed experts.
"""

from torch import Tensor

from moefy.methods.routers.mlp import MlpRouter
from moefy.models.mlp import DenseMlp


class NormRouter(MlpRouter):
    """Scores `|V relu(W x + a) + b|`."""

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`, never negative."""
        return super().forward(x_TD, mlp).abs()
