"""Routers that go by every neuron's gate, exact or rough.

Shapes: T tokens, D width, N neurons, E routed experts, F neurons per expert.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import linear

from moefy.errors import RecipeError
from moefy.methods.base import WIDE_BITS, Router, WeightBits
from moefy.models.locate import Site
from moefy.models.mlp import DenseMlp, activation_function

FLAT = frozenset({"relu", "relu2"})
"""Activations that are zero for every negative gate."""


class RoughGateRouter(Router):
    """What routers share that rank neurons by a rough gate: the score made of it.

    A router has to guess which neurons will matter; the gate nearly says it (CATS, Lee et al. 2024, reads
    the exact one). From whatever estimate of the gate a subclass makes, a neuron scores

        |act(rough gate)| * c_j,    c_j = ||d_j|| * root mean square of u_j.x over a sample

    (without a gate the up projection decides, and `c_j = ||d_j||`), which estimates the norm of its
    contribution and is the same in every gauge; an expert scores the root of the sum of squares. Where an
    MLP without a gate counts from centres (`moefy.methods.compensations`), so does the score: `|act - centre| c_j`.

    Scores from an estimate of every neuron's gate; nothing is trained.
    """

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


class LargestInputsRouter(RoughGateRouter):
    """Largest inputs: every neuron's gate, made of a token's largest inputs only, predicts its contribution.

    The residual stream is far from even: a fraction of a token's inputs makes up most of every gate (the
    input sparsity of TEAL, Liu et al. 2024). What they make up is too rough to compute with, and good enough
    to choose by: the neurons that are chosen then run exactly (ours; `RoughGateRouter` for the
    score). Inputs count by `|x_i| ||G_i||`, with the column of the gate that they meet (WINA, Chen et al.
    2025). Router and neurons grow together: `planned` says how many are read.

    With all inputs it is the exact gate, weighed by what the neuron carries; that gate is handed on.

    Scores from the `inputs` largest inputs of a token.
    """

    @dataclass(frozen=True, kw_only=True)
    class Settings(RoughGateRouter.Settings):
        """How many inputs of a token are read."""

        inputs: int

    norm_D: Tensor

    def __init__(self, width: int, experts: int, neurons: int, inputs: int) -> None:
        super().__init__(experts, neurons)
        self.width, self.inputs = width, inputs
        self.register_buffer("norm_D", torch.zeros(width))

    @classmethod
    def planned(cls, site: Site, given: Mapping[str, Any], density: float) -> Settings:
        """`router.inputs` of a recipe is a share of the width; None is as large a share as the budget.

        Of m matrices, a share s of the inputs of one and the density d make a budget of `s/m + d`. All
        are read once that costs no more: the gates are then exact, and the budget `1/m + d(m - 1)/m`.
        """
        m, share = 3 if site.gated else 2, given.get("inputs")
        if share is None:
            share = 1.0 if density >= (m - 1) / (2 * m - 1) else density * m / (m - 1)
        return cls.Settings(inputs=max(1, round(share * site.width)))

    @classmethod
    def make(
        cls, width: int, experts: int, neurons: int, given: Mapping[str, Any]
    ) -> "LargestInputsRouter":
        """A router that reads `inputs` inputs."""
        return cls(width, experts, neurons, **vars(cls.settings(given)))

    @property
    def computes_gate(self) -> bool:
        """True where no input is left out."""
        return self.inputs == self.width

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, whole: DenseMlp) -> None:
        """Measure the columns, and what the neurons carry on `x_TD`."""
        super().initialise(mlp, x_TD, whole)
        self.norm_D.copy_(vector_norm(mlp.selecting_ND.float(), dim=0))

    def rough(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Gates of the largest inputs `[T, N]`."""
        if self.computes_gate:
            return mlp.deciding(x_TD)
        largest_TK = (x_TD.float().abs() * self.norm_D).topk(self.inputs, dim=1).indices
        kept_TD = torch.zeros_like(x_TD).scatter(1, largest_TK, x_TD.gather(1, largest_TK))
        return linear(kept_TD.to(mlp.selecting_ND.dtype), mlp.selecting_ND, mlp.deciding_bias_N)

    def weights_read(self, mlp: DenseMlp) -> int:
        """The columns of the largest inputs, all column norms, one size per neuron."""
        norms = 0 if self.computes_gate else self.width
        return len(self.size_N) * self.inputs + norms + len(self.size_N)

    def bits_read(self, mlp: DenseMlp) -> float:
        """The same, columns in the bits that they are stored in."""
        columns = len(self.size_N) * self.inputs
        others = self.weights_read(mlp) - columns
        return WeightBits.of(mlp).inputs * columns + WIDE_BITS * others


class SelfGatingRouter(Router):
    """Self-gating: every gate is computed and decides itself (CATS, Lee et al. 2024).

    With single-neuron experts and a threshold this is CATS: the gate projection stays dense, up and down
    projections run for the neurons whose gate is large. Larger experts score the norm of their gates.
    A method of this kind cannot go below a third of the weights of a gated MLP.

    Scores `||act(gate of the expert's neurons)||`; the gates are handed on, not made twice.
    """

    trainable = False
    reads_gate = True

    def __init__(self, width: int, experts: int) -> None:
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
