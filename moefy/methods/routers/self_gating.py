"""Self-gating: every gate is computed and decides itself (CATS, Lee et al. 2024).

With single-neuron experts and a threshold this is CATS: the gate projection stays dense, up and down
projections run for the neurons whose gate is large. Larger experts score the norm of their gates.
A method of this kind cannot go below a third of the weights of a gated MLP.

Shapes: T tokens, D width, N neurons, E routed experts, F neurons per expert.
"""

from torch import Tensor
from torch.linalg import vector_norm

from moefy.errors import RecipeError
from moefy.methods.base import Router
from moefy.models.mlp import DenseMlp, activation_function


class SelfGatingRouter(Router):
    """Scores `||act(gate of the expert's neurons)||`; the gates are handed on, not made twice."""

    trainable = False
    reads_gate = True

    def __init__(self, width: int, experts: int, hidden: int) -> None:
        super().__init__()
        self.experts = experts

    @property
    def computes_gate(self) -> bool:
        """Always."""
        return True

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, whole: DenseMlp) -> None:
        """Nothing to set. Raises `RecipeError` for an MLP without a gate."""
        if mlp.gate_ND is None:
            raise RecipeError(
                "router 'self_gating' reads the gate, and this model's MLPs have none; "
                "choose another router, for example 'low_rank'"
            )

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`, never negative."""
        return self.scores(mlp.deciding(x_TD), mlp)

    def scores(self, gate_TN: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]` from the gates before their activation `[T, N]`."""
        value_TN = activation_function(mlp.activation)(gate_TN).float()
        score_TE: Tensor = vector_norm(value_TN.view(len(value_TN), self.experts, -1), dim=-1)
        return score_TE

    def weights_read(self, mlp: DenseMlp) -> int:
        """All gate rows; those of experts that run are counted here and nowhere else."""
        return mlp.neurons * mlp.width
