"""Seconds of several runs side by side, and whether two of them differ by more than noise.

Runs take turns in an order that changes with every sample, so that drift and neighbours hit all alike.
What is compared are medians; their error is found by drawing whole samples again, the same ones of both
runs (a paired bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

`read_bandwidth` is what every other figure of bytes per second is held against. On a CPU all threads read
buffers that no cache holds, in turn, by a sum and by a product with a vector, and the best counts. On a
GPU it is a copy, whose bytes are read and written.

Shapes: G samples, C calls of a sample, R resamples.
"""

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moefy.evaluation.statistics import ends, resampled
from moefy.run.memory import free_memory

Seconds = NDArray[np.float64]
LEAST_SAMPLES = 5
"""With fewer, resampling finds too little noise: 4 equal values are not rare."""
WARMUP = 2
CONFIDENCE = 0.99
"""Of many rows of a table one in a hundred that is called different need not be."""
FLOOR = 0.01
"""No interval is narrower to either side: where memory happens to lie does not change within a run, so
that no resampling of it shows what another run would give."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Run:
    """Calls that are made one after the other and timed one by one."""

    calls: Sequence[Callable[[], object]]
    before: Callable[[], object] = _nothing
    """Brings back the state that the calls start from; not timed."""

    def __call__(self) -> list[object]:
        """What the calls return, from the state they start from."""
        self.before()
        return [call() for call in self.calls]


def side_by_side(
    runs: Mapping[str, Run], samples: int, *, warmup: int = WARMUP, seed: int = 0
) -> dict[str, Seconds]:
    """Seconds `[G, C]` of every call of every run, after `warmup` samples that are thrown away."""
    for run in runs.values():
        for _ in range(warmup):
            run()
    order = random.Random(seed)
    taken: dict[str, list[list[float]]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for _ in range(samples):
            for name in order.sample(list(runs), len(runs)):
                runs[name].before()
                taken[name].append(_timed(runs[name].calls))
    finally:
        gc.enable()
    return {name: np.array(rows) for name, rows in taken.items()}


def _timed(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of each call; on a GPU by its own clock, so that no call waits for the host."""
    if not torch.cuda.is_available():
        marks = [time.perf_counter()]
        for call in calls:
            call()
            marks.append(time.perf_counter())
        return [end - begin for begin, end in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for call, event in zip(calls, events[1:], strict=True):
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


def percentiles(seconds: Seconds) -> dict[str, float]:
    """`p50` (the median) and `p95` of all calls."""
    return {f"p{share}": float(np.quantile(seconds, share / 100)) for share in (50, 95)}


@dataclass(frozen=True)
class Ratio:
    """How many times faster one run is than another, and between what the noise leaves it."""

    value: float
    low: float
    high: float

    @property
    def is_none(self) -> bool:
        """Whether the two may well be equally fast."""
        return self.low <= 1 <= self.high

    def record(self) -> dict[str, Any]:
        """JSON values; `speedup` is None where there is no difference, `ratio` what was measured."""
        speedup = None if self.is_none else self.value
        return {"speedup": speedup, "ratio": self.value, "interval": [self.low, self.high]}


def speedup(run_GC: Seconds, base_GC: Seconds, seed: int = 0) -> Ratio:
    """The median of `base` over that of `run`, with the interval of this ratio."""
    at_RG = resampled(len(run_GC), seed)
    value = float(np.median(base_GC) / np.median(run_GC))
    drawn_R = np.median(base_GC[at_RG], axis=(1, 2)) / np.median(run_GC[at_RG], axis=(1, 2))
    low, high = ends(value, drawn_R, level=CONFIDENCE)
    least = 1 + FLOOR
    return Ratio(value, min(float(low), value / least), max(float(high), value * least))


BUFFERS, BYTES = 4, 256 << 20
"""Buffers, and bytes of each: together several times the caches of any CPU of today."""
ROUNDS = 4
WIDTH = 4096


def read_bandwidth(device: torch.device) -> dict[str, Any]:
    """`bytes_per_second` of the fastest read, and `how` it was measured, in words.

    Buffers are smaller where memory is short.
    """
    passes: list[list[Callable[[], object]]]
    if device.type == "cuda":
        source = torch.empty(BYTES, dtype=torch.uint8, device=device)
        passes, size = [[partial(torch.empty_like(source).copy_, source)]], 2 * source.nbytes
        how = f"a copy of {BYTES >> 20} MB of device memory, read and written bytes"
    else:
        rows = max(1, min(BYTES, free_memory() // (2 * BUFFERS)) // (4 * WIDTH))
        buffers, vector = [torch.ones(rows, WIDTH) for _ in range(BUFFERS)], torch.ones(WIDTH)
        passes = [[partial(torch.sum, buffer) for buffer in buffers]]
        passes += [[partial(torch.mv, buffer, vector) for buffer in buffers]]
        size = sum(buffer.nbytes for buffer in buffers)
        how = (
            f"{torch.get_num_threads()} threads read {BUFFERS} buffers of {buffers[0].nbytes >> 20} MB in "
            "turn: the best of sums and products with a vector"
        )
    best = min(sum(_timed(calls)) for calls in passes for _ in range(ROUNDS))
    return {"bytes_per_second": size / best, "how": how}
