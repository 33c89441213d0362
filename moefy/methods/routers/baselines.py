"""Routers to compare with: oracles, chance, and pruning.

Shapes: T tokens, D width, N neurons, E routed experts, F neurons per expert.
"""

import torch
from torch import Tensor
from torch.linalg import vector_norm

from moefy.methods.base import Router
from moefy.models.mlp import DenseMlp


def expert_norms(h_TN: Tensor, down_ND: Tensor, experts: int) -> Tensor:
    """Norm `[T, E]` of the output vector of every expert for every token.

    `||sum_j h_j d_j||^2 = h_e G_e h_e` with the Gram matrix `G_e = d_e d_e^T` `[F, F]`, so the
    outputs `[T, E, D]` are never formed.
    """
    down_EFD = down_ND.to(h_TN.dtype).view(experts, -1, down_ND.shape[1])
    gram_EFF = down_EFD @ down_EFD.mT
    h_ETF = h_TN.view(len(h_TN), experts, -1).transpose(0, 1)
    square_ET = ((h_ETF @ gram_EFF) * h_ETF).sum(-1)
    return square_ET.clamp_min(0).sqrt().T


class OracleRouter(Router):
    """Oracle: selection by the true contribution, an upper bound to measure routers against.

    Scores `||y_e||`, which needs every expert's output: for evaluation only.
    """

    trainable = False
    deployable = False

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]` in fp32 or better."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        return expert_norms(mlp.hidden(x_TD).to(dtype), mlp.down_ND, self.experts)


class ActivationRouter(OracleRouter):
    """Activation oracle: selection by the norm of the activations of an expert's neurons.

    Scores `||h_e||`, which needs every neuron of the token that is scored. For `prompt_static` too: GRIFFIN
    (Dong et al. 2024) ranks neurons by `|h_j|` over the prompt, which runs densely anyway. The raw
    activation is not gauge-free: a rescale of a neuron that leaves the model alone changes it.
    """

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`, never negative."""
        h_TN = mlp.hidden(x_TD).float()
        score_TE: Tensor = vector_norm(h_TN.view(len(h_TN), self.experts, -1), dim=-1)
        return score_TE


class RandomRouter(Router):
    """Random router: a fixed random projection of the token. A control, not a method.

    Scores `R x`, standardised per expert so that every expert runs about as often.
    """

    trainable = False
    reads_input_alone = True
    weight: Tensor
    mean_E: Tensor

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(experts, width))
        self.register_buffer("mean_E", torch.zeros(experts))

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, whole: DenseMlp) -> None:
        """Centre and scale the projections on `x_TD`."""
        scores_TE = x_TD.float() @ self.weight.T
        std_E = scores_TE.std(0).clamp_min(1e-12)
        self.weight /= std_E[:, None]
        self.mean_E.copy_(scores_TE.mean(0) / std_E)

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`."""
        return x_TD.float() @ self.weight.T - self.mean_E


class StaticRouter(Router):
    """Static scores: the same for every token, which is pruning. A control, not a router.

    Scores the root mean square contribution of each expert over a sample.
    """

    trainable = False
    reads_input_alone = True
    score_E: Tensor

    def __init__(self, width: int, experts: int) -> None:
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
