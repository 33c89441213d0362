"""Records of recoveries and of sparsifying as rows."""

from typing import Any

from moefy.evaluation.tables import COLUMNS, cell_text


def recovery_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a recovery: the model before and after, the dense model, its control."""
    before, after = record["before"], record["after"]
    names = [name for name in ("ce", "ce_increase", "kl", "agreement", "cosine") if name in before]
    header = ["model", *(COLUMNS[name] for name in names), "gap closed"]
    rows = [["moefied", *(cell_text(name, before[name]) for name in names), ""]]
    closed = [_share(record.get("gap_closed"))]
    rows.append(["recovered", *(cell_text(name, after[name]) for name in names), *closed])
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
