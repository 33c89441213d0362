"""Activation scores: the norm of an expert's activations, for `prompt_static` and as an oracle.

GRIFFIN (Dong et al. 2024) ranks neurons by `|h_j|` over the prompt, which runs densely anyway. The
raw activation is not gauge-free: a rescale of a neuron that leaves the model alone changes it.

Shapes: T tokens, N neurons, E routed experts.
"""

from torch import Tensor
from torch.linalg import vector_norm

from moefy.mlp import DenseMlp
from moefy.routing.oracle import OracleRouter


class ActivationRouter(OracleRouter):
    """Scores `||h_e||`, which needs every neuron of the token that is scored."""

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`, never negative."""
        h_TN = mlp.hidden(x_TD).float()
        score_TE: Tensor = vector_norm(h_TN.view(len(h_TN), self.experts, -1), dim=-1)
        return score_TE
