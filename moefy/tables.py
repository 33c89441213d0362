"""Records as tables: Markdown for files, the same rows for the terminal."""

from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

_COLUMNS = {
    "bits_per_byte_dense": "bits/byte dense",
    "bits_per_byte": "bits/byte",
    "ce_dense": "CE dense",
    "ce": "CE",
    "ce_increase": "CE increase",
    "kl": "KL to dense",
    "agreement": "top-1",
    "cosine": "cosine",
}
_WITH_INTERVAL = ("ce_increase", "kl", "cosine")


def domain_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of an evaluation record: every domain, then all of them."""
    total = record["total"]
    names = [name for name in _COLUMNS if name in total]
    header = ["domain", "tokens", *(_COLUMNS[name] for name in names), "intervals over"]
    rows = []
    for domain, row in [*record["domains"].items(), ("all", total)]:
        cells = [_cell(name, row[name]) if name in row else "" for name in names]
        rows.append([domain, str(row["tokens"]), *cells, row["bootstrap"]])
    return header, rows


def _cell(name: str, value: dict[str, Any]) -> str:
    if name not in _WITH_INTERVAL:
        return f"{value['mean']:.3f}"
    return _interval(value)


def _interval(value: dict[str, Any]) -> str:
    low, high = value["ci95"]
    return f"{value['mean']:.3f} [{low:.3f}, {high:.3f}]"


_GROUPS = {
    ("positions", "all"): "all tokens",
    ("positions", "without_first"): "without position 0",
    ("positions", "without_first_and_sinks"): "without position 0 and attention sinks",
    ("strata", "rank_1"): "bigram's first choice",
    ("strata", "rank_2_to_10"): "bigram's choices 2 to 10",
    ("strata", "rank_over_10"): "below the bigram's first 10",
}


def sceptic_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the damage over some tokens only; no rows for images."""
    found = [
        (label, record[part][name])
        for (part, name), label in _GROUPS.items()
        if part in record and record[part][name]["tokens"]
    ]
    names = [name for name in _WITH_INTERVAL if found and name in found[0][1]]
    header = ["tokens that count", "share", *(_COLUMNS[name] for name in names)]
    rows = []
    for label, row in found:
        cells = [_cell(name, row[name]) for name in names]
        rows.append([label, f"{row['share']['mean']:.1%}", *cells])
    return header, rows


def sceptic_lines(record: dict[str, Any]) -> list[str]:
    """The other figures that a mean hides, a line each."""
    lines, total = [], record["total"]
    if "kl_tail" in total:
        tail = dict(total["kl_tail"])
        share = tail.pop("top_1_percent_share")
        values = ", ".join(f"{name} {value:.3f}" for name, value in tail.items())
        lines.append(f"KL tail: {values}; the worst 1 % of tokens hold {share:.0%} of all KL")
    if "bigram_skill" in total:
        skill, ce = total["bigram_skill"], total["ce_bigram"]["mean"]
        value = "none, dense is no better" if skill is None else _interval(skill)
        lines.append(
            f"bigram skill: {value} (1 = dense, 0 = the bigram, whose CE is {ce:.3f}; fitted on "
            f"{record['bigram']['tokens']} other tokens)"
        )
    mean = record["router_quality"]["mean"]
    recall = "no" if mean["recall"] is None else f"{mean['recall']:.1%}"
    lines.append(
        f"router: {recall} of the oracle's experts run; missed energy "
        f"{mean['missed_energy']:.3f} = {mean['unavoidable']:.3f} unavoidable + "
        f"{mean['router_added']:.3f} by the router (means of layers)"
    )
    if record.get("overlap"):
        lines.append(
            f"WARNING: {record['overlap']} of these documents are also in {record['overlap_with']}"
        )
    return lines


def layer_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of an evaluation record by layer: the router, and FFN density.

    Of the domains only those of lowest and highest density are named; the record has them all.
    """
    density = record["ffn_density_by_layer"]
    figures = ("recall", "missed_energy", "unavoidable", "router_added")
    header = ["layer", *(name.replace("_", " ") for name in figures)]
    header += ["density", "lowest in", "highest in"]
    rows = []
    for index, row in enumerate(record["router_quality"]["layers"]):
        cells = ["" if row[name] is None else f"{row[name]:.3f}" for name in figures]
        domains = sorted((layers[index], name) for name, layers in density["domains"].items())
        ends = [f"{name} {value:.3f}" for value, name in (domains[0], domains[-1])]
        rows.append([row["layer"], *cells, f"{density['all'][index]:.3f}", *ends])
    return header, rows


def domain_table(record: dict[str, Any]) -> str:
    """An evaluation record as a Markdown table; the means of 95 % bootstrap intervals."""
    return markdown(*domain_rows(record))


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; a bar inside a cell does not end it."""
    lines = [header, ["---"] * len(header), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def terminal(header: list[str], rows: list[list[str]], title: str | None = None) -> Table:
    """The same as a rich table: numbers to the right, nothing cut off."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        numbers = all(row[index][:1].isdigit() or row[index][:1] in ("", "-") for row in rows)
        table.add_column(name, justify="right" if numbers and index else "left", overflow="fold")
    for row in rows:
        # Texts of users are shown as they are: brackets are no markup.
        table.add_row(*map(escape, row))
    return table


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


def comparison_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a comparison of recipes, best first at every budget."""
    header = ["budget", "recipe", "KL to dense", "CE increase", "cosine", "read", "computed"]
    keys = ("kl", "ce_increase", "cosine", "active_budget", "active_compute")

    def order(row: dict[str, Any]) -> tuple[float, bool, float]:
        return row["budget"], "n/a" in row, row.get("kl", -row.get("cosine", 0.0))

    rows = []
    for row in sorted(record["rows"], key=order):
        cells = [f"{row[key]:.4f}" if key in row else "" for key in keys]
        cells = [f"n/a: {row['n/a']}", *[""] * (len(keys) - 1)] if "n/a" in row else cells
        rows.append([f"{row['budget']:.2f}", row["recipe"], *cells])
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in used], [[row[i] for i in used] for row in rows]


def recovery_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a recovery: the model before and after, the dense model, its control."""
    before, after = record["before"], record["after"]
    names = [name for name in ("ce", "ce_increase", "kl", "agreement", "cosine") if name in before]
    header = ["model", *(_COLUMNS[name] for name in names), "gap closed"]
    rows = [["moefied", *(_cell(name, before[name]) for name in names), ""]]
    closed = [_share(record.get("gap_closed"))]
    rows.append(["recovered", *(_cell(name, after[name]) for name in names), *closed])
    blank = [""] * (len(names) - 1)
    if "ce" in names:
        rows.append(["dense", f"{before['ce_dense']['mean']:.3f}", *blank, ""])
    if "control" in record:
        share = _share(record["gap_closed_of_control"], " to here")
        rows.append(["dense, same tokens", f"{record['control']['ce']:.3f}", *blank, share])
    return header, rows


def _share(value: float | None, after: str = "") -> str:
    return "no gap" if value is None else f"{value:.0%}{after}"


def sparsify_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a sparsifying: the model before and after, and its control."""
    names = {"before": "as it was", "after": "sparsified", "control": "control, same tokens"}
    header = ["model", "CE", "active neurons", "square Hoyer / N"]
    rows = [
        [label, f"{row['ce']:.3f}", f"{row['active']:.3f}", f"{row['hoyer']:.3f}"]
        for name, label in names.items()
        if (row := record.get(name)) is not None
    ]
    return header, rows
