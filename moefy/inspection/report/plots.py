"""Static pictures of an inspection for papers: a PNG for each question that the report opens with.

Colours are told apart by colour-blind people and in grey; text is what the tables call things.
"""

import io
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefy.inspection.record import Inspection, rows, write_file
from moefy.run.tables import GRID, INK, SOFT, pyplot

ABOVE, BELOW = "#1f6fb0", "#c8651b"
SHARES = {
    "share_token": ("the token", "#2f6f9f"),
    "share_domain": ("the domain, beyond the token", "#d9853b"),
    "share_previous": ("the token before, beyond both", "#8fbbd9"),
    "share_position": ("the position, beyond all", "#8c7aa9"),
}
STRONGEST = 30
"""Rows of the causal matrix and of the picture of domains."""
SIGNIFICANT = 0.05
LEGEND: dict[str, Any] = {"frameon": False, "loc": "lower left", "bbox_to_anchor": (0, 1)}
"""Above the axes, from their left end."""


def save_plots(inspection: Inspection, folder: str | Path) -> list[Path]:
    """Write the PNGs that the inspection's tables allow into `folder`; returns their paths.

    `routing.png`, `causal.png`, `domains.png`, `random_weights.png`. Raises `MoefyError` where
    matplotlib is not installed, `OutputError` where the folder cannot be written.
    """
    folder = Path(folder)
    found = []
    for name, draw in PLOTS.items():
        with pyplot() as plt:
            figure = draw(inspection, plt)
            if figure is None:
                continue
            png = io.BytesIO()
            figure.savefig(png, dpi=200, facecolor="white", bbox_inches="tight")
            found.append(folder / f"{name}.png")
            write_file(found[-1], png.getvalue())
    return found


def _routing(inspection: Inspection, plt: Any) -> Any:
    """One stacked bar for each layer: what predicts routing on held-out documents."""
    layers = inspection.tables.get("layers", {})
    names = [name for name in SHARES if name in layers]
    if not names:
        return None
    at = np.arange(len(layers["layer"]))
    figure, axis = plt.subplots(figsize=(6.3, 0.9 + 0.26 * len(at)))
    left = np.zeros(len(at))
    for name in names:
        label, colour = SHARES[name]
        # Cross-fitted shares may be slightly below 0; such a part has no width.
        share = np.clip(_numbers(layers[name], 0.0), 0, None)
        axis.barh(at, share, left=left, color=colour, height=0.72, label=label)
        left += share
    axis.barh(at, 1 - left, left=left, color="#ebe8e2", height=0.72, label="none of these")
    axis.set(xlim=(0, 1), yticks=at, yticklabels=[f"L{n}" for n in layers["layer"]])
    axis.invert_yaxis()
    axis.set_xlabel("share of the entropy of routing")
    axis.legend(**LEGEND, ncols=3, fontsize=8, columnspacing=1.2, handlelength=1)
    return figure


def _causal(inspection: Inspection, plt: Any) -> Any:
    """Selectivity of the strongest experts by domain; a dot is q < .05 over all cells."""
    cells = rows(inspection.tables.get("causal", {}))
    cells = [
        r for r in cells if (r.get("model", "dense"), r.get("mode", "mean")) == ("dense", "mean")
    ]
    by_expert: dict[tuple[int, int], dict[str, Any]] = defaultdict(dict)
    for row in cells:
        if row.get("csi") is not None:
            by_expert[row["layer"], row["expert"]][row["domain"]] = row
    if not by_expert:
        return None
    domains = sorted({row["domain"] for row in cells})
    best = sorted(by_expert, key=lambda key: -max(r["csi"] for r in by_expert[key].values()))
    best = best[:STRONGEST]
    value = np.array(
        [[by_expert[key].get(d, {}).get("csi", np.nan) for d in domains] for key in best]
    )
    most = float(np.nanmax(np.abs(value))) or 1.0
    figure, axis = plt.subplots(figsize=(1.6 + 0.42 * len(domains), 1.3 + 0.19 * len(best)))
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("moefy", [BELOW, "#f3f1ec", ABOVE])
    image = axis.imshow(value, cmap=colours, vmin=-most, vmax=most, aspect="auto")
    for i, key in enumerate(best):
        for j, domain in enumerate(domains):
            row = by_expert[key].get(domain, {})
            q = row.get("csi_q", row.get("q"))
            if q is not None and q < SIGNIFICANT:
                axis.plot(j, i, ".", color=INK, markersize=3.5)
    axis.set(yticks=range(len(best)), yticklabels=[f"L{a}.E{b}" for a, b in best])
    axis.set_xticks(range(len(domains)), domains, rotation=45, ha="right")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, fraction=0.05, pad=0.03)
    bar.set_label("selectivity, nats per token")
    bar.outline.set_visible(False)
    return figure


def _domains(inspection: Inspection, plt: Any) -> Any:
    """DS, DS_lex and DS_adj of the cells with the largest DS_adj."""
    cells = [r for r in rows(inspection.tables.get("domains", {})) if r.get("ds_adj") is not None]
    known = [row for row in cells if not row.get("few")]
    top = sorted(known, key=lambda row: -abs(row["ds_adj"]))[:STRONGEST]
    if not top:
        return None
    at = np.arange(len(top))
    figure, axes = plt.subplots(
        1, 2, figsize=(6.6, 1 + 0.2 * len(top)), sharey=True, width_ratios=(1.4, 1)
    )
    for name, label, style in (
        ("ds", "DS", {"marker": "o", "color": ABOVE}),
        ("ds_lex", "DS_lex, tokens alone", {"marker": "s", "color": BELOW, "mfc": "white"}),
    ):
        axes[0].plot([row[name] for row in top], at, ls="", ms=4.5, label=label, **style)
    axes[0].hlines(at, [r["ds_lex"] for r in top], [r["ds"] for r in top], color=GRID, zorder=0)
    axes[0].set_xlabel("share of the domain's tokens that run it")
    axes[0].legend(**LEGEND, ncols=2, fontsize=8)
    middle = _numbers([row["ds_adj"] for row in top])
    ends = [_numbers([row.get(f"ds_adj_{end}") for row in top]) for end in ("low", "high")]
    axes[1].axvline(0, color=SOFT, lw=0.8)
    axes[1].hlines(at, *ends, color=ABOVE, lw=1.6, alpha=0.5)
    axes[1].plot(middle, at, "o", color=ABOVE, ms=4)
    axes[1].set_xlabel("DS_adj = DS - DS_lex, 95 %")
    names = [f"L{row['layer']}.E{row['expert']} {row['domain']}" for row in top]
    axes[0].set_yticks(at, names)
    axes[0].invert_yaxis()
    figure.tight_layout()
    return figure


def _random_weights(inspection: Inspection, plt: Any) -> Any:
    """Every figure by layer: trained, and the two kinds of random weights."""
    given = rows(inspection.tables.get("random_weights", {}))
    figures = list(dict.fromkeys(row["figure"] for row in given))
    if not figures:
        return None
    columns = min(3, len(figures))
    lines = -(-len(figures) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.4 * columns, 0.5 + 1.8 * lines), squeeze=False
    )
    styles = {
        "trained": {"color": ABOVE, "marker": "o"},
        "permuted": {"color": BELOW, "marker": "s", "mfc": "white", "ls": "--"},
        "reinitialised": {"color": SOFT, "marker": "^", "mfc": "white", "ls": ":"},
    }
    for axis, name in zip(axes.flat, figures, strict=False):
        own = [row for row in given if row["figure"] == name]
        for kind, style in styles.items():
            values = _numbers([row.get(kind) for row in own])
            axis.plot([row["layer"] for row in own], values, ms=3.5, lw=1.2, label=kind, **style)
        axis.set_title(name.replace("_", " "), fontsize=8.5)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(color=GRID, lw=0.6)
        axis.set_axisbelow(True)
    for axis in axes.flat[len(figures) :]:
        axis.set_visible(False)
    axes[-1, 0].set_xlabel("layer")
    figure.tight_layout()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, **LEGEND, ncols=3)
    return figure


def _numbers(values: list[float | None], missing: float = np.nan) -> NDArray[np.float64]:
    return np.array([missing if value is None else value for value in values], dtype=float)


PLOTS = {
    "routing": _routing,
    "causal": _causal,
    "domains": _domains,
    "random_weights": _random_weights,
}
