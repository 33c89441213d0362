"""One dense MLP as numbers: its weights with one row per neuron, and its activation.

This is the only form in which the rest of moefy sees an MLP: `y(x) = b + sum_j h_j(x) d_j` with
`h_j = act(g_j.x + a_j)(u_j.x + c_j)` (gated) or `h_j = act(u_j.x + c_j)`. It knows nothing of
families, files or experts.

Shapes: T tokens, D model width, N neurons.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from moefy.models.quantised import GROUPED, QuantisedMlp


@cache
def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The activation transformers knows by this name."""
    act: Callable[[Tensor], Tensor] = ACT2FN[name]
    return act


@dataclass(frozen=True, kw_only=True)
class DenseMlp:
    """Weights of one MLP, neuron-major: row `j` of every matrix belongs to neuron `j`."""

    up_ND: Tensor
    """Rows `u_j`, the up projection (the only input projection without a gate)."""
    down_ND: Tensor
    """Rows `d_j`: the down projection, transposed."""
    activation: str
    """A key of `transformers.activations.ACT2FN`."""
    gate_ND: Tensor | None = None
    up_bias_N: Tensor | None = None
    gate_bias_N: Tensor | None = None
    down_bias_D: Tensor | None = None
    centre_N: Tensor | None = None
    """Where neurons stand that are off; `hidden` counts from it, the rest is in `down_bias_D`."""
    stored: QuantisedMlp | None = None
    """What the matrices are the values of, where they are stored in few bits."""

    @property
    def neurons(self) -> int:
        """N, the number of neurons."""
        return self.up_ND.shape[0]

    @property
    def width(self) -> int:
        """D, the width of the model."""
        return self.up_ND.shape[1]

    @property
    def selecting_ND(self) -> Tensor:
        """The rows that decide when a neuron is active: the gate, or up without one."""
        return self.up_ND if self.gate_ND is None else self.gate_ND

    @property
    def deciding_bias_N(self) -> Tensor | None:
        """The bias of those rows."""
        return self.up_bias_N if self.gate_ND is None else self.gate_bias_N

    @property
    def matrices(self) -> int:
        """Weight matrices: 3 with a gate, 2 without."""
        return 2 if self.gate_ND is None else 3

    def hidden(self, x_TD: Tensor, rows: slice = slice(None)) -> Tensor:
        """Activations `h` `[T, N]` of every neuron, or of a run of neurons (a view of the rows)."""
        active_TN = activation_function(self.activation)(self.deciding(x_TD, rows))
        return self.finish(active_TN, x_TD, rows)

    def finish(self, active_TN: Tensor, x_TD: Tensor, rows: slice = slice(None)) -> Tensor:
        """Activations `h` of a run of neurons, from `act(deciding)` of theirs."""
        h_TN = active_TN if self.gate_ND is None else active_TN * self.up(x_TD, rows)
        return h_TN if self.centre_N is None else h_TN - self.centre_N[rows].to(h_TN.dtype)

    def deciding(self, x_TD: Tensor, rows: slice = slice(None)) -> Tensor:
        """What the activation is taken of `[T, N]`: the gates, or if there are none, up."""
        return linear(x_TD, self.selecting_ND[rows], _rows(self.deciding_bias_N, rows))

    def up(self, x_TD: Tensor, rows: slice = slice(None)) -> Tensor:
        """Outputs of the up projection `[T, N]`, or of a run of neurons."""
        return linear(x_TD, self.up_ND[rows], _rows(self.up_bias_N, rows))

    def at(self, token_C: Tensor) -> "DenseMlp":
        """What computes these tokens of a batch: itself, nothing here belongs to tokens."""
        return self

    def __call__(self, x_TD: Tensor) -> Tensor:
        """The dense output `[T, D]`."""
        return self.output(self.hidden(x_TD))

    def output(self, h_TN: Tensor) -> Tensor:
        """The output `[T, D]` that activations make."""
        y_TD = h_TN.to(self.down_ND.dtype) @ self.down_ND
        return y_TD if self.down_bias_D is None else y_TD + self.down_bias_D

    def take(self, neurons: Tensor | slice) -> "DenseMlp":
        """The MLP of these neurons, in this order (a slice gives views); the output bias stays."""
        rows = {
            name: value[neurons]
            for name in ("up_ND", "down_ND", "gate_ND", "up_bias_N", "gate_bias_N", "centre_N")
            if (value := getattr(self, name)) is not None
        }
        stored = None
        if self.stored is not None and isinstance(neurons, slice):
            stored = self.stored.take(neurons)
        return replace(self, **rows, stored=stored)

    def quantised(self, bits: int, scale_bits: int) -> "DenseMlp":
        """The same MLP with every matrix rounded (`moefy.models.quantised`), and what they are stored as."""
        own = {n: w_ND for n in GROUPED if (w_ND := getattr(self, f"{n}_ND")) is not None}
        return self.holding(QuantisedMlp.of(own, bits, scale_bits))

    def holding(self, stored: QuantisedMlp) -> "DenseMlp":
        """The same MLP with the values of `stored` for its matrices, in their dtype and place."""
        values: dict[str, Any] = {
            f"{name}_ND": stored.matrix(name).values(self.up_ND.dtype).to(self.up_ND.device)
            for name in stored.names
        }
        return replace(self, **values, stored=stored)

    def centred(self, centre_N: Tensor, constant_D: Tensor) -> "DenseMlp":
        """The same function counted from `centre_N`, with `constant_D = sum_j centre_j d_j`."""
        bias_D = constant_D if self.down_bias_D is None else constant_D + self.down_bias_D
        return replace(self, centre_N=centre_N, down_bias_D=bias_D.to(self.down_ND.dtype))

    def contiguous(self) -> "DenseMlp":
        """The same MLP with every matrix laid out row by row; what is so already is not copied."""
        return self._mapped(Tensor.contiguous)

    def to(self, dtype: torch.dtype) -> "DenseMlp":
        """The same MLP in another dtype."""
        return self._mapped(lambda tensor: tensor.to(dtype))

    def on_cpu(self) -> "DenseMlp":
        """The same MLP in main memory, without a gradient."""
        return self._mapped(lambda tensor: tensor.detach().cpu())

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "DenseMlp":
        values: dict[str, Any] = {
            name: change(value) if isinstance(value, Tensor) else value
            for name, value in vars(self).items()
        }
        return replace(self, **values)


@dataclass(frozen=True)
class DecidedMlp:
    """An MLP whose deciding projection is computed already, by a router that reads it."""

    mlp: DenseMlp
    active_TN: Tensor
    """`act(deciding)` of the very tokens that `hidden` is asked for."""

    @property
    def up_ND(self) -> Tensor:
        """Rows of the up projection."""
        return self.mlp.up_ND

    @property
    def down_ND(self) -> Tensor:
        """Rows of the transposed down projection."""
        return self.mlp.down_ND

    @property
    def down_bias_D(self) -> Tensor | None:
        """The output bias."""
        return self.mlp.down_bias_D

    def at(self, token_C: Tensor) -> "DecidedMlp":
        """The same MLP with what is known of these tokens."""
        return DecidedMlp(self.mlp, self.active_TN[token_C])

    def hidden(self, x_TD: Tensor, rows: slice = slice(None)) -> Tensor:
        """Activations `[T, rows]`; of a gated MLP the up projection is computed."""
        return self.mlp.finish(self.active_TN[:, rows], x_TD, rows)


@dataclass(frozen=True, kw_only=True)
class HeadOutputs(DenseMlp):
    """Attention heads as neurons: what they put out is known, `down_ND` is the output projection.

    No rows select a head (attention does), so those of `up_ND` are zero and take no memory.
    """

    heads_TN: Tensor | None = None
    """What the heads put out for the very tokens that `hidden` is asked for."""

    @classmethod
    def behind(cls, down_ND: Tensor, heads_TN: Tensor | None = None) -> "HeadOutputs":
        """The heads that an output projection `[N, D]` takes in."""
        zeros_ND = down_ND.new_zeros(1, 1).expand(down_ND.shape)
        return cls(up_ND=zeros_ND, down_ND=down_ND, activation="linear", heads_TN=heads_TN)

    def hidden(self, x_TD: Tensor, rows: slice = slice(None)) -> Tensor:
        """What the heads put out `[T, N]`, which no input gives back."""
        assert self.heads_TN is not None and len(self.heads_TN) == len(x_TD)
        return self.heads_TN[:, rows]


def _rows(bias_N: Tensor | None, rows: slice) -> Tensor | None:
    return None if bias_N is None else bias_N[rows]
