"""How weights in codes are laid out for `quantised.cpp`: tiles of rows, records of neurons, scales of their groups.

What a vector holds is decided here and read by `unpack` and `transpose` of integers.h.

Shapes: N neurons, D width, G groups of 32 inputs, R rows of a linear map, V bytes of a vector, P bytes, O outputs.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from moefy_kernels.cpu.library import vector_bytes

GROUP = 32
"""Inputs that share a scale and an offset."""
WHOLE = 64
"""Inputs that are laid out together: the largest vector."""
BITS = (2, 3, 4, 8)
"""Bits of a code."""
PLANES = (1, 2, 3, 4)
"""Top bits of it that may be read to judge."""
_ROOM = 128
"""Bytes behind the last weight, since vectors are read whole."""


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


def check(matrices: dict[str, Stored], planes: int | None = None) -> None:
    """Raise `ValueError` for matrices, by their names, that no kernel reads, or of which none reads such planes."""
    kinds = {kind for m in matrices.values() for kind in (m.scale.dtype, m.offset.dtype)}
    bits = {m.bits for name, m in matrices.items() if name != "down"}
    ready = len(kinds) == 1 and kinds <= {torch.uint8, torch.float16} and len(bits) == 1
    if (
        not ready
        or not {m.bits for m in matrices.values()} <= {*BITS}
        or (planes is not None and planes not in PLANES[: min(bits)])
    ):
        raise ValueError(
            f"packed weights have codes of {BITS} bits, of which up to {PLANES[-1]} are planes, and scales of "
            f"one kind, uint8 or fp16: got {[(m.bits, m.scale.dtype) for m in matrices.values()]}, planes: {planes}"
        )


def begins(own: Stored, stored: Stored, planes: int) -> bool:
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


def is_half(matrix: Stored) -> int:
    """1 where scales have 16 bits, 0 where they have 8."""
    return int(matrix.scale.dtype == torch.float16)


def tile_bytes(tiles: Tensor, rows: int) -> int:
    """Bytes of each of the tiles of so many rows."""
    return (tiles.numel() - _ROOM) // -(-rows // (vector_bytes() // 4))


def padded(number: int, grain: int) -> int:
    """The next multiple of `grain`."""
    return -(-number // grain) * grain


def _block(value: Tensor, rows: int, columns: int) -> Tensor:
    """Filled up with zeros to `[rows, columns]`."""
    return pad(value, (0, columns - value.shape[1], 0, rows - value.shape[0]))


def filled(vector: Tensor, count: int) -> Tensor:
    """Filled up with zeros to `count` numbers."""
    return pad(vector, (0, count - len(vector))).contiguous()


def with_room(value: Tensor) -> Tensor:
    """In one piece, with bytes behind it that may be read."""
    return pad(value.flatten(), (0, _ROOM))


def units(matrix: Stored, outputs: int) -> Tensor:
    """What a scale and an offset of 1 stand for, by output `[2, O]`."""
    if matrix.most_O is None:
        return torch.ones(2, outputs)
    return _block(matrix.most_O.float() / 255, 2, outputs).contiguous()


def down_units(down: Stored, columns: int) -> Tensor:
    """The same for down; that of an offset over that of a scale."""
    scale_D, offset_D = units(down, columns)
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


def tiles(matrix: Stored, bits: int, rows: int, columns: int) -> Tensor:
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
    return with_room(torch.cat([packed, *scales], -1))


def records(
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


def group_scales(down: Stored, columns: int) -> Tensor:
    """Scales and offsets of every 32 neurons."""
    return torch.cat([_bytes(_block(s, len(s), columns)) for s in (down.scale, down.offset)], 1)
