"""What routers share that rank neurons by a rough gate: the score made of it.

A router has to guess which neurons will matter; the gate nearly says it (CATS, Lee et al. 2024, reads
the exact one). From whatever estimate of the gate a subclass makes, a neuron scores

    |act(rough gate)| * c_j,    c_j = ||d_j|| * root mean square of u_j.x over a sample

(without a gate the up projection decides, and `c_j = ||d_j||`), which estimates the norm of its
contribution and is the same in every gauge; an expert scores the root of the sum of squares. Where an
MLP without a gate counts from centres (`moefy.methods.compensations.centred`), so does the score: `|act - centre| c_j`.

Shapes: T tokens, D width, N neurons, E routed experts.
"""

import torch
from torch import Tensor
from torch.linalg import vector_norm

from moefy.methods.base import Router
from moefy.models.mlp import DenseMlp, activation_function

FLAT = frozenset({"relu", "relu2"})
"""Activations that are zero for every negative gate."""


class RoughGateRouter(Router):
    """Scores from an estimate of every neuron's gate; nothing is trained."""

    trainable = False
    size_N: Tensor

    def __init__(self, experts: int, neurons: int) -> None:
        super().__init__()
        self.experts = experts
        self.register_buffer("size_N", torch.zeros(neurons))

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, whole: DenseMlp) -> None:
        """Measure on `x_TD` what the neurons carry."""
        size_N = vector_norm(mlp.down_ND.float(), dim=1)
        if mlp.gate_ND is not None:
            square_N = torch.zeros_like(size_N)
            for x in x_TD.split(1024):
                square_N += mlp.up(x).square().sum(0)
            size_N = size_N * (square_N / max(len(x_TD), 1)).sqrt()
        self.size_N.copy_(size_N)

    def rough(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """The estimate of the gates before their activation `[T, N]`."""
        raise TypeError(f"{type(self).__name__} does not define rough")

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`; negative only for single neurons that seem to be off."""
        return self.scores(self.rough(x_TD, mlp), mlp)

    def scores(self, gate_TN: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]` from gates before their activation `[T, N]`."""
        act, single = activation_function(mlp.activation), self.experts == len(self.size_N)
        signed = single and mlp.activation in FLAT and mlp.centre_N is None
        gate_TN = gate_TN.float()
        value_TN = act(gate_TN)
        if signed:
            # Zero says nothing of how near a neuron is to being active: how negative it is, does.
            value_TN = value_TN - act(-gate_TN)
        elif mlp.centre_N is not None and mlp.gate_ND is None:
            value_TN = value_TN - mlp.centre_N
        value_TN = value_TN * self.size_N
        if single:
            return value_TN if signed else value_TN.abs()
        score_TE: Tensor = vector_norm(value_TN.view(len(value_TN), self.experts, -1), dim=-1)
        return score_TE
