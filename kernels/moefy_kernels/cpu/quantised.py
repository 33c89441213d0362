"""MLPs and linear maps in codes of few bits on CPUs, for few tokens; `quantised.cpp` computes them.

    packed = pack_mlp(gate, up, down, activation="silu", judge=judge)
    y_TD = packed(x_TD, threshold_T)       # who runs is said by the top bits of the codes
    y_TD = packed(x_TD, mask_TN=mask_TN)   # or by someone else
    y_TD = packed(x_TD)                    # or all do

Inputs, and the activations that meet down, are rounded to 8 bits with one scale for every 32 (as in Q8_0 of
GGUF); everything else is exact but for rounding in fp32. Weights are laid out once, for the vectors of the
instruction set, and every bit of a code is read at most once for a token: the `planes` top bits of gate and up of
all neurons, the other bits and down of those that run.

Shapes: T tokens, D width, N neurons, G groups of 32 inputs, R rows of a linear map, V bytes of a vector.
"""

import struct
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moefy_kernels.cpu import packing
from moefy_kernels.cpu.experts import DTYPES, address
from moefy_kernels.cpu.library import available, call, vector_bytes
from moefy_kernels.cpu.packing import GROUP, WHOLE, Stored, padded
from moefy_kernels.expert_mlp import ACTIVATIONS

MOST = 16
"""Tokens up to which reading the weights is what decides."""
_CALL, _LAYER = struct.Struct("3q5P"), struct.Struct("16q17P")
"""The two halves of `QuantisedArguments` in quantised.cpp."""
_MAP = struct.Struct("3q2P6q3P")
"""`QuantisedMap` in quantised.cpp."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What makes a score of a neuron of its rough gate g and up u, their mean errors added:

    `size sqrt((act(g)^2 + act'(g)^2 gate_variance) (u^2 + up_variance))`, or without a gate
    `size sqrt(act(u)^2 + act'(u)^2 up_variance)`.
    """

    planes: int
    """Top bits that are read."""
    up: Stored
    """Whose top bits these are, and those of the gate."""
    size_N: Tensor
    up_error_N: tuple[Tensor, Tensor]
    """Mean and variance of what the rough up leaves out."""
    gate: Stored | None = None
    gate_error_N: tuple[Tensor, Tensor] | None = None

    def nested(self, gate: Stored | None, up: Stored) -> bool:
        """Whether its top bits are those of these matrices, so that they need not be read again."""
        return all(
            own is not None and stored is not None and packing.begins(own, stored, self.planes)
            for own, stored in ((self.gate, gate), (self.up, up))
            if own is not None or stored is not None
        )


@dataclass(frozen=True)
class Biases:
    """Those of an MLP, each of which may be missing."""

    gate_N: Tensor | None = None
    up_N: Tensor | None = None
    down_D: Tensor | None = None


def serves(x: Tensor) -> bool:
    """Whether the library is there and computes for such inputs: fp32 or bf16 on a CPU, no gradients."""
    trains = torch.is_grad_enabled() and x.requires_grad
    return x.is_cpu and x.dtype in DTYPES and not trains and available()


@dataclass(frozen=True)
class PackedMlp:
    """An MLP as `pack_mlp` lays it out."""

    width: int
    neurons: int
    parts: dict[str, Tensor] = field(repr=False)
    """What the kernel reads, by its name in quantised.cpp."""
    numbers: tuple[int, ...] = field(repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """Copies have places of their own."""
        return {name: value for name, value in vars(self).items() if name != "_layer"}

    @cached_property
    def _layer(self) -> bytes:
        names = (
            "gate", "up", "records", "down", "gate_rough_units", "up_rough_units", "gate_units", "up_units",
            "down_units", "gate_bias", "up_bias", "down_bias", "size", "gate_mean", "up_mean",
            "gate_variance", "up_variance",
        )  # fmt: skip
        return _LAYER.pack(*self.numbers, *(address(self.parts.get(name)) for name in names))

    def __call__(
        self, x_TD: Tensor, threshold_T: Tensor | None = None, mask_TN: Tensor | None = None
    ) -> Tensor:
        """Output `[T, D]` in the dtype of `x_TD`, of the neurons above the threshold, or in the mask, or of all."""
        if mask_TN is not None and (
            threshold_T is not None
            or mask_TN.shape != (len(x_TD), self.neurons)
            or not mask_TN.is_cpu
        ):
            raise ValueError(
                f"a packed MLP takes a mask [{len(x_TD)}, {self.neurons}] on a CPU and no threshold beside it: "
                f"got {tuple(mask_TN.shape)} on {mask_TN.device}"
            )
        y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
        runs_TN = None if mask_TN is None else self._padded(mask_TN)
        self._run(x_TD, y_TD, runs_TN, None, threshold_T)
        return y_TD

    def routed(self, x_TD: Tensor, threshold_T: Tensor) -> tuple[Tensor, Tensor]:
        """The output `[T, D]`, and the mask `[T, N]` of the neurons that ran."""
        y_TD = torch.empty_like(x_TD, memory_format=torch.contiguous_format)
        runs_TN = self._room(len(x_TD), torch.uint8)
        self._run(x_TD, y_TD, runs_TN, None, threshold_T)
        return y_TD, runs_TN[:, : self.neurons].bool()

    def scores(self, x_TD: Tensor) -> Tensor:
        """Scores `[T, N]` of the rough gate and up, in fp32."""
        scores_TN = self._room(len(x_TD), torch.float32)
        self._run(x_TD, None, None, scores_TN, None)
        return scores_TN[:, : self.neurons]

    def _room(self, tokens: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(tokens, self.numbers[2], dtype=dtype)

    def _padded(self, mask_TN: Tensor) -> Tensor:
        missing = self.numbers[2] - self.neurons
        runs_TN = mask_TN.to(torch.uint8)
        return (pad(runs_TN, (0, missing)) if missing else runs_TN).contiguous()

    def _run(
        self,
        x_TD: Tensor,
        y_TD: Tensor | None,
        runs_TN: Tensor | None,
        scores_TN: Tensor | None,
        threshold_T: Tensor | None,
    ) -> None:
        if (y_TD is None or threshold_T is not None) and "size" not in self.parts:
            raise ValueError("a packed MLP without a judge has no scores")
        if not serves(x_TD) or x_TD.shape[1:] != (self.width,):
            raise ValueError(
                f"a packed MLP takes inputs [T, {self.width}] in fp32 or bf16 on a CPU, without gradients: "
                f"got {x_TD.dtype} {tuple(x_TD.shape)} on {x_TD.device}"
            )
        x_TD = x_TD.contiguous()
        if threshold_T is not None:
            if threshold_T.shape != x_TD.shape[:1] or not threshold_T.is_cpu:
                raise ValueError(
                    f"a packed MLP takes a threshold [{len(x_TD)}] on a CPU: "
                    f"got {tuple(threshold_T.shape)} on {threshold_T.device}"
                )
            threshold_T = threshold_T.float().contiguous()
        places = map(address, (x_TD, y_TD, runs_TN, scores_TN, threshold_T))
        is_bf16 = x_TD.dtype == torch.bfloat16
        made = _CALL.pack(len(x_TD), torch.get_num_threads(), is_bf16, *places)
        call("moefy_quantised_mlp", made + self._layer)


def pack_mlp(
    gate: Stored | None,
    up: Stored,
    down: Stored,
    *,
    activation: str,
    judge: Judge | None = None,
    biases: Biases | None = None,
) -> PackedMlp:
    """Lay an MLP out: what the judge reads for all neurons, the rest neuron by neuron.

    Groups of gate and up run along D, those of down along neurons. Without a judge nothing is known before
    somebody says which neurons run. Raises `ValueError` for codes or scales that no kernel reads.
    """
    inner = {"up": up} if gate is None else {"gate": gate, "up": up}
    packing.check({**inner, "down": down})
    neurons, width = up.codes_ND.shape
    padded_N, padded_D = padded(neurons, GROUP), padded(width, WHOLE)
    nested = judge is not None and judge.nested(gate, up)
    rest = up.bits - judge.planes if nested and judge is not None else up.bits
    records, *places = packing.records([*inner.values()], down, rest, nested, padded_N, padded_D)
    parts = {f"{name}_units": packing.units(matrix, padded_N) for name, matrix in inner.items()}
    parts |= {
        "down_units": packing.down_units(down, padded_D),
        "down": packing.with_room(packing.group_scales(down, padded_D)),
        "records": packing.with_room(records),
    }
    if judge is not None:
        parts |= _judged(judge, padded_N, padded_D)
    for name, vector in _vectors(judge, biases or Biases()).items():
        if vector is not None:
            count = padded_D if name == "down_bias" else padded_N
            parts[name] = packing.filled(vector.float(), count)
    tile = 0 if judge is None else packing.tile_bytes(parts["up"], padded_N)
    numbers = (
        width, padded_D // GROUP, padded_N, *_tile_numbers(judge), nested, rest, down.bits,
        packing.is_half(up), ACTIVATIONS.index(activation), tile, records.shape[1], *places, padded_D,
    )  # fmt: skip
    return PackedMlp(width, neurons, parts, numbers)


def _judged(judge: Judge, rows: int, columns: int) -> dict[str, Tensor]:
    """The tiles that are read to judge, and their units."""
    judged = {"up": judge.up} if judge.gate is None else {"gate": judge.gate, "up": judge.up}
    packing.check(judged, judge.planes)
    units = {f"{name}_rough_units": packing.units(m, rows) for name, m in judged.items()}
    return units | {n: packing.tiles(m, judge.planes, rows, columns) for n, m in judged.items()}


def _tile_numbers(judge: Judge | None) -> tuple[int, int, int]:
    """Bits of a code in tiles, those below them, and whether scales have 16 bits."""
    if judge is None:
        return 0, 0, 0
    return judge.planes, judge.up.bits - judge.planes, packing.is_half(judge.up)


def _vectors(judge: Judge | None, biases: Biases) -> dict[str, Tensor | None]:
    named = {"gate_bias": biases.gate_N, "up_bias": biases.up_N, "down_bias": biases.down_D}
    if judge is None:
        return named
    gate_mean_N, gate_variance_N = judge.gate_error_N or (None, None)
    up_mean_N, up_variance_N = judge.up_error_N
    return {
        **named, "size": judge.size_N, "gate_mean": gate_mean_N, "up_mean": up_mean_N,
        "gate_variance": gate_variance_N, "up_variance": up_variance_N,
    }  # fmt: skip


@dataclass(frozen=True)
class PackedMap:
    """A linear map as `pack_map` lays it out."""

    width: int
    rows: int
    parts: tuple[Tensor, Tensor, Tensor | None] = field(repr=False)
    """Tiles, units and bias."""
    numbers: tuple[int, int, int] = field(repr=False)
    """Groups, bits, and whether scales have 16 bits."""

    def __getstate__(self) -> dict[str, Any]:
        """Copies have places of their own."""
        return {name: value for name, value in vars(self).items() if name != "_map"}

    @cached_property
    def _map(self) -> tuple[int, ...]:
        groups, bits, is_half = self.numbers
        tile = packing.tile_bytes(self.parts[0], self.rows)
        return self.width, groups, self.rows, bits, is_half, tile, *map(address, self.parts)

    def __call__(self, x: Tensor) -> Tensor:
        """`x W^T + b` `[..., R]` of `x` `[..., D]`, in its dtype."""
        if not serves(x) or x.shape[-1] != self.width:
            raise ValueError(
                f"a packed map takes inputs [..., {self.width}] in fp32 or bf16 on a CPU, without gradients: "
                f"got {x.dtype} {tuple(x.shape)} on {x.device}"
            )
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self.rows))
        tokens, is_bf16 = x.numel() // self.width, x.dtype == torch.bfloat16
        places = address(x), address(y)
        made = _MAP.pack(tokens, torch.get_num_threads(), is_bf16, *places, *self._map)
        call("moefy_quantised_map", made)
        return y


def pack_map(matrix: Stored, bias_R: Tensor | None = None) -> PackedMap:
    """Lay a linear map `[R, D]` out in tiles of rows. Raises `ValueError` for what no kernel reads."""
    packing.check({"map": matrix})
    rows, width = matrix.codes_ND.shape
    padded_R, padded_D = padded(rows, GROUP), padded(width, WHOLE)
    tiles = packing.tiles(matrix, matrix.bits, padded(rows, vector_bytes() // 4), padded_D)
    bias = None if bias_R is None else packing.filled(bias_R.float(), padded_R)
    numbers = padded_D // GROUP, matrix.bits, packing.is_half(matrix)
    return PackedMap(width, rows, (tiles, packing.units(matrix, padded_R), bias), numbers)
