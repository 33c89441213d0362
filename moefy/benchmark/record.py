"""One cell of a sweep: engines that computed the same thing, timed side by side, and what it says of them.

Shapes: R samples, C calls of a sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moefy.benchmark.engines.table import Unavailable
from moefy.benchmark.timing import WARMUP, Seconds, percentiles, speedup
from moefy.errors import MoefyError
from moefy.run.provenance import machine


@dataclass(frozen=True)
class Facts:
    """What is known of an engine in a cell before it is timed."""

    dense: bool
    error: float
    """Relative error of its output against the reference."""
    bytes: float | None
    """Bytes that one call has to move at least; None where they are not known."""
    parameters: float | None
    """Parameters that a token uses."""
    computed_by: str = ""
    """Where it is not what its name says: the backends that `auto` took."""
    kl: dict[str, float] | None = None
    """From a run in fp32, of whole models: `median`, `mean` and `largest` over tokens, in nats."""


def failed(reason: Exception) -> str:
    """Why an engine is not timed: what it said, or what torch or a library says of it."""
    if isinstance(reason, (Unavailable, MoefyError)):
        return str(reason)
    said = str(reason).strip().splitlines()
    return f"failed: {type(reason).__name__}{f': {said[0]}' if said else ''}"


def cell(
    place: Mapping[str, Any],
    seconds: Mapping[str, Seconds],
    facts: Mapping[str, Facts],
    refused: Mapping[str, str],
    bandwidth: float,
) -> dict[str, Any]:
    """The record of a cell: `place` (phase, batch, tokens of a call, ...) and a row for every engine.

    Speedups are over the fastest dense engine, `baseline`; None where no dense engine was timed. `ideal` is
    what bandwidth alone would give: the bytes of dense over `least_bytes` of `place`, those of the experts
    that run.
    """
    dense = [name for name in seconds if facts[name].dense]
    baseline = min(dense, key=lambda name: percentiles(seconds[name])["p50"], default=None)
    rows = {}
    for name, measured_RC in seconds.items():
        over: dict[str, Any] = {"speedup": None, "ratio": None, "interval": None}
        if name == baseline:
            over["ratio"] = 1.0
        elif baseline is not None:
            over = speedup(measured_RC, seconds[baseline]).record()
        rows[name] = _row(measured_RC, facts[name], over, place["tokens"], bandwidth)
    whole = [f.bytes for f in facts.values() if f.dense and f.bytes]
    return {
        **place,
        "baseline": baseline,
        "ideal": min(whole) / place["least_bytes"] if whole else None,
        "engines": rows,
        "refused": dict(refused),
    }


def _row(
    seconds: Seconds, facts: Facts, over: dict[str, Any], tokens: int, bandwidth: float
) -> dict[str, Any]:
    times = percentiles(seconds)
    per_second = None if facts.bytes is None else facts.bytes / times["p50"]
    return {
        "dense": facts.dense,
        **times,
        "tokens_per_second": tokens / times["p50"],
        **over,
        "bytes": facts.bytes,
        "of_bandwidth": None if per_second is None else per_second / bandwidth,
        "active_parameters": facts.parameters,
        "relative_error": facts.error,
        "kl": facts.kl,
        "computed_by": facts.computed_by,
        "seconds": seconds.tolist(),
    }


def break_even(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every moefied engine of a sweep over batches: the largest batch up to which it wins.

    It wins where it is faster than the best dense engine by more than the noise. `batch` is None where
    it does not win at the smallest one; `open` says that it still wins at the largest.
    """
    sweeps: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for one in cells:
        sweeps.setdefault((one["phase"], one["asked_density"]), []).append(one)
    found = []
    for (phase, _), sweep in sweeps.items():
        sweep.sort(key=lambda one: int(one["batch"]))
        density = sweep[0]["density"]
        moefied = {n: 0 for one in sweep for n, row in one["engines"].items() if not row["dense"]}
        for name in moefied:
            best, wins = None, True
            for one in sweep:
                row = one["engines"].get(name)
                wins = row is not None and row["speedup"] is not None and row["speedup"] > 1
                if not wins:
                    break
                best = one["batch"]
            found.append(
                {
                    "phase": phase,
                    "density": density,
                    "engine": name,
                    "batch": best,
                    "open": wins,
                }
            )
    return found


def record(
    level: str,
    what: str,
    cells: list[dict[str, Any]],
    *,
    dtype: torch.dtype,
    device: torch.device,
    samples: int,
    bandwidth: Mapping[str, Any],
) -> dict[str, Any]:
    """The record of a run of `moefy bench`; `docs/bench.md` says what every field means."""
    return {
        "kind": "speed",
        "level": level,
        "what": what,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "samples": samples,
        "warmup": WARMUP,
        "bandwidth": dict(bandwidth),
        "cells": cells,
        "break_even": break_even(cells),
        "machine": machine(),
    }
