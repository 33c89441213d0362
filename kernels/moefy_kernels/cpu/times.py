"""What computing a layer on this CPU costs by every path: measured where it was calibrated, else expected.

`moefy bench` times every path on a grid of tokens and densities with routing at random (`moefy calibrate`: on
a finer one), and keeps the medians per layer shape, dtype and number of threads in

    $XDG_CACHE_HOME/moefy/times-<machine>.json

Between the points of the grid times are interpolated, both axes and the times as logarithms; beyond the most
tokens a path takes as long per token. A shape that was not measured takes the times of the most similar
one, scaled by its weights. Without any calibration bytes, arithmetic and calls decide, with rates that are
guesses about a machine of today.

Shapes: T tokens, D width, E experts.
"""

import bisect
import functools
import hashlib
import json
import math
import platform
import warnings
from pathlib import Path
from typing import Any

from moefy_kernels import roofline
from moefy_kernels.cpu.library import instruction_set
from moefy_kernels.cpu.private import cache
from moefy_kernels.roofline import Layer

PATHS = ("masked", "views", "native")
ALIKE = 1.0
"""Up to this distance (`_distance`) what was measured of one layer is taken for another without a thought."""
FEW = 16
"""Up to so many tokens the weights that have to be read decide, above it the arithmetic."""
BANDWIDTH, FLOPS = 10e9, 40e9
"""Bytes and fp32 operations a second and thread, where nothing was measured."""
REACHED = {"masked": (0.6, 0.8), "views": (0.6, 0.6), "native": (0.9, 0.7)}
"""Shares of both that a path is taken to reach."""
SKINNY = 64
"""Up to so many tokens torch's products reach less than half of the arithmetic that they do of a prompt."""
CALL = {"masked": 2e-5, "views": 4e-5, "native": 2e-5}
"""Seconds of every call; `views` calls again for every expert."""


def seconds(
    path: str, layer: Layer, tokens: int, density: float, share: float | None, threads: int
) -> float:
    """The time of `path` for a layer; `share` is that of the experts that any token runs."""
    if share is not None and tokens <= FEW:
        # Routing at random that runs as many experts in all reads as much.
        density = 1 - (1 - min(share, 1.0)) ** (1 / tokens)
    known = [entry for entry in calibration() if _similar(entry, layer, threads)]
    if not known:
        return _expected(path, layer, tokens, density, threads)
    entry = min(known, key=lambda entry: _distance(entry, layer))
    shape = Layer(*entry["layer"])
    if path not in entry["seconds"]:
        return math.inf
    return _interpolated(entry, path, tokens, density) * layer.parameters / shape.parameters


def knows(layer: Layer, threads: int) -> bool:
    """Whether a layer like this one was measured, in its dtype and with so many threads."""
    known = (entry for entry in calibration() if _similar(entry, layer, threads))
    return any(_distance(entry, layer) <= ALIKE for entry in known)


@functools.cache
def calibration() -> list[dict[str, Any]]:
    """What was measured on this machine: `layer`, `threads`, `tokens`, `densities`, `seconds` by path."""
    path = calibration_file()
    if not path.is_file():
        return []
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["entries"]
        for entry in entries:
            Layer(*entry["layer"])
            _ = entry["threads"], entry["tokens"], entry["densities"], entry["seconds"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(
            f"{path}: damaged ({type(error).__name__}), so times are guessed; measure them with moefy "
            "calibrate",
            stacklevel=2,
        )
        return []
    return entries


def keep(entries: list[dict[str, Any]]) -> Path:
    """Write what was measured, in place of what was known of the same shapes; gives the file."""
    path = calibration_file()
    new = {_key(entry) for entry in entries}
    kept = [entry for entry in calibration() if _key(entry) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_suffix(".unfinished")
    work.write_text(json.dumps({"entries": kept + entries}, indent=1), encoding="utf-8")
    work.replace(path)
    calibration.cache_clear()
    return path


def calibration_file() -> Path:
    """Where this machine's times are kept; machines that share a home have files of their own."""
    machine = repr((platform.node(), platform.machine(), instruction_set()))
    return cache() / f"times-{hashlib.sha256(machine.encode()).hexdigest()[:12]}.json"


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return (*entry["layer"], entry["threads"])


def _similar(entry: dict[str, Any], layer: Layer, threads: int) -> bool:
    shape = Layer(*entry["layer"])
    return entry["threads"] == threads and shape.itemsize == layer.itemsize


def _distance(entry: dict[str, Any], layer: Layer) -> float:
    """How unlike two layers are: in what a call costs beside the arithmetic, then in size."""
    shape = Layer(*entry["layer"])
    return (
        abs(math.log(shape.size / layer.size))
        + abs(math.log(shape.parameters / layer.parameters))
        + abs(shape.matrices - layer.matrices)
    )


def _interpolated(entry: dict[str, Any], path: str, tokens: int, density: float) -> float:
    log_T = [math.log(value) for value in entry["tokens"]]
    log_P = [math.log(value) for value in entry["densities"]]
    at_T = [
        _between(math.log(max(density, 1e-6)), log_P, [math.log(value) for value in seconds_P])
        for seconds_P in entry["seconds"][path]
    ]
    most: float = entry["tokens"][-1]
    return max(1.0, tokens / most) * math.exp(_between(math.log(tokens), log_T, at_T))


def _between(at: float, grid: list[float], values: list[float]) -> float:
    """Linear interpolation on a rising grid; outside of it the value at its end."""
    right = min(max(bisect.bisect(grid, at), 1), len(grid) - 1) if len(grid) > 1 else 0
    left = max(right - 1, 0)
    width = (grid[right] - grid[left]) or 1.0
    share = min(max((at - grid[left]) / width, 0.0), 1.0)
    return values[left] + share * (values[right] - values[left])


def _expected(path: str, layer: Layer, tokens: int, density: float, threads: int) -> float:
    share = 1.0 if path == "masked" else roofline.union_share(density, tokens)
    computed = 1.0 if path == "masked" else density
    bandwidth, flops = REACHED[path]
    if path != "native" and tokens <= SKINNY:
        flops *= 0.4
    calls = max(1.0, share * layer.experts) if path == "views" else 1.0
    moved = layer.reads(share, tokens) / (bandwidth * BANDWIDTH * threads)
    counted = 2 * tokens * computed * layer.parameters / (flops * FLOPS * threads)
    return calls * CALL[path] + max(moved, counted)
