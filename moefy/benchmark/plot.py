"""A picture of a speed record: speedup over batch and density, with what bandwidth alone would give.

One panel for every phase and density of a sweep over batches, and one over densities at the smallest
batch. Both axes are logarithmic, so that twice as fast and twice as slow lie equally far from dense.
"""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moefy.errors import MoefyError

INK, SOFT, GRID = "#222222", "#6b6b6b", "#e4e4e4"
DENSE_LINES = (":", "-.", (0, (1, 3)))
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f5fa8", "#a0522d")
"""Told apart by colour-blind people: Okabe and Ito, https://jfly.uni-koeln.de/color."""
MARKS = "osD^vPX*"
WIDE, HIGH = 4.8, 3.5
COLUMNS = 3
LOWEST = 1 / 8
"""What is slower still is drawn at the lower edge, hollow."""


def check_plot(picture: Path) -> None:
    """Raise `MoefyError` where `draw_speed` could not write this file."""
    if picture.suffix.lower() != ".png":
        raise MoefyError(f"--plot {picture}: a picture is a .png file")
    if find_spec("matplotlib") is None:
        raise MoefyError("--plot needs matplotlib: pip install 'moefy[plots]'")


def draw_speed(record: dict[str, Any], picture: Path) -> None:
    """Write a PNG of a record of `moefy bench`."""
    check_plot(picture)
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = _panels(record["cells"])
    styles = _styles(record["cells"])
    columns = 2 if len(panels) in (2, 4) else min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    limits = _limits(record["cells"])
    with plt.rc_context({"font.size": 9, "axes.edgecolor": SOFT, "text.color": INK}):
        figure, axes = plt.subplots(
            rows, columns, figsize=(WIDE * columns, HIGH * rows + 1), squeeze=False, sharey=True
        )
        for axis, panel in zip(axes.flat, panels, strict=False):
            _draw(axis, panel, styles, limits)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis in axes[:, 0]:
            axis.set_ylabel("speedup over dense", color=SOFT)
        handles = {
            name: handle
            for axis in axes.flat
            for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        across = 3 * columns
        figure.legend(
            handles.values(), handles.keys(), loc="lower left", ncols=across, frameon=False,
            fontsize=8.5, handlelength=2.6, columnspacing=1.4,
        )  # fmt: skip
        figure.suptitle(
            _title(record), x=0.01, y=0.995, ha="left", va="top", fontsize=8.5, color=SOFT
        )
        lines = -(-len(handles) // across)
        height = HIGH * rows + 1
        figure.tight_layout(rect=(0, (0.1 + 0.2 * lines) / height, 1, 1))
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, dpi=150, facecolor="white")
        plt.close(figure)


def _title(record: dict[str, Any]) -> str:
    machine = record["machine"]
    what, where = record["what"], f"{record['dtype']}, {record['device']}"
    where += f" ({machine['gpu'] or machine.get('instructions', machine['cpu'])})"
    return (
        f"{what}\n{where}, {record['threads']} thread(s); bars: {record['samples']} samples, 99 %"
    )


def _panels(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Title, name of the x axis, and cells by x."""
    sweeps: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for cell in cells:
        sweeps.setdefault((cell["phase"], cell["asked_density"]), []).append(cell)
    panels = []
    for (phase, _), sweep in sweeps.items():
        title = f"{phase}, density {sweep[0]['density']:.2f}"
        panels.append({"title": title, "x": "batch", "cells": sweep})
    for phase in dict.fromkeys(cell["phase"] for cell in cells):
        batch = min(cell["batch"] for cell in cells if cell["phase"] == phase)
        across = [c for c in cells if c["phase"] == phase and c["batch"] == batch]
        if len(across) > 1:
            panels.append({"title": f"{phase}, batch {batch}", "x": "density", "cells": across})
    return panels


def _styles(cells: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How every engine is drawn in all panels: dense ones as grey lines of different strokes."""
    kinds = {name: row["dense"] for cell in cells for name, row in cell["engines"].items()}
    dense = [name for name, is_dense in kinds.items() if is_dense]
    others = [name for name, is_dense in kinds.items() if not is_dense]
    styles: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(dense):
        line = DENSE_LINES[i % len(DENSE_LINES)]
        styles[name] = {"color": SOFT, "ls": line, "marker": "", "lw": 1.3, "zorder": 2.5}
    for i, name in enumerate(others):
        mark = MARKS[i % len(MARKS)]
        styles[name] = {"color": COLOURS[i % len(COLOURS)], "marker": mark, "lw": 1.8, "zorder": 4}
    return styles


def _draw(
    axis: Any,
    panel: dict[str, Any],
    styles: dict[str, dict[str, Any]],
    limits: tuple[float, float],
) -> None:
    key, cells = panel["x"], sorted(panel["cells"], key=lambda cell: float(cell[panel["x"]]))
    places = [cell[key] for cell in cells]
    low, high = limits
    axis.axhspan(low, 1, color="#f5f5f5", lw=0, zorder=0)
    axis.axhline(1, color=INK, lw=1, zorder=3, label="dense, the fastest engine")
    ideal = [(x, cell["ideal"]) for x, cell in zip(places, cells, strict=True) if cell["ideal"]]
    if ideal:
        x, y = zip(*ideal, strict=True)
        style = {"color": INK, "ls": (0, (4, 2)), "lw": 1.2, "marker": "_", "markersize": 9}
        axis.plot(x, y, label="ideal: bytes alone", zorder=3, **style)
    marked = [name for name, style in styles.items() if style["marker"]]
    for name, style in styles.items():
        # Beside each other, so that no bar hides another.
        aside = 1.012 ** (marked.index(name) - (len(marked) - 1) / 2) if name in marked else 1.0
        engines = [(x, c["engines"]) for x, c in zip(places, cells, strict=True)]
        found = [(x * aside, rows[name]) for x, rows in engines if _has_ratio(rows.get(name))]
        if found:
            _line(axis, name, found, style, low)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(
        places, [f"{place:g}" if key == "batch" else f"{place:.2f}" for place in places]
    )
    axis.minorticks_off()
    axis.set_xlim(min(places) / 1.2, max(places) * 1.2)
    axis.set_ylim(low, high)
    ticks = [2.0**p for p in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    axis.set_yticks(ticks, [f"{tick:g}x" if tick >= 1 else f"1/{1 / tick:g}x" for tick in ticks])
    axis.set_xlabel(key, color=SOFT)
    axis.set_title(panel["title"], loc="left", fontsize=10, fontweight="bold", color=INK)
    axis.grid(color=GRID, lw=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=SOFT, length=3)


def _line(
    axis: Any, name: str, found: list[tuple[float, Any]], style: dict[str, Any], low: float
) -> None:
    x = [place for place, _ in found]
    edge = low * 1.06
    y = [max(row["ratio"], edge) for _, row in found]
    axis.plot(x, y, label=name, markersize=6, markeredgecolor="white", markeredgewidth=0.8, **style)
    if not style["marker"]:
        return
    ends = [row["interval"] or (1.0, 1.0) for _, row in found]
    axis.vlines(
        x, [max(end[0], low) for end in ends], [max(end[1], low) for end in ends],
        color=style["color"], lw=1.2, alpha=0.6, zorder=style["zorder"] - 0.5,
    )  # fmt: skip
    beyond = [place for place, row in found if row["ratio"] < edge]
    axis.plot(
        beyond, [edge] * len(beyond), ls="", marker=style["marker"], markersize=6,
        markerfacecolor="white", markeredgecolor=style["color"], zorder=style["zorder"] + 0.5,
    )  # fmt: skip


def _has_ratio(row: dict[str, Any] | None) -> bool:
    """Whether it was timed, and a dense engine beside it."""
    return row is not None and row["ratio"] is not None


def _limits(cells: list[dict[str, Any]]) -> tuple[float, float]:
    """Limits of the y axis: all ratios and ideals with some air, down to `LOWEST`."""
    rows = [row for cell in cells for row in cell["engines"].values()]
    values = [row["ratio"] for row in rows if _has_ratio(row)]
    values += [cell["ideal"] for cell in cells if cell["ideal"]]
    return max(LOWEST, min([*values, 0.7])) / 1.15, max([*values, 1.25]) * 1.25
