"""Oracles: selection by what the experts really do, upper bounds to measure routers against.

`OracleRouter` scores by the true contribution. `ActivationRouter` scores by the norm of an expert's
activations, for `prompt_static` too: GRIFFIN (Dong et al. 2024) ranks neurons by `|h_j|` over the prompt,
which runs densely anyway. The raw activation is not gauge-free: a rescale of a neuron that leaves the
model alone changes it.

Shapes: T tokens, D width, N neurons, E experts, F neurons per expert.
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
    """Scores `||y_e||`, which needs every expert's output: for evaluation only."""

    trainable = False
    deployable = False

    def __init__(self, width: int, experts: int, hidden: int) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]` in fp32 or better."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        return expert_norms(mlp.hidden(x_TD).to(dtype), mlp.down_ND, self.experts)


class ActivationRouter(OracleRouter):
    """Scores `||h_e||`, which needs every neuron of the token that is scored."""

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`, never negative."""
        h_TN = mlp.hidden(x_TD).float()
        score_TE: Tensor = vector_norm(h_TN.view(len(h_TN), self.experts, -1), dim=-1)
        return score_TE
