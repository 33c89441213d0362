"""Block sizes and warps of every kernel: measured ones where there are any, else an analytic default.

A configuration is found by dtype, width and size of the experts, never by the number of tokens: nothing
is looked for again when a batch changes, and a shape that no table knows gets the default without a word.

Shapes: D width, F neurons per expert.
"""

import functools
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from moefy_kernels.measured import device_name, table

Config = dict[str, int]
"""Constants of a kernel and its `num_warps` and `num_stages`, as they are passed to the launch.

`per_processor` is how many programs of a kernel that walks its work lie on a processor.
"""


def chosen(kernel: str, x: Tensor, size: int) -> Config:
    """The configuration of a kernel for inputs like `x [T, D]` and experts of `size` neurons."""
    width = x.shape[-1]
    known = table(device_name(x.device))["kernels"].get(kernel, {})
    measured = known.get(shape_class(width, size, x.dtype))
    return measured if measured is not None else analytic(kernel, width, size, x.dtype)


def shape_class(width: int, size: int, dtype: torch.dtype) -> str:
    """What a table knows a shape by: `bfloat16 4096x32`."""
    return f"{str(dtype).removeprefix('torch.')} {width}x{size}"


@functools.cache
def analytic(kernel: str, width: int, size: int, dtype: torch.dtype) -> Config:
    """The default: every thread has several loads of 16 bytes under way, and no register spills."""
    return ANALYTIC[kernel](width, size, dtype.itemsize)


def _decode_hidden(width: int, size: int, bytes_: int) -> Config:
    # Two accumulators of R x D fp32 values over four warps: 64 registers.
    block = min(1024 // bytes_, triton.next_power_of_2(width))
    return {"BLOCK_R": 8, "BLOCK_D": max(16, block), "num_warps": 4, "num_stages": 1}


def _decode_down(width: int, size: int, bytes_: int) -> Config:
    # 128 bytes of every row, the least that a GPU fetches whole.
    block = min(128 // bytes_, triton.next_power_of_2(width))
    return {"BLOCK_R": 64, "BLOCK_D": max(16, block), "num_warps": 4, "num_stages": 1}


def _routing_route(width: int, size: int, bytes_: int) -> Config:
    return {**_decode_hidden(width, size, bytes_), "BLOCK_R": 4}


def _union_hidden(width: int, size: int, bytes_: int) -> Config:
    # 128 bytes of 64 rows of each matrix, three times under way: with 64 tokens all that 64 KB hold.
    # fp32 needs registers for what it multiplies, and so more threads.
    warps = 4 if bytes_ == 2 else 8
    return {"BLOCK_R": 64, "BLOCK_D": 128 // bytes_, "num_warps": warps, "num_stages": 3}


def _union_down(width: int, size: int, bytes_: int) -> Config:
    rows = 128 // bytes_
    return {"BLOCK_R": rows, "BLOCK_D": 64, "num_warps": 4, "num_stages": 4}


def _grouped_hidden(width: int, size: int, bytes_: int) -> Config:
    # Two accumulators of 32 registers. fp32 has no matrix unit and needs registers for what it multiplies.
    half = bytes_ == 2
    block = _fitting(size, 64 if half else 32)
    rows = {"BLOCK_T": 128 if half else 64, "BLOCK_F": block, "BLOCK_D": 128 // bytes_}
    return {**rows, "GROUP": 8, **_warps(block // 4)}


def _grouped_slopes(width: int, size: int, bytes_: int) -> Config:
    # Three accumulators, and two passes whose addresses all stay in registers.
    block = _fitting(size, 32 if bytes_ == 2 else 16)
    return {"BLOCK_T": 64, "BLOCK_F": block, "BLOCK_D": 128 // bytes_, "GROUP": 8, **_warps(4)}


def _grouped_scatter(width: int, size: int, bytes_: int) -> Config:
    # Every element of the accumulator has an address when it is added to the output, and so it is small.
    half = bytes_ == 2
    block = _fitting(size, 64 if half else 32)
    sized = _warps(block // 4)
    tile = 16 * sized["num_warps"] if half else 64
    # A sum of one block has nothing to load ahead but the next tile, whose addresses cost registers.
    sized["num_stages"] = 3 if size > block else 1
    # A block of weights is to give every thread 16 bytes, also where a warp has 64 threads.
    wide = 128 if block * bytes_ == 32 else 64
    return {"BLOCK_T": tile, "BLOCK_F": block, "BLOCK_D": wide, **sized}


def _grouped_outer(width: int, size: int, bytes_: int) -> Config:
    half = bytes_ == 2
    block = _fitting(size, 64 if half else 32)
    if half:
        rows = {"BLOCK_T": 64, "BLOCK_F": block, "BLOCK_D": 128}
        return {**rows, "num_warps": min(8, block // 4), "num_stages": 3}
    # Both sides of a product lie across it, which the units of a Hopper refuse in TF32: at 64 columns
    # they would be fed by narrow loads, at 32 the older instruction takes their place.
    return {"BLOCK_T": 32, "BLOCK_F": block, "BLOCK_D": 32, "num_warps": 4, "num_stages": 3}


def _warps(wanted: int) -> Config:
    # As many as load 16 bytes a thread of a block of weights; sixteen of them on a processor.
    warps = min(8, wanted)
    return {"num_warps": warps, "num_stages": 3, "per_processor": 16 // warps}


def _fitting(size: int, most: int) -> int:
    """A block for a side of `size`; matrix units take no less than 16."""
    return max(16, min(most, int(triton.next_power_of_2(size))))


ANALYTIC: dict[str, Callable[[int, int, int], Config]] = {
    "decode_hidden": _decode_hidden,
    "decode_down": _decode_down,
    "routing_route": _routing_route,
    "union_hidden": _union_hidden,
    "union_down": _union_down,
    "grouped_hidden": _grouped_hidden,
    "grouped_scatter": _grouped_scatter,
    "grouped_slopes": _grouped_slopes,
    "grouped_outer": _grouped_outer,
}
