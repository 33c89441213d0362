"""Records as tables: Markdown for files, the same rows for the terminal."""

from typing import Any

from rich import box
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
    low, high = value["ci95"]
    return f"{value['mean']:.3f} [{low:.3f}, {high:.3f}]"


def domain_table(record: dict[str, Any]) -> str:
    """An evaluation record as a Markdown table; the means of 95 % bootstrap intervals."""
    return markdown(*domain_rows(record))


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def terminal(header: list[str], rows: list[list[str]], title: str | None = None) -> Table:
    """The same as a rich table: numbers to the right, nothing cut off."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, name in enumerate(header):
        numbers = all(row[index][:1].isdigit() or row[index][:1] in ("", "-") for row in rows)
        table.add_column(name, justify="right" if numbers and index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def speed_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a speed record, of a model or of a layer."""
    if record["kind"] == "model speed":
        header = ["", "dense tokens/s", "moefied tokens/s", "speedup", "computed by"]
        rows = []
        for phase in ("prefill", "decode"):
            rate = record[phase]["tokens_per_second"]
            by = ", ".join(f"{name} ({n} layers)" for name, n in record["backends"][phase].items())
            rows.append(
                [phase, f"{rate['dense']:.1f}", f"{rate['moefied']:.1f}",
                 f"{record[phase]['speedup']:.2f}x", by]
            )  # fmt: skip
        return header, rows
    shape = "D {width}, N {neurons}, {k} of {experts} experts, {tokens} tokens, {dtype}".format(
        **record
    )
    rows = []
    for name, seconds in record["median_seconds"].items():
        speedup = record["speedup"].get(name)
        chosen = f" ({record['chosen']})" if name == "moefied" else ""
        rows.append(
            [name + chosen, f"{seconds * 1e3:.2f}", f"{speedup:.2f}x" if speedup else "1.00x"]
        )
    return [f"{record['label']}; {shape}", "median ms", "speedup"], rows
