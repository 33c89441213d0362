"""Attention heads routed, pruned and drawn at random, on the demo models: the table of docs/attention.md.

python experiments/heads.py            # measure (about 20 minutes on one core), then rewrite the table
python experiments/heads.py --table    # rewrite the table from the records
python experiments/heads.py --check    # exit 1 where the table is not that of the records

All MLPs run in full. What is captured of the dense model is captured once for all variants; fitting and
evaluation are those of `moefy convert MODEL OUT --density 1.0 --set attention.density=... ...`.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from pages import filled

from moefy import recipe as recipes
from moefy.conversion.capture import Captured, capture
from moefy.conversion.layer import fit_heads, fit_layer, layer_sample
from moefy.conversion.plan import Plan, plan
from moefy.data.corpus import load_corpus
from moefy.data.inputs import read_batches
from moefy.data.shards import EVALUATED_DOCUMENTS, HELD_OUT_SHARE, by_role
from moefy.evaluation.evaluate import evaluate
from moefy.experts.loading import load_dense, moefied
from moefy.experts.placement import placement
from moefy.models.artefact import FULL, Artefact
from moefy.models.checkpoint import Checkpoint
from moefy.models.heads import read_heads
from moefy.models.locate import read_mlp
from moefy.models.mlp import HeadOutputs
from moefy.recipe import Recipe
from moefy.run.computing import machine, versions
from moefy.run.console import Reporter
from moefy.run.tables import markdown

RECORDS, PAGE = Path("benchmarks/records"), Path("docs/attention.md")
DENSE_MLPS = {
    "density": 1.0,
    "partition.method": "contiguous",
    "router.name": "random",
    "compensation.name": "none",
}
VARIANTS = {
    f"{which}; {stand_in}": {**chosen, **instead}
    for stand_in, instead in {
        "mean": {},
        "mean and residual": {"compensation": "mean_residual"},
        "nothing": {"compensation": "none"},
    }.items()
    for which, chosen in {
        "router": {},
        "linear router": {"router": "linear"},
        "static pruning": {"router": "static"},
        "random router": {"router": "random"},
    }.items()
    if stand_in == "mean" or which in ("router", "static pruning")
}
"""Which heads run, and what stands in for the others."""
DENSITIES = (0.67, 0.5)


def measure(name: str, model: Path) -> dict[str, Any]:
    checkpoint, corpus = Checkpoint.open(model), load_corpus()
    base = recipes.override(Recipe(), DENSE_MLPS)
    texts = by_role(corpus, base.seed)
    limits = {
        "partition": base.partition.tokens,
        "router": base.router.tokens,
        "held-out": round(base.router.tokens * HELD_OUT_SHARE),
    }
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        todo = plan(checkpoint, recipes.override(base, {"attention.density": 0.5}), corpus.name)
        places: list[Any] = [*todo.sites]
        for site in todo.head_sites:
            places += site.places(len(todo.sites))
        samples = {}
        for part, limit in limits.items():
            samples[part] = Captured(Path(folder), part)
            capture(
                load_dense(checkpoint, **placement()), places,
                read_batches(checkpoint, todo.kind, texts[part], base.context, limit), samples[part],
                limit=limit, seed=base.seed, report=Reporter(),
            )  # fmt: skip
        text = texts["evaluation"].take(EVALUATED_DOCUMENTS)
        batches = read_batches(checkpoint, todo.kind, text, base.context)
        for density in DENSITIES:
            for label, settings in VARIANTS.items():
                chosen = {f"attention.{key}": value for key, value in settings.items()}
                recipe = recipes.override(base, {**chosen, "attention.density": density})
                todo = plan(checkpoint, recipe, corpus.name)
                converted, fits = convert(checkpoint, todo, recipe, samples)
                found = evaluate(converted, batches)
                kept = ("tokens", "head_density", "attention_budget", "head_density_by_block")
                rows.append(
                    {
                        "label": label,
                        "density": density,
                        "attention": recipes.to_dict(recipe)["attention"],
                        **{key: found[key] for key in kept},
                        "ffn_density": found["ffn_density"],
                        **{key: found["total"][key] for key in ("ce_dense", "ce_increase", "kl")},
                        "routers": fits,
                    }
                )
                print(name, density, label, found["total"]["kl"]["mean"], flush=True)
    return {
        "kind": "attention heads",
        "model": name,
        "source": checkpoint.hashes(),
        "corpus": {"name": corpus.name, "sha256": corpus.sha256},
        "recipe": recipes.to_dict(base),
        "rows": rows,
        "machine": machine(),
    }


def convert(checkpoint: Checkpoint, todo: Plan, recipe: Recipe, samples: dict[str, Captured]):
    """The moefied model in memory, and how the routers of its blocks came out."""
    model = load_dense(checkpoint, **placement())

    def get(name: str):
        return model.get_parameter(name).detach().float()

    tensors, layers, heads, fits = {}, [], [], []
    for site in todo.sites:
        layer = fit_layer(
            read_mlp(site, get), todo, site, recipe, layer_sample(samples, todo, site)
        )
        layers.append(layer.entry)
        tensors |= {f"layers.{site.index}.{key}": value for key, value in layer.tensors.items()}
    for site in todo.head_sites:
        block = fit_heads(
            HeadOutputs.behind(read_heads(site, get).down_ND), todo, site, recipe, samples
        )
        heads.append(block.entry)
        fits.append({"block": site.block, **block.fit.record()})
        tensors |= {f"heads.{site.index}.{key}": value for key, value in block.tensors.items()}
    artefact = Artefact(
        form=FULL, source={}, recipe=recipes.to_dict(recipe), corpus={}, layers=layers,
        heads=heads, tensors=tensors, versions=versions(),
    )  # fmt: skip
    moefied(model, artefact, permute=True)
    return model, fits


def table() -> str:
    rows = []
    for file in sorted(RECORDS.glob("heads_*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        for row in found["rows"]:
            low, high = row["kl"]["ci95"]
            captured = [fit["captured"] for fit in row["routers"]]
            rows.append(
                [
                    found["model"],
                    f"{row['head_density']:.2f}",
                    row["label"],
                    f"{row['kl']['mean']:.3f} [{low:.3f}, {high:.3f}]",
                    f"{row['ce_increase']['mean']:.3f}",
                    f"{sum(captured) / len(captured):.3f}",
                    f"{row['attention_budget']:.2f}",
                ]
            )
    header = [
        "model", "head density", "which heads run; what stands in for the others", "KL to dense", "CE increase",
        "captured of the oracle's", "attention budget",
    ]  # fmt: skip
    return markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="rewrite the table, measure nothing")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--models", nargs="+", default=["llama", "opt"])
    options = parser.parse_args()
    if not options.table and not options.check:
        for name in options.models:
            record = measure(name, Path("moefy/demo") / name)
            text = json.dumps(record, indent=1) + "\n"
            (RECORDS / f"heads_{name}.json").write_text(text, encoding="utf-8")
    old = PAGE.read_text(encoding="utf-8")
    new = filled(old, "heads", table())
    if options.check:
        sys.exit(int(new != old))
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
