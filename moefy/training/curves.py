"""The log of a training, and what a person is left with: a picture, rows of its record, why it ended."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from moefy.evaluation.tables import COLUMNS, cell_text
from moefy.run.folder import write_whole
from moefy.run.job import Job
from moefy.run.reading import reading
from moefy.run.tables import NO_PLOTS, has_plots, pyplot

PANELS = (
    ("loss", "loss", "held_out_loss", None),
    ("KL to dense, nats per token", "kl", "held_out_kl", "log"),
    ("active neurons", "active", None, None),
    ("FFN density, experts", None, "density", None),
)
"""Title, what every step logs, what every check logs, scale."""


def keep_log(job: Job) -> None:
    """Put the log and its picture beside the finished model."""
    shutil.copy(job.work / "log.jsonl", job.finished / "log.jsonl")
    if has_plots():
        draw_curves(job.finished / "log.jsonl", job.finished / "curves.png")
    else:
        job.report.say(f"no picture of the curves: {NO_PLOTS}")


def stopped(training: dict[str, Any], job: Job, lower: str) -> str:
    """Why training ended early, and what then lies in the output folder."""
    return (
        f"stopped: {training['stopped']}; {job.output.out} holds the model of step {training['steps']}, the "
        f"last one that was good; lower {lower}"
    )


def draw_curves(log: Path, picture: Path) -> None:
    """Write a PNG of a `log.jsonl`."""
    with reading(log, "train again"):
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        rows = [{**row, "tokens": row["tokens"]} for row in rows]
    panels = [p for p in PANELS if _series(rows, p[1])[0] or _series(rows, p[2])[0]]
    with pyplot() as plt:
        figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
        for axis, panel in zip(axes[0], panels, strict=True):
            _draw(axis, rows, panel)
        figure.tight_layout()
        figure.savefig(picture, dpi=110)


def _draw(
    axis: Any, rows: list[dict[str, Any]], panel: tuple[str, str | None, str | None, str | None]
) -> None:
    title, step, check, scale = panel
    for name, style in ((step, {"alpha": 0.5}), (check, {"marker": "o", "markersize": 3})):
        x, y = _series(rows, name)
        if x:
            axis.plot(x, y, label=str(name).replace("_", " "), **style)
    if check == "density":
        x, y = _series(rows, "effective_experts")
        axis.plot(x, y, label="effective experts", marker="s", markersize=3)
    axis.set_title(title)
    axis.set_xlabel("tokens")
    if scale:
        axis.set_yscale(scale)
    axis.grid()
    axis.legend(fontsize=8)


def _series(rows: list[dict[str, Any]], name: str | None) -> tuple[list[int], list[float]]:
    found = [(row["tokens"], row[name]) for row in rows if name in row]
    return [x for x, _ in found], [y for _, y in found]


def recovery_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a recovery: the model before and after, the dense model, its control."""
    before, after = record["before"], record["after"]
    names = [
        name for name in ("ce", "ce_increase", "kl", "agreement", "cosine", "mse") if name in before
    ]
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


class Log:
    """One JSON line a step; steps after the checkpoint that a run goes on from are dropped."""

    def __init__(self, file: Path, steps: int, writes: bool) -> None:
        self.file, self.writes = file, writes
        if writes and file.exists():
            lines = file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step(line) <= steps]
            write_whole(file, "".join(f"{line}\n" for line in kept))

    def add(self, row: dict[str, Any]) -> None:
        """Append a line, in the process that writes."""
        if self.writes:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):  # cut off where the run was killed
        return math.inf
