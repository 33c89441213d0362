"""How fast this machine reads memory: what every other figure of bytes per second is held against.

On a CPU all threads read buffers that no cache holds, in turn, by a sum and by a product with a vector,
and the best counts. On a GPU it is a copy, whose bytes are read and written.
"""

import time
from typing import Any

import torch
from torch import Tensor

from moefy.memory import free_memory

BUFFERS, BYTES = 4, 256 << 20
"""Buffers, and bytes of each: together several times the caches of any CPU of today."""
ROUNDS = 4
WIDTH = 4096


def read_bandwidth(device: torch.device) -> dict[str, Any]:
    """`bytes_per_second` of the fastest read, and `how` it was measured, in words.

    Buffers are smaller where memory is short.
    """
    size = BYTES
    if device.type == "cuda":
        return _copied(device, size)
    size = max(4 * WIDTH, min(size, free_memory() // (2 * BUFFERS)))
    buffers = [torch.ones(size // (4 * WIDTH), WIDTH) for _ in range(BUFFERS)]
    vector = torch.ones(WIDTH)
    best = min(_seconds(buffers, None), _seconds(buffers, vector))
    read = sum(buffer.nbytes for buffer in buffers)
    how = (
        f"{torch.get_num_threads()} threads read {BUFFERS} buffers of {buffers[0].nbytes >> 20} MB in "
        "turn: the best of sums and products with a vector"
    )
    return {"bytes_per_second": read / best, "how": how}


def _seconds(buffers: list[Tensor], vector: Tensor | None) -> float:
    """Seconds to read all buffers: the best of some rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for buffer in buffers:
            torch.sum(buffer) if vector is None else torch.mv(buffer, vector)
        best = min(best, time.perf_counter() - began)
    return best


def _copied(device: torch.device, size: int) -> dict[str, Any]:
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    how = f"a copy of {size >> 20} MB of device memory, read and written bytes"
    return {"bytes_per_second": 2 * size / best, "how": how}
