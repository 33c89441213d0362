"""What a person is left with of a training: its log, a picture of it, and why it ended early."""

import json
import shutil
from pathlib import Path
from typing import Any

from moefy.run.job import Job
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
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
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
