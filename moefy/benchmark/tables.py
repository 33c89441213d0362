"""Speed records as rows, and what a table of them cannot say as lines."""

from typing import Any


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
