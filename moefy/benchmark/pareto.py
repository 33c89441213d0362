"""Quality against bits read: recipes and the dense model in fewer bits, as a table and a picture.

    record = compare("path/to/model", ["fast", "teal@rtn-4", "q4_k_m"], [3.5, 4.0])

A row is a recipe at a budget; a name of `ROUNDINGS`, which has no budget; or a baseline of input sparsity on
rounded weights, `teal@rtn-4`.
"""

import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moefy import recipe as recipes
from moefy.benchmark.compare import Comparison
from moefy.benchmark.roundings import AS_IS, ROUNDINGS
from moefy.data.shards import EVALUATED_DOCUMENTS
from moefy.errors import MoefyError, RecipeError, unknown_choice
from moefy.recipe import Recipe
from moefy.run.computing import asked, machine
from moefy.run.console import Reporter
from moefy.run.output import Stages, digest
from moefy.run.tables import COLOURS, GRID, NO_PLOTS, SOFT, has_plots, pyplot

QUANTISED = (*ROUNDINGS, "teal@rtn-4", "wina@rtn-4")
"""What `--quantised` adds: all that a user has without moefy."""
PICTURES = (".svg", ".png")
FLOOR = 1e-3
"""Lowest KL that is drawn: below it are differences of rounding in 16 bits."""


@dataclass(frozen=True)
class ParetoRow:
    """What is measured in one row."""

    name: str
    recipe: Recipe | None
    """None of a dense model that is rounded."""
    rounding: str | None
    budget: float | None

    def measure(self, bench: Comparison) -> dict[str, Any]:
        """The figures."""
        if self.recipe is None:
            return bench.rounded(self.name)
        assert self.budget is not None
        rounding = AS_IS if self.rounding is None else ROUNDINGS[self.rounding]
        return bench.at(self.recipe, self.budget, rounding)

    @property
    def settings(self) -> list[Any]:
        """All that decides it, as JSON values."""
        recipe = None if self.recipe is None else recipes.to_dict(self.recipe)
        return [self.name if recipe is None else recipe, self.rounding, self.budget]


def rows_of(names: list[str], budgets: list[float]) -> list[ParetoRow]:
    """The rows of these names; raises `RecipeError` for one that is unknown."""
    rows = []
    for name in dict.fromkeys(names):
        if name in ROUNDINGS:
            rows.append(ParetoRow(name, None, None, None))
            continue
        base, _, rounding = name.partition("@")
        recipe = recipes.load(base)
        if rounding and rounding not in ROUNDINGS:
            raise RecipeError(f"{name}: {unknown_choice('rounding', rounding, ROUNDINGS)}")
        if rounding and recipe.baseline is None:
            raise RecipeError(f"{name}: {base} says itself how weights are stored (storage.bits)")
        rows += [ParetoRow(name, recipe, rounding or None, budget) for budget in budgets]
    return rows


@asked
def compare(
    model: str | Path,
    names: list[str],
    budgets: list[float],
    *,
    corpus: Any = None,
    documents: int = EVALUATED_DOCUMENTS,
    seed: int = 0,
    work: str | Path | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    batch_size: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Recipes (shipped names or YAML files) on one model at equal budgets (as in `at`); a JSON record.

    Rows that are finished stay in the folder `work`, from where another run of the same takes them up.
    Raises `RecipeError` for an unknown recipe before anything is run. A recipe that cannot serve the
    model, or not at a budget, has a row that says why.
    """
    wanted, report = rows_of(names, budgets), Reporter(quiet=quiet)
    with _folder(work) as folder:
        bench = Comparison(
            model, folder, corpus=corpus, seed=seed, documents=documents, report=report
        )
        bench.folder = folder / digest(bench.decided)[:16]
        bench.folder.mkdir(exist_ok=True)
        rows = _measured(wanted, bench, Stages(bench.folder))
    return {
        "kind": "comparison",
        "model": Path(model).resolve().name if Path(model).exists() else str(model),
        "corpus": bench.corpus,
        "documents": documents,
        "seed": seed,
        "rows": rows,
        "machine": machine(),
    }


@contextmanager
def _folder(work: str | Path | None) -> Iterator[Path]:
    """The folder, or one that goes when all is done."""
    if work is not None:
        yield Path(work)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _measured(wanted: list[ParetoRow], bench: Comparison, stages: Stages) -> list[dict[str, Any]]:
    """Every row, those that are there already first of all."""
    began, made, rows = time.perf_counter(), 0, []
    with bench.report.progress(len(wanted), "compare") as step:
        for place, row in enumerate(wanted):
            there = stages.has("row", row.settings)
            figures = stages.run("row", row.settings, partial(row.measure, bench))
            budget = {} if row.budget is None else {"budget": row.budget}
            rows.append({"recipe": row.name, **budget, **figures})
            made += not there
            each = (time.perf_counter() - began) / max(made, 1)
            left = (len(wanted) - place - 1) * each / 60
            step(f"{_line(rows[-1])}; {left:.0f} minutes left")
    return rows


def _line(row: dict[str, Any]) -> str:
    at = f" at {row['budget']:g}" if "budget" in row else ""
    if "n/a" in row:
        return f"{row['recipe']}{at}: {row['n/a']}"
    return f"{row['recipe']}{at}: {_quality(row):.4f}, {row['bits_read']:.2f} bits"


def _quality(row: dict[str, Any]) -> float:
    """How far from dense: KL, a mean square, or one minus the cosine."""
    for name in ("kl", "mse"):
        if name in row:
            return float(row[name])
    return 1 - float(row["cosine"])


_COLUMNS = {
    "bits_read": "bits read", "kl": "KL to dense", "ce_increase": "CE increase",
    "agreement": "top-1", "cosine": "cosine", "mse": "squared error", "active_compute": "computed",
}  # fmt: skip


def comparison_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a comparison, fewest bits first; what could not be done comes last.

    A row on the frontier, than which no row is better at as few bits, has a star.
    """
    best = {id(row) for row in frontier(record["rows"])}
    done = sorted(
        (r for r in record["rows"] if "n/a" not in r), key=lambda r: (r["bits_read"], _quality(r))
    )
    rows = []
    for row in done:
        cells = [_cell(row, key) for key in _COLUMNS]
        star = "*" if id(row) in best else ""
        rows.append([row["recipe"], star, f"{row['budget']:g}" if "budget" in row else "", *cells])
    for row in record["rows"]:
        if "n/a" in row:
            blank = [""] * (len(_COLUMNS) - 1)
            budget = f"{row['budget']:g}" if "budget" in row else ""
            rows.append([row["recipe"], "", budget, f"n/a: {row['n/a']}", *blank])
    header = ["recipe", "best", "budget", *_COLUMNS.values()]
    used = [i for i in range(len(header)) if i == 3 or any(row[i] for row in rows)]
    return [header[i] for i in used], [[row[i] for i in used] for row in rows]


def _cell(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return ""
    return f"{row[key]:.{2 if key == 'bits_read' else 4}f}"


def frontier(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows than which none reads as few bits and is as good, fewest bits first."""
    best: list[dict[str, Any]] = []
    done = [row for row in rows if "n/a" not in row]
    for row in sorted(done, key=lambda row: (row["bits_read"], _quality(row))):
        if not best or _quality(row) < _quality(best[-1]):
            best.append(row)
    return best


def check_plot(picture: Path) -> None:
    """Raise `MoefyError` where `draw_pareto` could not write this file."""
    if picture.suffix.lower() not in PICTURES:
        raise MoefyError(f"--plot {picture}: a picture is one of {', '.join(PICTURES)}")
    if not has_plots():
        raise MoefyError(f"--plot: {NO_PLOTS}")


def draw_pareto(record: dict[str, Any], picture: Path) -> None:
    """Quality over bits read, with the frontier; rounded dense models are marks with their names."""
    check_plot(picture)
    done = [row for row in record["rows"] if "n/a" not in row]
    with pyplot() as plt:
        figure, axis = plt.subplots(figsize=(8, 5))
        _draw_rows(axis, done)
        x, y = _points(frontier(done))
        axis.step(x, y, where="post", color="#bbbbbb", lw=5, alpha=0.5, label="frontier", zorder=1)
        what = "KL to dense, nats a token" if any("kl" in row for row in done) else "1 - cosine"
        axis.set(yscale="log", xlabel="bits read per token and MLP weight (dense: 16)", ylabel=what)
        low, high = axis.get_ylim()
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        ticks = [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]
        ticks = [tick for tick in ticks if low <= tick <= high]
        axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(color=GRID, lw=0.7)
        axis.legend(frameon=False, fontsize=8)
        figure.tight_layout()
        picture.parent.mkdir(parents=True, exist_ok=True)
        # A date would make another file of the same record.
        dated = {"metadata": {"Date": None}} if picture.suffix.lower() == ".svg" else {}
        figure.savefig(picture, dpi=150, facecolor="white", **dated)


def _draw_rows(axis: Any, done: list[dict[str, Any]]) -> None:
    """A line for what was run at several budgets, a mark for each of the others."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in done:
        if "budget" in row:
            lines.setdefault(row["recipe"], []).append(row)
            continue
        at = (row["bits_read"], max(FLOOR, _quality(row)))
        axis.plot(*at, ls="", marker="D", ms=4, color=SOFT, zorder=3)
        axis.annotate(
            row["recipe"], at, xytext=(4, 4), textcoords="offset points", fontsize=7.5, color=SOFT
        )
    for number, (name, rows) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        axis.plot(*_points(rows), label=name, color=colour, marker="o", ms=5, lw=1.6, zorder=4)


def _points(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Bits and quality, fewest bits first."""
    ordered = sorted(rows, key=lambda row: float(row["bits_read"]))
    return [row["bits_read"] for row in ordered], [max(FLOOR, _quality(row)) for row in ordered]
