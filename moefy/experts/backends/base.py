"""What a backend is, and what it is asked for.

Shapes: T tokens, D width, E experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moefy.models.mlp import DecidedMlp, DenseMlp
from moefy_kernels import ExpertWeights as ExpertWeights
from moefy_kernels.roofline import Layer

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "linear": "linear",
}
"""Names of transformers, and what kernels call the same function."""

CPU, GPU = "cpu", "cuda"


class Workload(NamedTuple):
    """What decides how long a backend takes: numbers alone, by which choices are remembered."""

    device: str
    """`cpu`, or the name of a GPU as torch gives it."""
    layer: Layer
    tokens: int
    density: float
    """Share of the experts that a token runs."""
    share: float | None = None
    """Share of the experts that any of the tokens runs; None is that of random routing."""
    threads: int = 1
    exact: bool = False
    """Whether sums have to be in one order in every run."""


class Request(NamedTuple):
    """A layer that is to be computed, and the tokens it is computed for."""

    x_TD: Tensor
    weights: ExpertWeights
    mask_TE: Tensor

    @property
    def mlp(self) -> ExpertWeights:
        """The layer itself, whether or not its router has computed the gates already."""
        return self.weights.mlp if isinstance(self.weights, DecidedMlp) else self.weights

    @property
    def learns(self) -> bool:
        """Whether the output needs a gradient; on CPUs, whether it might."""
        if not torch.is_grad_enabled():
            return False
        return not self.x_TD.is_cuda or self.x_TD.requires_grad or self.mlp.up_ND.requires_grad

    @property
    def layer(self) -> Layer:
        """What is left to compute, as kernels count it."""
        return kernel_layer(self.x_TD, self.weights, self.mask_TE.shape[1])


def kernel_layer(x_TD: Tensor, weights: ExpertWeights, experts: int) -> Layer:
    """What is left to compute of a layer with `experts` experts, in the dtype of `x_TD`, as kernels count it."""
    decided = isinstance(weights, DecidedMlp)
    mlp = weights.mlp if isinstance(weights, DecidedMlp) else weights
    assert isinstance(mlp, DenseMlp)
    size = 1 if decided and x_TD.is_cuda else mlp.neurons // experts
    return Layer(mlp.width, mlp.neurons, size, mlp.matrices - decided, x_TD.element_size())


def _everything(_: Request) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One way to compute the experts of a mask; all are the same function."""

    compute: Callable[[Tensor, ExpertWeights, Tensor], Tensor]
    """`(x_TD, weights, mask_TE) -> y_TD`."""
    seconds: Callable[[Workload], float]
    """The time it is expected to take; infinite where it is not meant for such work."""
    serves: Callable[[Request], str | None] = _everything
    """None, or why it cannot compute this."""
    devices: frozenset[str] = frozenset({CPU, GPU})
    """Types of devices on which `auto` may take it."""
    trains: bool = False
    """Whether `auto` may take it where a gradient is needed."""
    in_graph: bool = False
    """Whether `auto` may take it in a graph of `torch.compile` on a CPU."""
    instead: str = "masked"
    """The row that computes what this one was asked for by name and does not serve."""
