"""What the experts of the demo models do: the records behind docs/case-study.md, its tables and pictures.

    python experiments/case_study.py inspect llama opt   # benchmarks/records/inspect_<model>.json; 25 minutes each
    python experiments/case_study.py page                # every table and picture of the page, from the records

The page also shows `experiments/removal_bars.py` and `experiments/training_history.py`.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from demo_experts import moefied
from pages import fill

import moefy
from moefy.inspection.record import Table, rows
from moefy.run.tables import markdown

RECORDS, PAGE = Path("benchmarks/records"), Path("docs/case-study.md")
MODELS = ("llama", "opt")
WHOLE = ("layers", "routing", "random_weights", "keep_only", "screen", "non_additivity", "replication",
         "hunt_domains", "hunt_classes", "hunt_summary")  # fmt: skip
CELL = ("layer", "expert", "domain", "ce", "ce_low", "ce_high", "csi", "csi_low", "csi_high", "csi_q", "q",
        "percentile", "null_sets", "documents", "few")  # fmt: skip
DIGITS = 5


def measure(name: str, tokens: int, causal_tokens: int) -> None:
    """The whole inspection of a demo model; the record holds what the page shows and more."""
    found = moefy.inspect(
        moefied(name, Path("runs/inspect")), out=Path("runs/inspect") / name,
        tokens=tokens, causal_tokens=causal_tokens,
    )  # fmt: skip
    causal = [row for row in rows(found.table("causal")) if row["model"] == "dense"]
    mode = found.meta["settings"]["mode"]
    meta = (
        "model",
        "documents",
        "tokens",
        "settings",
        "seconds",
        "peak_memory",
        "versions",
        "machine",
    )
    record = {
        "kind": "inspection", **{key: found.meta[key] for key in meta},
        "experts": [layer["experts"] for layer in found.meta["layers"]],
        "honesty": found.honesty,
        "tables": {key: found.tables[key] for key in WHOLE if key in found.tables},
        "causal": {key: [row[key] for row in causal if row["mode"] == mode] for key in CELL},
        "domains": {key: found.tables["domains"][key] for key in ("layer", "expert", "domain", "ds", "ds_lex")},
        "stability": {key: found.tables["experts"][key] for key in ("stability", "stability_chance")},
    }  # fmt: skip
    record["seconds"]["causal matrix"] = matrix_seconds(Path("runs/inspect") / name / "work")
    file = RECORDS / f"inspect_{name}.json"
    file.write_text(json.dumps(rounded(record), indent=0) + "\n", encoding="utf-8")


def matrix_seconds(work: Path) -> float:
    """From the last part before the causal matrix to its last layer, by when their files were written."""
    before = max(file.stat().st_mtime for file in work.glob("random-weights-*.json"))
    layers = [file.stat().st_mtime for file in (work / "causal").glob("dense-mean-layer-*.json")]
    return max(layers) - before


def rounded(value: Any) -> Any:
    """The same JSON value, numbers to `DIGITS` digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(held) for key, held in value.items()}
    return [rounded(held) for held in value] if isinstance(value, list) else value


def record(name: str) -> dict[str, Any]:
    """A record by its name."""
    return json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def page() -> None:
    """All that the records say, into the page."""
    found = {name: record(f"inspect_{name}") for name in MODELS}
    fill(PAGE, "honesty", honesty(found))
    fill(PAGE, "routing", routing(found))
    fill(PAGE, "partitions", partitions(found))
    fill(PAGE, "weights", weights(found))
    fill(PAGE, "causes", causes(found))
    fill(PAGE, "kept", kept(found))
    fill(PAGE, "history", history(record("history_llama")))
    fill(PAGE, "time", seconds(found))
    fill(Path("docs/inspection_size.md"), "time", each(found["llama"]))
    draw(found)


HONEST = (
    "bits_per_byte_dense", "bits_per_byte", "kl", "kl_top_1_percent_share", "bigram_skill", "rank_over_10_share",
    "rank_over_10_share_of_kl", "induction_dense", "share_token", "share_domain", "share_rest", "lexical_recall",
    "stability",
)  # fmt: skip


def honesty(found: dict[str, dict[str, Any]]) -> str:
    """Page one of both inspections."""
    lines = []
    for key in HONEST:
        entries = [one["honesty"][key] for one in found.values()]
        shown = [interval(e["value"], e["low"], e["high"]) for e in entries]
        lines.append([entries[0]["what"], *shown])
    return markdown(["figure", *found], lines)


def interval(value: float | None, low: float | None, high: float | None) -> str:
    """A figure with its interval where it has one."""
    if value is None:
        return "none"
    return f"{value:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def over_layers(values: Iterable[float], form: str = ".2f") -> str:
    """Values of layers, the first one first."""
    return " ".join(f"{value:{form}}" for value in values)


def routing(found: dict[str, dict[str, Any]]) -> str:
    """What explains routing, layer by layer."""
    names = {
        "share_token": "the token", "share_previous": "the token before", "share_domain": "the domain",
        "share_position": "the position", "share_rest": "none of these",
    }  # fmt: skip
    lines = [
        [text, *(over_layers(one["tables"]["layers"][key]) for one in found.values())]
        for key, text in names.items()
    ]
    return markdown(
        ["share of the bits explained by", *(f"{n}, layers 0 to 5" for n in found)], lines
    )


def partitions(found: dict[str, dict[str, Any]]) -> str:
    """The model's experts beside random ones of the same sizes, both routed by the oracle."""
    names = {
        "domain_share": "domain's share of the bits", "token_share": "token's share of the bits",
        "top_energy": "energy in the experts that run", "cross_terms": "cross terms",
    }  # fmt: skip
    lines = []
    for key, text in names.items():
        for name, one in found.items():
            layers = one["tables"]["layers"]
            lines.append(
                [text, name, over_layers(layers[f"oracle_{key}"]), over_layers(layers[f"oracle_{key}_random"]),
                 over_layers(layers[f"oracle_{key}_z"], ".0f")]
            )  # fmt: skip
    return markdown(["figure", "model", "its experts", "random experts", "z"], lines)


def weights(found: dict[str, dict[str, Any]]) -> str:
    """Figures with random weights in the MLPs: means over layers, and where they tell them apart."""
    names = ("share_token", "share_domain", "cross_term", "recall", "load_gini", "bits_entropy")
    lines = []
    for key in names:
        for name, one in found.items():
            at = [row for row in rows(one["tables"]["random_weights"]) if row["figure"] == key]
            if not at:
                continue
            means = [
                np.mean([row[who] for row in at])
                for who in ("trained", "permuted", "reinitialised")
            ]
            apart = sum(bool(row["separates"]) for row in at)
            lines.append([key, name, *(f"{value:.3f}" for value in means), f"{apart} of {len(at)}"])
    return markdown(
        ["figure", "model", "trained", "entries permuted", "drawn anew", "layers told apart"], lines
    )


def causes(found: dict[str, dict[str, Any]]) -> str:
    """The causal matrix in a few figures, and the experts that one domain needs most."""
    header = ["model", "cells", "cells with few documents", "damage beyond random sets (q < .05)",
              "selective for the domain (q < .05)", "both"]  # fmt: skip
    lines, strongest = [], []
    for name, one in found.items():
        cells = rows(one["causal"])
        beyond = [below(row["q"]) for row in cells]
        selective = [below(row["csi_q"]) and row["csi"] > 0 for row in cells]
        both = [a and b for a, b in zip(beyond, selective, strict=True)]
        few = sum(row["few"] for row in cells)
        lines.append([name, *map(str, (len(cells), few, sum(beyond), sum(selective), sum(both)))])
        chosen = [row for row, good in zip(cells, both, strict=True) if good]
        for row in sorted(chosen, key=lambda row: -row["csi"])[:5]:
            strongest.append(
                [name, f"L{row['layer']}.E{row['expert']}", row["domain"],
                 interval(row["ce"], row["ce_low"], row["ce_high"]),
                 interval(row["csi"], row["csi_low"], row["csi_high"]),
                 f"{row['percentile']:.0f} %"]
            )  # fmt: skip
    second = [
        "model",
        "expert",
        "domain",
        "damage, nats",
        "beyond other domains, nats",
        "of random sets below",
    ]
    return f"{markdown(header, lines)}\n\n{markdown(second, strongest)}"


def below(q: float | None) -> bool:
    """Whether a q-value is a find."""
    return q is not None and q < 0.05


def kept(found: dict[str, dict[str, Any]]) -> str:
    """Half of the experts kept, those of a domain: damage there beside random experts kept."""
    lines = []
    for name, one in found.items():
        table = rows(one["tables"]["keep_only"])
        for share in sorted({row["share"] for row in table}):
            at = [row for row in table if row["share"] == share]
            lines.append(
                [name, f"{share:.1%}",
                 *(f"{np.mean([row[key] for row in at]):.2f}" for key in ("ce", "ce_other", "ce_random")),
                 f"{sum(row['ce'] < row['ce_random_least'] for row in at)} of {len(at)}",
                 f"{sum(row['saved_low'] > 0 for row in at)} of {len(at)}"]
            )  # fmt: skip
    header = ["model", "experts kept", "damage with the domain's own, nats", "with other domains'",
              "with random ones", "domains better than each of 20 random draws",
              "better than their mean (interval above 0)"]  # fmt: skip
    return markdown(header, lines)


def history(found: dict[str, Any]) -> str:
    """Checkpoints beside the last one."""
    lines = []
    for step in found["steps"]:
        at = step["saturation"]
        means = [np.mean([row[key] for row in at]) for key in ("saturation", "saturation_load")]
        lines.append(
            [str(step["step"]), f"{step['ce_dense']:.3f}", *(f"{value:.3f}" for value in means),
             over_layers(row["saturation"] for row in at),
             *(f"{step['routing'][key]:.3f}" for key in ("share_token", "share_domain"))]
        )  # fmt: skip
    chance = found["steps"][0]["saturation"][0]["saturation_chance"]
    header = ["step", "cross-entropy, nats", "router saturation", "by load alone", "saturation of layers 0 to 5",
              "token's share of the bits", "domain's share beyond it"]  # fmt: skip
    return f"{markdown(header, lines)}\n\nChance is {chance:.2f}. {found['tokens']} tokens."


def seconds(found: dict[str, dict[str, Any]]) -> str:
    """What the inspections took."""
    names = [*found[MODELS[0]]["seconds"]]
    lines = [[name, *(f"{one['seconds'][name]:.0f}" for one in found.values())] for name in names]
    lines.append(
        ["peak memory, GB", *(f"{one['peak_memory'] / 1e9:.1f}" for one in found.values())]
    )
    return markdown(["seconds", *found], lines)


def each(one: dict[str, Any]) -> str:
    """Time for every expert and token."""
    experts, taken = sum(one["experts"]), one["seconds"]
    tokens = one["tables"]["routing"]["tokens"][0]
    documents = dict(zip(one["causal"]["domain"], one["causal"]["documents"], strict=True))
    causal = one["settings"]["causal_tokens"]
    lines = [
        ["description, its controls and statistics", f"{taken['description']:.0f}", f"{tokens}",
         f"{1e6 * taken['description'] / tokens / experts:.1f} microseconds"],
        ["causal matrix", f"{taken['causal matrix']:.0f}", f"{causal}, {sum(documents.values())} documents",
         f"{1e6 * taken['causal matrix'] / causal / experts:.0f} microseconds, random sets included"],
        ["all of causes", f"{taken['causal']:.0f}", str(causal), ""],
        ["everything", f"{taken['in all']:.0f}", str(tokens), f"peak memory {one['peak_memory'] / 1e9:.1f} GB"],
    ]  # fmt: skip
    return markdown(["part", "seconds", "tokens", "for each expert and token"], lines)


def draw(found: dict[str, dict[str, Any]]) -> None:
    """The pictures of the page."""
    import matplotlib as mpl

    mpl.use("Agg")
    draw_routing(found)
    draw_controls(found)
    draw_causes(found)
    draw_history(record("history_llama"))


COLOURS = ("#0072b2", "#56b4e9", "#e69f00", "#009e73", "#cccccc")


def panels(count: int, width: float, height: float, *, one_scale: bool = True) -> tuple[Any, Any]:
    """A figure with panels side by side."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        1, count, figsize=(width, height), layout="constrained", sharey=one_scale
    )
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure: Any, name: str) -> None:
    figure.savefig(f"docs/case-study-{name}.png", dpi=150)


def draw_routing(found: dict[str, dict[str, Any]]) -> None:
    """What explains routing."""
    names = {"share_token": "token", "share_previous": "token before", "share_domain": "domain",
             "share_position": "position", "share_rest": "none of these"}  # fmt: skip
    figure, axes = panels(len(found), 8, 3)
    for axis, (name, one) in zip(axes, found.items(), strict=True):
        bottom = np.zeros(len(one["experts"]))
        for (key, text), colour in zip(names.items(), COLOURS, strict=True):
            values = np.maximum(one["tables"]["layers"][key], 0)
            axis.bar(range(len(values)), values, 0.7, bottom=bottom, color=colour, label=text)
            bottom += values
        axis.set_title(f"{name} demo", fontsize=10)
        axis.set_xlabel("layer")
    axes[0].set_ylabel("share of the bits of routing")
    axes[-1].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    save(figure, "routing")


def draw_controls(found: dict[str, dict[str, Any]]) -> None:
    """The domain's share of routing: of the model's experts, of random ones, of random weights."""
    figure, axes = panels(2 * len(found), 11, 3)
    for (name, one), left, right in zip(found.items(), axes[::2], axes[1::2], strict=True):
        layers = one["tables"]["layers"]
        at = np.arange(len(one["experts"]))
        left.plot(at, layers["oracle_domain_share"], "o-", color=COLOURS[0], label="its experts")
        left.plot(
            at, layers["oracle_domain_share_random"], "s--", color="#777777", label="random experts"
        )
        left.set_title(f"{name}: oracle routing", fontsize=10)
        control = [
            r for r in rows(one["tables"]["random_weights"]) if r["figure"] == "share_domain"
        ]
        for who, style, colour in (("trained", "o-", COLOURS[0]), ("permuted", "s--", "#777777"),
                                   ("reinitialised", "^:", "#777777")):  # fmt: skip
            right.plot(
                at, [row[who] for row in control], style, color=colour, label=f"{who} weights"
            )
        right.set_title(f"{name}: the router, beyond the token", fontsize=10)
        for axis in (left, right):
            axis.set_xlabel("layer")
            axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("domain's share of the bits")
    axes[0].set_ylim(0)
    save(figure, "controls")


def draw_causes(found: dict[str, dict[str, Any]], experts: int = 24) -> None:
    """Damage of the experts that some domain needs most, in every domain."""
    figure, axes = panels(len(found), 10, 5.2, one_scale=False)
    for axis, (name, one) in zip(axes, found.items(), strict=True):
        domains = sorted(set(one["causal"]["domain"]))
        square = grid(one["causal"], "ce", len(domains))
        selective = grid(one["causal"], "csi", len(domains))
        q = grid(one["causal"], "csi_q", len(domains))
        top = np.argsort(-np.nan_to_num(selective).max(1))[:experts]
        top = top[np.argsort(np.nan_to_num(selective[top]).argmax(1), kind="stable")]
        limit = np.abs(square[top]).max()
        shown = axis.imshow(square[top], cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        marks = np.argwhere((q[top] < 0.05) & (selective[top] > 0))
        axis.scatter(marks[:, 1], marks[:, 0], s=10, color="black")
        layers = one["causal"]["layer"][:: len(domains)]
        numbers = one["causal"]["expert"][:: len(domains)]
        axis.set_xticks(range(len(domains)), domains, rotation=60, ha="right", fontsize=8)
        axis.set_yticks(range(len(top)), [f"L{layers[i]}.E{numbers[i]}" for i in top], fontsize=7)
        axis.set_title(f"{name}: rise of cross-entropy, nats", fontsize=10)
        figure.colorbar(shown, ax=axis, shrink=0.8)
    save(figure, "causes")


def grid(cells: Table, name: str, domains: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """A column of the causal table `[E, C]`; NaN where there is none."""
    values = [np.nan if value is None else value for value in cells[name]]
    return np.array(values, dtype=float).reshape(-1, domains)


def draw_history(found: dict[str, Any]) -> None:
    """Router saturation over training."""
    figure, axes = panels(2, 9, 3, one_scale=False)
    steps = [step["step"] for step in found["steps"]]
    for layer in range(len(found["steps"][0]["saturation"])):
        colour = str(0.1 + 0.12 * layer)
        values = [step["saturation"][layer] for step in found["steps"]]
        axes[0].plot(
            steps,
            [v["saturation"] for v in values],
            "o-",
            ms=3,
            color=colour,
            label=f"layer {layer}",
        )
    loads = [
        np.mean([row["saturation_load"] for row in step["saturation"]]) for step in found["steps"]
    ]
    axes[0].plot(steps, loads, ":", color=COLOURS[2], label="loads alone")
    chance = found["steps"][0]["saturation"][0]["saturation_chance"]
    axes[0].axhline(chance, color=COLOURS[2], lw=0.8, label="chance")
    axes[0].set_ylabel("shared with the last checkpoint")
    for key, text, colour in (
        ("share_token", "token's share", COLOURS[0]),
        ("share_domain", "domain's share beyond it", COLOURS[2]),
    ):
        values = [step["routing"] for step in found["steps"]]
        axes[1].plot(steps, [v[key] for v in values], "o-", ms=3, color=colour, label=text)
        low, high = ([v[f"{key}_{end}"] for v in values] for end in ("low", "high"))
        axes[1].fill_between(steps, low, high, color=colour, alpha=0.2)
    axes[1].set_ylabel("share of the bits of routing")
    for axis in axes:
        axis.set_xlabel("training step")
        axis.set_ylim(0, 1)
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, "history")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    inspected = verbs.add_parser("inspect")
    inspected.add_argument("models", nargs="+", choices=MODELS)
    inspected.add_argument("--tokens", type=int, default=200_000)
    inspected.add_argument("--causal-tokens", type=int, default=20_000)
    verbs.add_parser("page")
    given = parser.parse_args()
    if given.verb == "page":
        page()
        return
    for name in given.models:
        measure(name, given.tokens, given.causal_tokens)


if __name__ == "__main__":
    main()
