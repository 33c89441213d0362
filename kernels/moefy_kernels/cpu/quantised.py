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
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from moefy_kernels.cpu.experts import DTYPES, address
from moefy_kernels.cpu.library import available, call, vector_bytes
from moefy_kernels.expert_mlp import ACTIVATIONS

GROUP = 32
"""Inputs that share a scale and an offset."""
BITS = (2, 3, 4, 8)
"""Bits of a code."""
PLANES = (0, 1, 2, 3, 4)
"""Top bits of it that may be read to judge."""
MOST = 16
"""Tokens up to which reading the weights is what decides."""
_WHOLE = 64
"""Inputs that are laid out together: the largest vector."""
_ROOM = 128
"""Bytes behind the last weight, since vectors are read whole."""
_CALL, _LAYER = struct.Struct("3q5Pq"), struct.Struct("16q17P")
"""The two halves of `QuantisedArguments` in quantised.cpp."""
_MAP = struct.Struct("3q2P6q3P")
"""`QuantisedMap` in quantised.cpp."""


class Stored(Protocol):
    """A matrix `[N, D]` on a grid, as `moefy.models.quantised.Quantised` is: `scale * code - offset`."""

    @property
    def codes_ND(self) -> Tensor:
        """uint8, from 0 to `2**bits - 1`."""
        ...

    @property
    def scale(self) -> Tensor:
        """`[N, G]`, or `[G, D]` in groups along neurons: fp16, or uint8 in 255ths of `most_O[0]`."""
        ...

    @property
    def offset(self) -> Tensor:
        """As `scale`, of `most_O[1]`."""
        ...

    @property
    def bits(self) -> int:
        """Bits of a code."""
        ...

    @property
    def most_O(self) -> Tensor | None:
        """fp16 `[2, O]`: the largest scale and offset of an output."""
        ...


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
            own is not None and stored is not None and _begins(own, stored, self.planes)
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
        """Output `[T, D]` in the dtype of `x_TD`, of the neurons above the threshold, or in the mask."""
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
        missing = self.numbers[2] - mask_TN.shape[1]
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
            threshold_T = threshold_T.float().contiguous()
        places = map(address, (x_TD, y_TD, runs_TN, scores_TN, threshold_T))
        decided = runs_TN is not None and threshold_T is None
        is_bf16 = x_TD.dtype == torch.bfloat16
        made = _CALL.pack(len(x_TD), torch.get_num_threads(), is_bf16, *places, decided)
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
    judged: dict[str, Stored] = {}
    if judge is not None:
        judged = {"up": judge.up} if judge.gate is None else {"gate": judge.gate, "up": judge.up}
        _check(judge.planes, judged)
    _check(0, {**inner, "down": down})
    neurons, width = up.codes_ND.shape
    padded_N, padded_D = _up(neurons, GROUP), _up(width, _WHOLE)
    parts = {"down_units": _down_units(down, padded_D)}
    parts |= {f"{name}_units": _units(matrix, padded_N) for name, matrix in inner.items()}
    for name, matrix in judged.items():
        assert judge is not None
        parts[f"{name}_rough_units"] = _units(matrix, padded_N)
        parts[name] = _tiles(matrix, judge.planes, padded_N, padded_D)
    for name, vector in _vectors(judge, biases or Biases()).items():
        if vector is not None:
            parts[name] = _filled(vector.float(), padded_D if name == "down_bias" else padded_N)
    nested = judge is not None and judge.nested(gate, up)
    rest = up.bits - judge.planes if nested and judge is not None else up.bits
    records, *places = _records(list(inner.values()), down, rest, nested, padded_N, padded_D)
    parts |= {"records": _with_room(records), "down": _with_room(_group_scales(down, padded_D))}
    numbers = (
        width, padded_D // GROUP, padded_N, *_tile_numbers(judge), nested, rest, down.bits, _is_half(up),
        ACTIVATIONS.index(activation), _tile_bytes(parts["up"], padded_N) if judged else 0,
        records.shape[1], *places, padded_D,
    )  # fmt: skip
    return PackedMlp(width, neurons, parts, numbers)


def _tile_numbers(judge: Judge | None) -> tuple[int, int, int]:
    """Bits of a code in tiles, those below them, and whether scales have 16 bits."""
    return (
        (0, 0, 0)
        if judge is None
        else (judge.planes, judge.up.bits - judge.planes, _is_half(judge.up))
    )


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
        tile = _tile_bytes(self.parts[0], self.rows)
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
    _check(0, {"map": matrix})
    rows, width = matrix.codes_ND.shape
    padded_R, padded_D = _up(rows, GROUP), _up(width, _WHOLE)
    tiles = _tiles(matrix, matrix.bits, _up(rows, vector_bytes() // 4), padded_D)
    bias = None if bias_R is None else _filled(bias_R.float(), padded_R)
    numbers = padded_D // GROUP, matrix.bits, _is_half(matrix)
    return PackedMap(width, rows, (tiles, _units(matrix, padded_R), bias), numbers)


def _check(planes: int, matrices: dict[str, Stored]) -> None:
    kinds = {kind for m in matrices.values() for kind in (m.scale.dtype, m.offset.dtype)}
    bits = {m.bits for name, m in matrices.items() if name != "down"}
    ready = len(kinds) == 1 and kinds <= {torch.uint8, torch.float16} and len(bits) == 1
    if (
        not ready
        or not {m.bits for m in matrices.values()} <= {*BITS}
        or planes not in PLANES[: min(bits) + 1]
    ):
        raise ValueError(
            f"packed weights have codes of {BITS} bits, of which up to {PLANES[-1]} are planes, and scales of "
            f"one kind, uint8 or fp16: got {[(m.bits, m.scale.dtype) for m in matrices.values()]}, {planes} planes"
        )


def _begins(own: Stored, stored: Stored, planes: int) -> bool:
    """Whether codes of one matrix begin with `planes` bits of those of another, on the same grid."""
    same = own.bits == stored.bits and (own.most_O is None) == (stored.most_O is None)
    if own.most_O is not None and stored.most_O is not None:
        same = same and torch.equal(own.most_O, stored.most_O)
    rest = own.bits - planes
    return (
        same
        and torch.equal(own.scale, stored.scale)
        and torch.equal(own.offset, stored.offset)
        and torch.equal(own.codes_ND >> rest, stored.codes_ND >> rest)
    )


def _is_half(matrix: Stored) -> int:
    return int(matrix.scale.dtype == torch.float16)


def _tile_bytes(tiles: Tensor, rows: int) -> int:
    """Bytes of each of the tiles of so many rows."""
    return (tiles.numel() - _ROOM) // -(-rows // (vector_bytes() // 4))


def _up(number: int, grain: int) -> int:
    return -(-number // grain) * grain


def _block(value: Tensor, rows: int, columns: int) -> Tensor:
    """Filled up with zeros to `[rows, columns]`."""
    return pad(value, (0, columns - value.shape[1], 0, rows - value.shape[0]))


def _filled(vector: Tensor, count: int) -> Tensor:
    return pad(vector, (0, count - len(vector))).contiguous()


def _with_room(value: Tensor) -> Tensor:
    return pad(value.flatten(), (0, _ROOM))


def _units(matrix: Stored, outputs: int) -> Tensor:
    """What a scale and an offset of 1 stand for, by output `[2, O]`."""
    if matrix.most_O is None:
        return torch.ones(2, outputs)
    return _block(matrix.most_O.float() / 255, 2, outputs).contiguous()


def _down_units(down: Stored, columns: int) -> Tensor:
    """The same for down; that of an offset over that of a scale."""
    scale_D, offset_D = _units(down, columns)
    return torch.stack([scale_D, torch.where(scale_D > 0, offset_D / scale_D, 0)])


def _bytes(value: Tensor) -> Tensor:
    """The bytes of the last dimension."""
    return value.contiguous().view(torch.uint8)


def _fields(codes: Tensor, bits: int) -> Tensor:
    """Codes `[..., V]` in bytes `[..., V bits / 8]`, as `unpack` of integers.h reads them."""
    if bits not in (1, 2, 4, 8):
        rest = bits - (4 if bits > 4 else 2)
        low = codes & (2**rest - 1)
        return torch.cat([_fields(codes >> rest, bits - rest), _fields(low, rest)], -1)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    parts = codes.unflatten(-1, (8 // bits, -1)) << shifts[:, None]
    packed: Tensor = parts.sum(-2, dtype=torch.uint8)
    return packed


def _tiles(matrix: Stored, bits: int, rows: int, columns: int) -> Tensor:
    """The top bits in tiles of as many rows as a vector has lanes: codes, scales and offsets, group by group.

    A vector holds four inputs of every row of its tile.
    """
    lanes = vector_bytes() // 4
    codes = _block(matrix.codes_ND >> (matrix.bits - bits), rows, columns)
    fours = codes.view(rows // lanes, lanes, columns // GROUP, 8, 4).permute(0, 2, 3, 1, 4)
    packed = _fields(fours.flatten(-2), bits).flatten(-2)
    scales = [
        _bytes(_block(s, rows, columns // GROUP).view(rows // lanes, lanes, -1).transpose(1, 2))
        for s in (matrix.scale, matrix.offset)
    ]
    return _with_room(torch.cat([packed, *scales], -1))


def _records(
    inner: list[Stored], down: Stored, rest: int, nested: bool, rows: int, columns: int
) -> tuple[Tensor, int, int]:
    """What is read of a neuron that runs `[N, P]`, and where its scales and its row of down begin."""
    grain, parts = vector_bytes(), []
    for matrix in inner if rest else []:
        low = _block(matrix.codes_ND & (2**rest - 1), rows, columns)
        parts.append(_fields(low.unflatten(1, (-1, grain)), rest).flatten(1))
    scales_at = sum(part.shape[1] for part in parts)
    kinds = [[matrix.scale for matrix in inner], [matrix.offset for matrix in inner]]
    for kind in kinds[:1] if nested else kinds:
        parts += [_bytes(_block(value, rows, columns // GROUP)) for value in kind]
    down_at = sum(part.shape[1] for part in parts)
    # The order in which `transpose` gives them back in turn.
    blocks = _block(down.codes_ND, rows, columns).unflatten(1, (-1, 4, grain // 16, 4))
    ordered = blocks.transpose(2, 3).flatten(2)
    parts.append(_fields(ordered, down.bits).flatten(1))
    record = torch.cat(parts, 1)
    return pad(record, (0, -record.shape[1] % 64)), scales_at, down_at


def _group_scales(down: Stored, columns: int) -> Tensor:
    """Scales and offsets of every 32 neurons."""
    return torch.cat([_bytes(_block(s, len(s), columns)) for s in (down.scale, down.offset)], 1)
