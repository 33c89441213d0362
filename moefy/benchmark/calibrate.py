"""Calibrate this machine: time every CPU path of a layer on a grid, for `auto` to choose by.

`moefy bench` does so by itself, coarsely and for a few seconds, where nothing is known of such a layer on
this machine; `moefy calibrate` measures the full grid. What is measured is kept by `moefy_kernels.cpu.times`, per shape, dtype and number of threads. Routing is at
random; a path that is hopeless for few tokens is not waited for with many.

Shapes: T tokens, P densities.
"""

import math
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moefy.benchmark.layers import COPIES, Layers, drawn_masks
from moefy.benchmark.timing import Run, side_by_side
from moefy.errors import MoefyError
from moefy.experts.backends import BACKENDS, able, fastest
from moefy.experts.backends.base import CPU, Request, Workload, kernel_layer
from moefy.experts.sparse_mlp import SparseMlp
from moefy.run.console import Reporter
from moefy_kernels.cpu import experts, times

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
DENSITIES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
SAMPLES = 5
COARSE_TOKENS, COARSE_DENSITIES, COARSE_SAMPLES = (1, 8, 64), (0.25, 1.0), 3
BUDGET = 5.0
"""Seconds of a coarse calibration after which what is left of the grid follows from fewer tokens."""
LONG = 0.2
"""Seconds of a call from which on one sample has to do."""
HOPELESS = 4.0
"""Times slower than the fastest: from there on a long call is taken to grow with the tokens."""


@torch.no_grad()
def calibrate(
    layers: Layers,
    *,
    tokens: Sequence[int] = TOKENS,
    densities: Sequence[float] = DENSITIES,
    samples: int = SAMPLES,
    budget: float = math.inf,
    report: Reporter | None = None,
) -> dict[str, Any]:
    """Time `layers` (of one shape) by every path that serves them; returns what was kept, and where.

    `tokens` and `densities` are the axes of the grid, rising; times are seconds of one call. After `budget`
    seconds a path is taken to take as long per token as it did with fewer.
    Raises `MoefyError` on a GPU, whose tables are checked in, and in dtypes without times of their own.
    """
    module = layers.first
    weights = module.weights
    if weights.up_ND.device.type != "cpu" or weights.up_ND.dtype not in experts.DTYPES:
        raise MoefyError(
            f"calibrate measures CPUs, in float32 or bfloat16: got {weights.up_ND.dtype} on "
            f"{weights.up_ND.device}"
        )
    shape = kernel_layer(layers.inputs_TD[0], weights, module.experts)
    mask_TE = torch.ones(1, module.experts, dtype=torch.bool)
    threads = torch.get_num_threads()
    request, work = Request(layers.inputs_TD[0], weights, mask_TE), Workload(CPU, shape, 1, 1.0)
    paths = [path for path in able(request) if BACKENDS[path].seconds(work) < math.inf]
    found = np.zeros((len(paths), len(tokens), len(densities)))
    until = time.perf_counter() + budget
    cells = [(i, j) for i in range(len(tokens)) for j in range(len(densities))]
    for i, j in cells if report is None else report.track(cells, "time every path"):
        before = found[:, i - 1, j] * tokens[i] / tokens[i - 1] if i else np.zeros(len(paths))
        known = {}
        for path, seconds in zip(paths, before, strict=True):
            late = i > 0 and time.perf_counter() > until
            if late or seconds > max(LONG, HOPELESS * before.min()):
                known[path] = float(seconds)
            elif path == "masked" and j:
                known[path] = float(found[paths.index(path), i, 0])  # computes every neuron anyway
        runs = _runs([path for path in paths if path not in known], layers, tokens[i], densities[j])
        long = max(before.min(), 0.0) > LONG
        taken = side_by_side(runs, 1 if long else samples, warmup=0 if long else 1)
        known |= {path: float(np.median(seconds)) for path, seconds in taken.items()}
        found[:, i, j] = [known[path] for path in paths]
    entry = {
        "layer": list(shape),
        "threads": threads,
        "tokens": list(tokens),
        "densities": list(densities),
        "seconds": {path: found[n].tolist() for n, path in enumerate(paths)},
        "when": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}",
    }
    file = times.keep([entry])
    fastest.cache_clear()
    return {"kind": "calibration", "what": layers.what, "file": str(file), "entry": entry}


def calibrate_unknown(modules: Sequence[SparseMlp], report: Reporter) -> dict[str, Any] | None:
    """Calibrate coarsely for layers of which nothing is known here, and say so; gives what was kept, if any.

    Layers that no CPU path but `masked` computes, and those on a GPU, need none.
    """
    weights = modules[0].weights.up_ND
    if weights.device.type != "cpu" or weights.dtype not in experts.DTYPES:
        return None
    threads = torch.get_num_threads()
    layer = kernel_layer(weights, modules[0].weights, modules[0].experts)
    if times.knows(layer, threads):
        return None
    dtype = str(weights.dtype).removeprefix("torch.")
    report.say(
        f"calibrate: first run with such layers in {dtype} and {threads} thread(s) on this machine, some "
        "seconds (--no-calibrate skips it)"
    )
    few = list(modules[:COPIES])
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(COARSE_TOKENS[-1], layer.width, generator=generator).to(weights.dtype)
    layers = Layers("coarse calibration", few, [x_TD] * len(few), synthetic=True)
    return calibrate(
        layers,
        tokens=COARSE_TOKENS,
        densities=COARSE_DENSITIES,
        samples=COARSE_SAMPLES,
        budget=BUDGET,
    )


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
