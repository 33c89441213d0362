"""A picture of a speed record: speedup over batch and density, with what bandwidth alone would give.

One panel for every phase and density of a sweep over batches, and one over densities at the smallest
batch. Both axes are logarithmic, so that twice as fast and twice as slow lie equally far from dense.
"""

import math
from itertools import cycle
from pathlib import Path
from typing import Any

from moefy.benchmark.record import processor
from moefy.errors import MoefyError
from moefy.run.tables import COLOURS, GRID, INK, NO_PLOTS, SOFT, has_plots, pyplot

DENSE_LINES = (":", "-.", (0, (1, 3)))
MARKS = "osD^vPX*"
WIDE, HIGH = 4.8, 3.5
COLUMNS = 3
LOWEST = 1 / 8
"""What is slower still is drawn at the lower edge, hollow."""


def check_plot(picture: Path) -> None:
    """Raise `MoefyError` where `draw_speed` could not write this file."""
    if picture.suffix.lower() != ".png":
        raise MoefyError(f"--plot {picture}: a picture is a .png file")
    if not has_plots():
        raise MoefyError(f"--plot: {NO_PLOTS}")


def draw_speed(record: dict[str, Any], picture: Path) -> None:
    """Write a PNG of a record of `moefy bench`."""
    check_plot(picture)
    cells = record["cells"]
    panels, styles, limits = _panels(cells), _styles(cells), _limits(cells)
    columns = 2 if len(panels) in (2, 4) else min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    size = (WIDE * columns, HIGH * rows + 1)
    with pyplot() as plt:
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True)
        for axis, panel in zip(axes.flat, panels, strict=False):
            _draw(axis, panel, styles, limits)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis in axes[:, 0]:
            axis.set_ylabel("speedup over dense", color=SOFT)
        entries = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes.flat]
        handles = {name: handle for one in entries for handle, name in one}
        figure.legend(
            handles.values(), handles.keys(), loc="lower left", ncols=3 * columns, frameon=False,
            fontsize=8.5, handlelength=2.6, columnspacing=1.4,
        )  # fmt: skip
        title = (
            f"{record['what']}\n{record['dtype']}, {record['device']} ({processor(record)}), "
            f"{record['threads']} thread(s); bars: {record['samples']} samples, 99 %"
        )
        figure.suptitle(title, x=0.01, y=0.995, ha="left", va="top", fontsize=8.5, color=SOFT)
        lines = -(-len(handles) // (3 * columns))
        figure.tight_layout(rect=(0, (0.1 + 0.2 * lines) / size[1], 1, 1))
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, dpi=150, facecolor="white")


def _panels(cells: list[dict[str, Any]]) -> list[tuple[str, str, list[dict[str, Any]]]]:
    """Title, name of the x axis, and cells: over batches for every density, over densities at the smallest."""
    sweeps: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for cell in cells:
        sweeps.setdefault((cell["phase"], cell["asked_density"]), []).append(cell)
    panels = [
        (f"{phase}, density {sweep[0]['density']:.2f}", "batch", sweep)
        for (phase, _), sweep in sweeps.items()
    ]
    for phase in dict.fromkeys(cell["phase"] for cell in cells):
        batch = min(cell["batch"] for cell in cells if cell["phase"] == phase)
        across = [c for c in cells if c["phase"] == phase and c["batch"] == batch]
        if len(across) > 1:
            panels.append((f"{phase}, batch {batch}", "density", across))
    return panels


def _styles(cells: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """How every engine is drawn in all panels: dense ones as grey lines of different strokes."""
    kinds = {name: row["dense"] for cell in cells for name, row in cell["engines"].items()}
    dense = [name for name, is_dense in kinds.items() if is_dense]
    others = [name for name, is_dense in kinds.items() if not is_dense]
    styles: dict[str, dict[str, Any]] = {}
    for name, line in zip(dense, cycle(DENSE_LINES), strict=False):
        styles[name] = {"color": SOFT, "ls": line, "marker": "", "lw": 1.3, "zorder": 2.5}
    for name, mark, colour in zip(others, cycle(MARKS), cycle(COLOURS), strict=False):
        styles[name] = {"color": colour, "marker": mark, "lw": 1.8, "zorder": 4}
    return styles


def _draw(
    axis: Any,
    panel: tuple[str, str, list[dict[str, Any]]],
    styles: dict[str, dict[str, Any]],
    limits: tuple[float, float],
) -> None:
    title, key, cells = panel
    cells = sorted(cells, key=lambda cell: float(cell[key]))
    low, high = limits
    axis.axhspan(low, 1, color="#f5f5f5", lw=0, zorder=0)
    axis.axhline(1, color=INK, lw=1, zorder=3, label="dense, the fastest engine")
    ideal = [(cell[key], cell["ideal"]) for cell in cells if cell["ideal"]]
    if ideal:
        style = {"color": INK, "ls": (0, (4, 2)), "lw": 1.2, "marker": "_", "markersize": 9}
        axis.plot(*zip(*ideal, strict=True), label="ideal: bytes alone", zorder=3, **style)
    marked = [name for name, style in styles.items() if style["marker"]]
    for name, style in styles.items():
        # Beside each other, so that no bar hides another.
        aside = 1.012 ** (marked.index(name) - (len(marked) - 1) / 2) if name in marked else 1.0
        rows = [(cell[key] * aside, cell["engines"].get(name)) for cell in cells]
        points = [(x, row) for x, row in rows if _has_ratio(row)]
        if points:
            _line(axis, name, points, style, low)
    places = [cell[key] for cell in cells]
    ticks = [2.0**p for p in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)]
    axis.set(xscale="log", yscale="log", ylim=limits, xlim=(min(places) / 1.2, max(places) * 1.2))
    axis.set_xticks(places, [f"{x:g}" if key == "batch" else f"{x:.2f}" for x in places])
    axis.set_yticks(ticks, [f"{tick:g}x" if tick >= 1 else f"1/{1 / tick:g}x" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(key, color=SOFT)
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axis.grid(color=GRID, lw=0.7)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=SOFT, length=3)


def _line(
    axis: Any, name: str, points: list[tuple[float, Any]], style: dict[str, Any], low: float
) -> None:
    x, edge = [place for place, _ in points], low * 1.06
    y = [max(row["ratio"], edge) for _, row in points]
    axis.plot(x, y, label=name, markersize=6, markeredgecolor="white", markeredgewidth=0.8, **style)
    if not style["marker"]:
        return
    ends = [row["interval"] or (1.0, 1.0) for _, row in points]
    axis.vlines(
        x, [max(end[0], low) for end in ends], [max(end[1], low) for end in ends],
        color=style["color"], lw=1.2, alpha=0.6, zorder=style["zorder"] - 0.5,
    )  # fmt: skip
    beyond = [place for place, row in points if row["ratio"] < edge]
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
