"""Largest inputs: every neuron's gate, made of a token's largest inputs only, predicts its contribution.

The residual stream is far from even: a fraction of a token's inputs makes up most of every gate (the
input sparsity of TEAL, Liu et al. 2024). What they make up is too rough to compute with, and good enough
to choose by: the neurons that are chosen then run exactly (ours; `moefy.methods.routers.rough_gate` for the
score). Inputs count by `|x_i| ||G_i||`, with the column of the gate that they meet (WINA, Chen et al.
2025). Router and neurons grow together: `moefy.conversion.plan.inputs_read` sets how many are read by default.

With all inputs it is the exact gate, weighed by what the neuron carries; that gate is handed on.

Shapes: T tokens, D width, N neurons.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import linear

from moefy.methods.routers.rough_gate import RoughGateRouter
from moefy.models.mlp import DenseMlp


class LargestInputsRouter(RoughGateRouter):
    """Scores from the `inputs` largest inputs of a token."""

    norm_D: Tensor

    def __init__(self, width: int, experts: int, neurons: int, inputs: int) -> None:
        super().__init__(experts, neurons)
        self.width, self.inputs = width, inputs
        self.register_buffer("norm_D", torch.zeros(width))

    @classmethod
    def make(
        cls, width: int, experts: int, neurons: int, settings: Mapping[str, Any]
    ) -> "LargestInputsRouter":
        """A router that reads `settings["inputs"]` inputs."""
        return cls(width, experts, neurons, settings["inputs"])

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
