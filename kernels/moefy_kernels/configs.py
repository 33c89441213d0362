"""Block sizes and warps of every kernel: measured ones where there are any, else an analytic default.

`tables/<device>.json` holds what was measured on a device: `{kernel: {shape class: parameters}}`. A shape
class is dtype, width and size of the experts, never the number of tokens, so nothing is looked for again
when a batch changes, and a shape that no table knows gets the default without a word.

Shapes: D width, F neurons per expert.
"""

import functools
import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

import torch
import triton
from torch import Tensor

Config = dict[str, int]
"""Constants of a kernel and its `num_warps` and `num_stages`, as they are passed to the launch."""


def chosen(kernel: str, x: Tensor, size: int) -> Config:
    """The configuration of a kernel for inputs like `x [T, D]` and experts of `size` neurons."""
    width = x.shape[-1]
    device = torch.cuda.get_device_name(x.device) if x.is_cuda else "none"
    measured = table(device).get(kernel, {}).get(shape_class(width, size, x.dtype))
    return measured if measured is not None else analytic(kernel, width, size, x.dtype)


def shape_class(width: int, size: int, dtype: torch.dtype) -> str:
    """What a table knows a shape by: `bfloat16 4096x32`."""
    return f"{str(dtype).removeprefix('torch.')} {width}x{size}"


@functools.cache
def table(device: str) -> dict[str, dict[str, Config]]:
    """The table of a device, empty where there is none."""
    file = files("moefy_kernels") / "tables" / f"{device.replace(' ', '_')}.json"
    if not file.is_file():
        return {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found["kernels"]  # type: ignore[no-any-return]


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
    # 128 bytes of 64 rows of each matrix, four times under way.
    return {"BLOCK_R": 64, "BLOCK_D": 128 // bytes_, "num_warps": 4, "num_stages": 4}


def _union_down(width: int, size: int, bytes_: int) -> Config:
    return {"BLOCK_R": 64, "BLOCK_D": 64, "num_warps": 4, "num_stages": 4}


ANALYTIC: dict[str, Callable[[int, int, int], Config]] = {
    "decode_hidden": _decode_hidden,
    "decode_down": _decode_down,
    "routing_route": _routing_route,
    "union_hidden": _union_hidden,
    "union_down": _union_down,
}
