"""Routers that are fitted: linear maps and small MLPs of the token.

Shapes: T tokens, D width, H hidden width or rank, E routed experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from moefy.methods.base import Router
from moefy.models.mlp import DenseMlp
from moefy_kernels.cpu.linear import linear


class LinearRouter(Router):
    """Linear router: one row per expert, no bias, so that a stock architecture can hold it.

    Scores `W x`. It starts as the mean input row of each expert's neurons.
    """

    reads_input_alone = True

    def __init__(self, width: int, experts: int) -> None:
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


class LowRankRouter(Router):
    """Low-rank router: two matrices with nothing between them (Deja Vu, Liu et al. 2023).

    Deja Vu's code has no nonlinearity in its predictor, so its scores are of rank H; with few hidden
    units it is the cheapest router that is fitted.

    Scores `V W x` with `router.hidden` rows in `W`, no biases.
    """

    reads_input_alone = True

    @dataclass(frozen=True, kw_only=True)
    class Settings(Router.Settings):
        """`router.hidden` of a recipe."""

        hidden: int = 128

    def __init__(self, width: int, experts: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(hidden, experts, bias=False)

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`."""
        score_TE: Tensor = self.up(self.down(x_TD.to(self.down.weight.dtype)))
        return score_TE


class MlpRouter(Router):
    """MLP router: two layers with a ReLU between them (MoEfication, Zhang et al. 2022, section 3.3).

    MoEfication has as many hidden units as experts and a tanh; a ReLU and a free width fit better, as
    in D2DMoE (Szatkowski et al. 2024).

    Scores `V relu(W x + a) + b`.
    """

    reads_input_alone = True

    @dataclass(frozen=True, kw_only=True)
    class Settings(Router.Settings):
        """`router.hidden` of a recipe."""

        hidden: int = 128

    def __init__(self, width: int, experts: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.output = nn.Linear(hidden, experts)

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`."""
        x_TD = x_TD.to(self.hidden.weight.dtype)
        score_TE: Tensor = self.output(self.hidden(x_TD).relu())
        return score_TE


class NormRouter(MlpRouter):
    """Norm router: an MLP whose output is the norm of what each expert would add (D2DMoE).

    Szatkowski et al. 2024: depth two, width 128, ReLU between, and the absolute value of the output,
    fitted with the `norm_mse` loss. Its scores are on the scale of contributions, so that `dynamic_k`
    may compare them.

    Scores `|V relu(W x + a) + b|`.
    """

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`, never negative."""
        return super().forward(x_TD, mlp).abs()


class TanhMlpRouter(Router):
    """MoEfication's own router: two layers of E units with a tanh between (Zhang et al. 2022).

    As in its code: the token is normalised, the first layer starts as the mean of each expert's
    normalised rows, the second as the identity, neither has a bias.

    Scores `V tanh(W x/|x|)`.
    """

    def __init__(self, width: int, experts: int) -> None:
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
        score_TE: Tensor = self.output(self.hidden(x_TD).tanh())
        return score_TE
