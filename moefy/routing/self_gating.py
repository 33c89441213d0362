"""Self-gating: every gate is computed and decides itself (CATS, Lee et al. 2024).

With single-neuron experts and a threshold this is CATS: the gate projection stays dense, up and down
projections run for the neurons whose gate is large. Larger experts score the norm of their gates.
A method of this kind cannot go below a third of the weights of a gated MLP.

Shapes: T tokens, D width, N neurons, E routed experts, F neurons per expert.
"""

from torch import Tensor
from torch.linalg import vector_norm

from moefy.errors import RecipeError
from moefy.mlp import DenseMlp
from moefy.routing.base import Router


class SelfGatingRouter(Router):
    """Scores `||act(gate of the expert's neurons)||`; the gates are handed on, not made twice."""

    trainable = False
    computes_gate = True

    def __init__(self, width: int, experts: int, hidden: int) -> None:
        super().__init__()
        self.experts = experts

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, whole: DenseMlp) -> None:
        """Nothing to set. Raises `RecipeError` for an MLP without a gate."""
        if mlp.gate_ND is None:
            raise RecipeError(
                "router 'self_gating' reads the gate, and this model's MLPs have none; "
                "choose another router, for example 'low_rank'"
            )

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`, never negative."""
        return self.scores(mlp.gates(x_TD))

    def scores(self, gate_TN: Tensor) -> Tensor:
        """Scores `[T, E]` from the gates' activations `[T, N]`."""
        score_TE: Tensor = vector_norm(gate_TN.float().view(len(gate_TN), self.experts, -1), dim=-1)
        return score_TE

    def weights_read(self, mlp: DenseMlp) -> int:
        """All gate rows; those of experts that run are counted here and nowhere else."""
        return mlp.neurons * mlp.width
