"""Calibrate this machine: time every CPU path of a layer on a grid, for `auto` to choose by.

`moefy bench` does so by itself, coarsely and for a few seconds, where nothing is known of such a layer on
this machine; `moefy calibrate` measures the full grid. What is measured is kept by `moefy_kernels.cpu.times`,
per shape, dtype and number of threads. Routing is at random; a path that is hopeless for few tokens is not
waited for with many.

Shapes: T tokens, D width.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moefy.benchmark.layers import COPIES, Layers, drawn_masks
from moefy.benchmark.timing import Run, Seconds, side_by_side
from moefy.errors import MoefyError
from moefy.experts.backends import BACKENDS, able, fastest
from moefy.experts.backends.base import CPU, Request, Workload, kernel_layer
from moefy.experts.sparse_mlp import SparseMlp
from moefy.run.console import Reporter
from moefy_kernels.cpu import times
from moefy_kernels.cpu.experts import DTYPES

LONG = 0.2
"""Seconds of a call from which on one sample has to do."""
HOPELESS = 4.0
"""Times slower than the fastest: from there on a long call is taken to grow with the tokens."""


@dataclass(frozen=True)
class Grid:
    """What is timed; both axes rise."""

    tokens: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 512)
    densities: Sequence[float] = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
    samples: int = 5
    budget: float = math.inf
    """Seconds after which what is left of the grid follows from fewer tokens."""


COARSE = Grid(tokens=(1, 8, 64), densities=(0.25, 1.0), samples=3, budget=5.0)


@torch.no_grad()
def calibrate(
    layers: Layers, grid: Grid | None = None, report: Reporter | None = None
) -> dict[str, Any]:
    """Time `layers` (of one shape) by every path that serves them; returns what was kept, and where.

    Raises `MoefyError` on a GPU, whose tables are checked in, and in dtypes without times of their own.
    """
    grid, report = grid or Grid(), report or Reporter(quiet=True)
    experts, weights = layers.first.experts, layers.first.weights
    if weights.up_ND.device.type != CPU or weights.up_ND.dtype not in DTYPES:
        raise MoefyError(
            f"calibration measures CPUs, in float32 or bfloat16: got {weights.up_ND.dtype} on "
            f"{weights.up_ND.device}"
        )
    shape = kernel_layer(layers.inputs_TD[0], weights, experts)
    request = Request(layers.inputs_TD[0], weights, torch.ones(1, experts, dtype=torch.bool))
    work = Workload(CPU, shape, 1, 1.0)
    paths = [path for path in able(request) if BACKENDS[path].seconds(work) < math.inf]
    seconds = _times(paths, layers, grid, report)
    entry = {
        "layer": list(shape),
        "threads": torch.get_num_threads(),
        "tokens": list(grid.tokens),
        "densities": list(grid.densities),
        "seconds": {path: seconds[n].tolist() for n, path in enumerate(paths)},
        "when": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}",
    }
    file = times.keep([entry])
    fastest.cache_clear()
    return {"kind": "calibration", "what": layers.what, "file": str(file), "entry": entry}


def _times(paths: list[str], layers: Layers, grid: Grid, report: Reporter) -> Seconds:
    """Seconds of one call by path, tokens and densities."""
    seconds = np.zeros((len(paths), len(grid.tokens), len(grid.densities)))
    until = time.perf_counter() + grid.budget
    places = list(product(enumerate(grid.tokens), enumerate(grid.densities)))
    for (i, tokens), (j, density) in report.track(places, "time every path"):
        expected = seconds[:, i - 1, j] * tokens / grid.tokens[i - 1] if i else np.zeros(len(paths))
        late = i > 0 and time.perf_counter() > until
        long = max(LONG, HOPELESS * expected.min())
        left = {}
        for n, path in enumerate(paths):
            if late or expected[n] > long:
                seconds[n, i, j] = expected[n]
            elif path == "masked" and j:
                seconds[n, i, j] = seconds[n, i, 0]  # computes every neuron anyway
            else:
                left[path] = n
        once = expected.min() > LONG
        runs = _runs(list(left), layers, tokens, density)
        taken = side_by_side(runs, 1 if once else grid.samples, warmup=0 if once else 1)
        for path, n in left.items():
            seconds[n, i, j] = np.median(taken[path])
    return seconds


def calibrate_unknown(modules: Sequence[SparseMlp], report: Reporter) -> dict[str, Any] | None:
    """Calibrate coarsely for layers of which nothing is known here, and say so; returns the record, if any.

    Layers that no CPU path but `masked` computes, and those on a GPU, need none.
    """
    weights, mlp = modules[0], modules[0].weights
    if weights.device.type != CPU or weights.dtype not in DTYPES:
        return None
    threads = torch.get_num_threads()
    layer = kernel_layer(mlp.up_ND, mlp, weights.experts)
    if times.knows(layer, threads):
        return None
    dtype = str(weights.dtype).removeprefix("torch.")
    report.say(
        f"calibrate: first run with such layers in {dtype} and {threads} thread(s) on this machine, some "
        "seconds (--no-calibrate skips it)"
    )
    few = list(modules[:COPIES])
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(COARSE.tokens[-1], layer.width, generator=generator).to(weights.dtype)
    return calibrate(Layers("coarse calibration", few, [x_TD] * len(few), synthetic=True), COARSE)


def _runs(paths: list[str], layers: Layers, tokens: int, density: float) -> dict[str, Run]:
    masks = drawn_masks(layers.modules, tokens, density)
    # Only a batch of which one layer's weights would stay in a cache needs several layers.
    count = len(layers.modules) if tokens <= times.FEW else 1

    def call(path: str, n: int) -> Callable[[], Tensor]:
        x_TD = layers.inputs_TD[n]
        repeats = -(-tokens // len(x_TD))
        x_TD = x_TD.repeat(repeats, 1)[:tokens].contiguous()
        return partial(BACKENDS[path].compute, x_TD, layers.modules[n].weights, masks[n])

    return {path: Run([call(path, n) for n in range(count)]) for path in paths}
