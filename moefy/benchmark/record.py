"""The record of a sweep, its cells (engines that computed the same thing, side by side), and both as text.

Shapes: R samples, C calls of a sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moefy.benchmark.costs import WARMUP, Seconds, percentiles, speedup
from moefy.run.computing import machine


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
    reach = []
    for (phase, _), sweep in sweeps.items():
        sweep.sort(key=lambda one: int(one["batch"]))
        rows = [one["engines"] for one in sweep]
        for name in {n: 0 for one in rows for n, row in one.items() if not row["dense"]}:
            wins = [(one.get(name, {}).get("speedup") or 0) > 1 for one in rows]
            first = wins.index(False) if False in wins else len(wins)
            reach.append({
                "phase": phase, "density": sweep[0]["density"], "engine": name,
                "batch": sweep[first - 1]["batch"] if first else None, "open": all(wins),
            })  # fmt: skip
    return reach


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


def speed_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a speed record: every cell of the sweep, its engines fastest first.

    docs/bench.md says how to read the columns.
    """
    header = [
        "", "density", "batch", "engine", "p50 ms", "p95 ms", "tokens/s", "speedup", "MB moved",
        "of bandwidth", "active parameters", "error",
    ]  # fmt: skip
    header += ["KL"] if record.get("level") == "model" else []
    rows = []
    for cell in record["cells"]:
        place = [cell["phase"], f"{cell['density']:.3f}", str(cell["batch"])]
        ordered = sorted(cell["engines"].items(), key=lambda item: item[1]["p50"])
        for name, row in ordered:
            kl = [f"{row['kl']['median']:.0e}"] if row["kl"] else []
            rows.append([*place, *_speed_cells(name, row, cell), *kl])
            place = ["", "", ""]
        if cell["router"] is not None:
            times = [f"{cell['router'][p] * 1e3:.3f}" for p in ("p50", "p95")]
            rows.append([*place, "router alone", *times, *[""] * (len(header) - 6)])
    return header, rows


def calibration_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a calibration: the fastest path and its milliseconds, for tokens and densities."""
    entry = record["entry"]
    rows = []
    for i, tokens in enumerate(entry["tokens"]):
        cells = []
        for j in range(len(entry["densities"])):
            seconds, best = min((times[i][j], path) for path, times in entry["seconds"].items())
            cells.append(f"{best} {seconds * 1e3:.3g} ms")
        rows.append([str(tokens), *cells])
    return ["tokens", *(f"density {density:g}" for density in entry["densities"])], rows


def _speed_cells(name: str, row: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    by = f" = {row['computed_by']}" if row["computed_by"] else ""
    if name == cell["baseline"]:
        faster = "best dense"
    elif cell["baseline"] is None:
        faster = "no dense"
    else:
        low, high = row["interval"]
        speedup = "none" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        faster = f"{speedup} [{low:.2f}, {high:.2f}]"
    known = row["bytes"] is not None
    return [
        name + by,
        f"{row['p50'] * 1e3:.3f}",
        f"{row['p95'] * 1e3:.3f}",
        f"{row['tokens_per_second']:.4g}",
        faster,
        f"{row['bytes'] / 1e6:.4g}" if known else "",
        f"{row['of_bandwidth']:.0%}" if known else "",
        f"{row['active_parameters']:.3g}" if known else "",
        f"{row['relative_error']:.0e}",
    ]


def speed_lines(record: dict[str, Any]) -> list[str]:
    """What a speed table cannot say: on what, up to which batch it pays, what was not timed and why."""
    gigabytes = record["bandwidth"]["bytes_per_second"] / 1e9
    lines = [
        record["what"],
        f"{record['dtype']} on {record['device']} ({processor(record)}), {record['threads']} thread(s); "
        f"{record['samples']} samples in changing order after {record['warmup']} of warm-up",
        f"bandwidth {gigabytes:.1f} GB/s: {record['bandwidth']['how']}",
        "speedup: over the fastest dense engine of the cell; none: the interval holds 1",
    ]
    lines += dict.fromkeys(_rounding(cell) for cell in record["cells"] if cell.get("rounding"))
    if any(cell["baseline"] is None for cell in record["cells"]):
        lines.append(
            "no dense engine could be timed, so that no speedup is known: see its reason below"
        )
    lines += _break_even_lines(record["break_even"])
    refused: dict[tuple[str, str], list[str]] = {}
    for cell in record["cells"]:
        place = f"{cell['phase']}, density {cell['density']:.3f}, batch {cell['batch']}"
        for reason in cell["refused"].items():
            refused.setdefault(reason, []).append(place)
    for (name, reason), places in refused.items():
        where = "" if len(places) == len(record["cells"]) else f" ({'; '.join(places)})"
        lines.append(f"not timed: {name}: {reason}{where}")
    return lines


def _break_even_lines(reach: list[dict[str, Any]]) -> list[str]:
    lines = []
    for phase, density in dict.fromkeys((one["phase"], one["density"]) for one in reach):
        here = [one for one in reach if (one["phase"], one["density"]) == (phase, density)]
        wins = [
            f"{one['engine']} {one['batch']}{' or more' * one['open']}"
            for one in here
            if one["batch"]
        ]
        never = [one["engine"] for one in here if one["batch"] is None]
        text = ", ".join(wins) or "none"
        text += f"; not at the smallest: {', '.join(never)}" if never and wins else ""
        lines.append(f"faster than dense up to batch ({phase}, density {density:.3f}): {text}")
    return lines


def processor(record: dict[str, Any]) -> str:
    """What computed, as far as the record says."""
    machine = record["machine"]
    return str(machine["gpu"] or machine.get("instructions", machine["cpu"]))


def _rounding(cell: dict[str, Any]) -> str:
    rounding, where = cell["rounding"], f"batch {cell['batch']}"
    if rounding["why_not"]:
        return (
            f"KL ({where}) is to a run in the same dtype, since {rounding['why_not']}: every layer of moefy's "
            f"engines was checked, logits to {rounding['allowed']:.0e} nats"
        )
    dense, masked, other = (rounding[n]["median"] for n in ("dense", "masked", "other experts"))
    return (
        f"KL ({where}): median in nats to the same model in fp32; rounding makes {dense:.0e} of dense and "
        f"{masked:.0e} of moefied, other experts {other:.0e}; an engine was to stay below "
        f"{rounding['allowed']:.0e}"
    )
