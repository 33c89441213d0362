"""Calibrate this machine: time every CPU path of a layer on a grid, for `auto` to choose by.

What is measured is kept by `moefy_kernels.cpu.times`, per shape, dtype and number of threads. Routing is at
random; a path that is hopeless for few tokens is not waited for with many.

Shapes: T tokens, P densities.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moefy import cpu_backend
from moefy.bench.layers import Layers, drawn_masks
from moefy.bench.timing import Run, side_by_side
from moefy.console import Reporter
from moefy.errors import MoefyError
from moefy.sparse_mlp import LEAST_VIEW, ON_CPU
from moefy_kernels import dispatch
from moefy_kernels.cpu import experts, times

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
DENSITIES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
SAMPLES = 5
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
    report: Reporter | None = None,
) -> dict[str, Any]:
    """Time `layers` (of one shape) by every path that serves them; returns what was kept, and where.

    `tokens` and `densities` are the axes of the grid, rising; times are seconds of one call.
    Raises `MoefyError` on a GPU, whose tables are checked in, and in dtypes without times of their own.
    """
    module = layers.first
    weights = module.weights
    if weights.up_ND.device.type != "cpu" or weights.up_ND.dtype not in experts.DTYPES:
        raise MoefyError(
            f"--calibrate measures CPUs, in float32 or bfloat16: got {weights.up_ND.dtype} on "
            f"{weights.up_ND.device}"
        )
    shape = module.kernel_layer(layers.inputs_TD[0], weights)
    serves = {
        "views": module.expert_size >= LEAST_VIEW,
        "native": cpu_backend.fits(layers.inputs_TD[0], weights),
    }
    paths = [path for path in ON_CPU if serves.get(path, True)]
    found = np.zeros((len(paths), len(tokens), len(densities)))
    cells = [(i, j) for i in range(len(tokens)) for j in range(len(densities))]
    for i, j in cells if report is None else report.track(cells, "time every path"):
        before = found[:, i - 1, j] * tokens[i] / tokens[i - 1] if i else np.zeros(len(paths))
        known = {}
        for path, seconds in zip(paths, before, strict=True):
            if seconds > max(LONG, HOPELESS * before.min()):
                known[path] = float(seconds)
            elif path == "masked" and j:
                known[path] = float(found[paths.index(path), i, 0])  # computes every neuron anyway
        runs = _runs([path for path in paths if path not in known], layers, tokens[i], densities[j])
        long = max(before.min(), 0.0) > LONG
        taken = side_by_side(runs, 1 if long else SAMPLES, warmup=0 if long else 1)
        known |= {path: float(np.median(seconds)) for path, seconds in taken.items()}
        found[:, i, j] = [known[path] for path in paths]
    entry = {
        "layer": list(shape),
        "threads": torch.get_num_threads(),
        "tokens": list(tokens),
        "densities": list(densities),
        "seconds": {path: found[n].tolist() for n, path in enumerate(paths)},
        "when": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}",
    }
    file = times.keep([entry])
    dispatch.choose.cache_clear()
    return {"kind": "calibration", "what": layers.what, "file": str(file), "entry": entry}


def _runs(paths: list[str], layers: Layers, tokens: int, density: float) -> dict[str, Run]:
    masks = drawn_masks(layers.modules, tokens, density)
    # Only a batch of which one layer's weights would stay in a cache needs several layers.
    count = len(layers.modules) if tokens <= times.FEW else 1

    def call(path: str, n: int) -> Callable[[], Tensor]:
        x_TD = layers.inputs_TD[n]
        repeats = -(-tokens // len(x_TD))
        x_TD = x_TD.repeat(repeats, 1)[:tokens].contiguous()
        return partial(ON_CPU[path], x_TD, layers.modules[n].weights, masks[n])

    return {path: Run([call(path, n) for n in range(count)]) for path in paths}
