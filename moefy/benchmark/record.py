"""The record of a sweep, its cells (engines that computed the same thing, side by side), and both as text.

Shapes: R samples, C calls of a sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moefy.benchmark.timing import WARMUP, Seconds, percentiles, speedup
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
        cells = [str(tokens)]
        for j in range(len(entry["densities"])):
            times = {path: found[i][j] for path, found in entry["seconds"].items()}
            best = min(times, key=lambda path: float(times[path]))
            cells.append(f"{best} {times[best] * 1e3:.3g} ms")
        rows.append(cells)
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
        f"{record['dtype']} on {record['device']} ({_processor(record)}), {record['threads']} thread(s); "
        f"{record['samples']} samples in changing order after {record['warmup']} of warm-up",
        f"bandwidth {gigabytes:.1f} GB/s: {record['bandwidth']['how']}",
        "speedup: over the fastest dense engine of the cell; none: the interval holds 1",
    ]
    lines += dict.fromkeys(_rounding(cell) for cell in record["cells"] if cell.get("rounding"))
    if any(cell["baseline"] is None for cell in record["cells"]):
        lines.append(
            "no dense engine could be timed, so that no speedup is known: see its reason below"
        )
    for phase, density in dict.fromkeys((b["phase"], b["density"]) for b in record["break_even"]):
        found = [b for b in record["break_even"] if (b["phase"], b["density"]) == (phase, density)]
        wins = [f"{b['engine']} {_reach(b)}" for b in found if b["batch"] is not None]
        never = [b["engine"] for b in found if b["batch"] is None]
        text = ", ".join(wins) or "none"
        text += f"; not at the smallest: {', '.join(never)}" if never and wins else ""
        lines.append(f"faster than dense up to batch ({phase}, density {density:.3f}): {text}")
    reasons: dict[str, dict[str, list[str]]] = {}
    for cell in record["cells"]:
        for name, reason in cell["refused"].items():
            places = reasons.setdefault(name, {}).setdefault(reason, [])
            places.append(f"{cell['phase']}, density {cell['density']:.3f}, batch {cell['batch']}")
    for name, by_reason in reasons.items():
        for reason, places in by_reason.items():
            where = "" if len(places) == len(record["cells"]) else f" ({'; '.join(places)})"
            lines.append(f"not timed: {name}: {reason}{where}")
    return lines


def _processor(record: dict[str, Any]) -> str:
    """What computes, as far as the record says."""
    machine = record["machine"]
    return str(
        machine["gpu"]
        if record["device"] == "cuda"
        else machine.get("instructions", machine["cpu"])
    )


def _rounding(cell: dict[str, Any]) -> str:
    found = cell["rounding"]
    where = f"batch {cell['batch']}"
    if found["why_not"]:
        return (
            f"KL ({where}) is to a run in the same dtype, since {found['why_not']}: every layer of moefy's "
            f"engines was checked, logits to {found['allowed']:.0e} nats"
        )
    dense, masked, other = (found[n]["median"] for n in ("dense", "masked", "other experts"))
    return (
        f"KL ({where}): median in nats to the same model in fp32; rounding makes {dense:.0e} of dense and "
        f"{masked:.0e} of moefied, other experts {other:.0e}; an engine was to stay below {found['allowed']:.0e}"
    )


def _reach(found: dict[str, Any]) -> str:
    return f"{found['batch']}{' or more' if found['open'] else ''}"
