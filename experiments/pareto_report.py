"""From the records of experiments/pareto.py: tables, ratios to the best peer, and a plot per model.

python experiments/pareto_report.py                # writes docs/pareto.md and docs/pareto_*.png
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from moefy.run.tables import markdown

RECORDS = Path("benchmarks/records")
OURS = ("fast", "largest_inputs", "best", "low_bit", "export")
CONTROLS = ("oracle", "pruning", "random")
TRAINING_FREE = ("teal", "wina", "cats", "griffin", "cmoe", "expertweaver")
INTRO = """# Recipes at equal active budgets

Every recipe on the same model, the same captured activations and the same evaluation documents, which
nothing was fitted on. *Active budget*: MLP weights read per token over the dense MLPs', router, compensation and
always-on parts included. *Computed*: multiplications over the dense MLPs'. The two are the same for every recipe but
`low_bit`, whose router reads a 2-bit copy of the gate: a 2-bit weight counts an eighth in the budget (memory traffic
of 16-bit weights) and whole in what is computed, so the second panel is where it has to be judged by arithmetic.

Peers stand at their best expert size of those tried, budget by budget. `n/a`: the method cannot go
below that budget; `not run`: nobody has run it yet. Means over seeds (of shards and fits) with the half-width of a
95 % t-interval; how many seeds stands in the last table. Documents of the evaluation shard: 22 for the demo models,
44 for the others. Thresholds drift between documents, so a budget is met within 0.02. The best of all recipes but
ours and the controls is *the best peer*, whichever it is at that budget.
*Oracle*: single neurons chosen by their true contribution, nothing for the others; choosing is not counted, so it is a
bound and no method. *pruning*, *random*: static pruning at equal size; random experts chosen at random.
Made by `experiments/pareto.py` and `experiments/pareto_report.py` from `benchmarks/records/pareto_*.json`.
"""
ABOUT = {
    "llama": "Bundled demo model: SwiGLU, D 192, N 1024, 6 layers.",
    "opt": "Bundled demo model: ReLU, D 192, N 1024, 6 layers.",
    "minilm": "all-MiniLM-L6-v2, a sentence encoder: GELU, D 384, N 1536, 6 layers, on the bundled corpus. Figures are "
    "one minus the cosine of hidden states, token by token.",
    "babyllama": "EN10/BabyLlama, characters: SwiGLU, D 128, N 352, 5 layers, on TinyStories. A small model trained "
    "long: hardly a neuron can be spared, and every recipe loses much at 0.25.",
    "stories260K": "karpathy/tinyllamas 260K: SwiGLU, D 64, N 172, 5 layers, on TinyStories. As above, more so; at 0.5 "
    "TEAL is better than anything of ours.",
    "relu-stories": "A GPT-2 shape with ReLU, characters: D 64, N 256, 4 layers, on TinyStories.",
    "sort": "minGPT that sorts six digits: GELU, D 48, N 192, 3 layers, on its 729 inputs. Static pruning, a "
    "control, is better than every recipe at 0.25: for one task the same neurons serve every token.",
}
"""What a model is, in the order in which they are shown."""

EXACT = 1e-7
"""KL below which a model is the dense one, rounding aside."""

T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}

RENAMED = {"default": "largest_inputs"}
"""Recipes that had another name when they were measured."""
IMPOSSIBLE: set[tuple[str, str, float]] = set()
"""(model, recipe, budget) at which a recipe said that it cannot serve."""

Rows = dict[tuple[str, float], dict[int | None, list[dict[str, Any]]]]


def load() -> dict[str, Rows]:
    """Model -> (recipe, budget) -> expert size -> the rows of its seeds."""
    models: dict[str, Rows] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for file in sorted(RECORDS.glob("pareto_*_seed*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        for row in record["rows"]:
            row, name = {**row, "seed": record["seed"]}, RENAMED.get(row["recipe"], row["recipe"])
            if metric(row) is not None:
                models[record["model"]][name, row["budget"]][row["expert_size"]].append(row)
            elif "n/a" in row:
                IMPOSSIBLE.add((record["model"], name, row["budget"]))
    return models


def metric(row: dict[str, Any]) -> float | None:
    """KL to dense, or for encoders one minus the cosine."""
    if "kl" in row:
        # Of equal distributions rounding may leave less than nothing.
        return max(0.0, float(row["kl"]))
    return 1 - float(row["cosine"]) if "cosine" in row else None


def mean(rows: list[dict[str, Any]], value: Any = metric) -> float:
    return sum(value(row) for row in rows) / len(rows)


def half_width(rows: list[dict[str, Any]]) -> float | None:
    if len(rows) < 2:
        return None
    centre = mean(rows)
    spread = math.sqrt(sum((metric(row) - centre) ** 2 for row in rows) / (len(rows) - 1))
    return T95[len(rows)] * spread / math.sqrt(len(rows))


def best_size(sizes: dict[int | None, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    return min(sizes.values(), key=mean)


def table(model: str, rows: Rows) -> str:
    budgets = sorted({budget for _, budget in rows})
    names = sorted({name for name, _ in rows}, key=lambda n: (n not in OURS, n in CONTROLS, n))
    lines = []
    for name in names:
        line = [
            f"**{name}**" if name in OURS else f"{name} (control)" if name in CONTROLS else name
        ]
        for budget in budgets:
            sizes = rows.get((name, budget))
            if not sizes:
                line.append("n/a" if (model, name, budget) in IMPOSSIBLE else "not run")
                continue
            found = best_size(sizes)
            width = half_width(found)
            line.append(f"{mean(found):.4f}" + (f" ± {width:.4f}" if width is not None else ""))
        lines.append(line)
    return markdown(["recipe", *(f"budget {b}" for b in budgets)], lines)


def ratios(rows: Rows) -> str:
    budgets = sorted({budget for _, budget in rows})
    lines = []
    for name in OURS:
        line = [name]
        for budget in budgets:
            mine = rows.get((name, budget))
            peers = {
                other: mean(best_size(sizes))
                for (other, b), sizes in rows.items()
                if b == budget
                and other not in (*OURS, *CONTROLS)
                and (name != "fast" or other in TRAINING_FREE)
                and (name != "export" or other == "moefication")
            }
            if not mine or not peers:
                line.append("")
                continue
            best = min(peers, key=lambda other: peers[other])
            value = mean(best_size(mine))
            both = value < EXACT and peers[best] < EXACT
            line.append(f"both 0 ({best})" if both else f"{value / peers[best]:.2f} x {best}")
        lines.append(line)
    return markdown(["recipe", *(f"budget {b}" for b in budgets)], lines)


def computed(rows: Rows) -> str:
    lines = []
    for name in OURS:
        for budget in sorted({budget for _, budget in rows}):
            found = rows.get((name, budget))
            if found:
                chosen = best_size(found)
                lines.append(
                    [
                        name, f"{budget}", f"{mean(chosen, lambda r: r['active_budget']):.3f}",
                        f"{mean(chosen, lambda r: r['active_compute']):.3f}",
                        f"{mean(chosen, lambda r: r['ffn_density']):.3f}",
                        f"{mean(chosen, lambda r: r['ce_increase']):.4f}" if "ce_increase" in chosen[0] else "",
                        f"{mean(chosen, lambda r: r['seconds']):.0f}", str(len(chosen)),
                    ]
                )  # fmt: skip
    header = [
        "recipe",
        "budget",
        "read",
        "computed",
        "FFN density",
        "CE increase",
        "seconds to convert",
        "seeds",
    ]
    return markdown(header, lines)


AXES = {
    "active_budget": "active budget (memory traffic of MLP weights per token / dense)",
    "active_compute": "MLP multiplications per token / dense",
}


def plot(model: str, rows: Rows) -> str:
    """Quality against what is read, and beside it against what is computed."""
    figure, panels = plt.subplots(1, 2, figsize=(14, 5.5), sharey=True)
    for axes, axis in zip(panels, AXES, strict=True):
        draw(axes, rows, axis)
    panels[0].set_ylabel("KL to dense, nats per token (1 - cosine for encoders)")
    panels[0].legend(fontsize=8, ncols=2)
    figure.suptitle(f"{model}: quality against what is read, and against what is computed")
    file = Path("docs") / f"pareto_{model}.png"
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)
    return file.name


def draw(axes: Any, rows: Rows, axis: str) -> None:
    names = sorted({name for name, _ in rows}, key=lambda n: (n in OURS, n))
    for index, name in enumerate(names):
        points = []
        for budget in sorted({b for n, b in rows if n == name}):
            found = best_size(rows[name, budget])
            points.append(
                (
                    mean(found, lambda r: r.get(axis, r["active_budget"])),
                    mean(found),
                    half_width(found) or 0.0,
                )
            )
        x, y, width = zip(*points, strict=True)
        ours, control = name in OURS, name in CONTROLS
        colour = plt.get_cmap("tab20")(index % 20)
        axes.plot(
            x, y, label=name, color=colour, marker="o" if ours else "s" if not control else "x",
            linewidth=2.4 if ours else 1.2, linestyle=":" if control else "-",
        )  # fmt: skip
        low = [max(a - b, 1e-7) for a, b in zip(y, width, strict=True)]
        high = [a + b for a, b in zip(y, width, strict=True)]
        axes.fill_between(x, low, high, color=colour, alpha=0.15)
    axes.set_yscale("log")
    axes.set_xlabel(AXES[axis])
    axes.grid(alpha=0.3, which="both")


def main() -> None:
    parts = [INTRO]
    found = load()
    for model in sorted(found, key=lambda name: (name not in ABOUT, [*ABOUT, name].index(name))):
        rows = found[model]
        seeds = {
            row["seed"] for sizes in rows.values() for found in sizes.values() for row in found
        }
        parts += [
            f"## {model}\n",
            ABOUT.get(model, "") + "\n",
            f"![{model}]({plot(model, rows)})\n",
            f"Seeds: {', '.join(map(str, sorted(seeds)))}.\n",
            table(model, rows) + "\n",
            "Over the best peer (`fast`: the best training-free one; `export`: MoEfication):\n",
            ratios(rows) + "\n",
            computed(rows) + "\n",
        ]
    Path("docs/pareto.md").write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
