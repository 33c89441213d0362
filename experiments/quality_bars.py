"""Checks of quality that are not on the Pareto axis; each writes benchmarks/records/bar_{name}.json.

python experiments/quality_bars.py gap         # share of the gap from random to oracle that an MLP router closes
python experiments/quality_bars.py relu        # cross-entropy increase of the ReLU demo model at density 0.2
python experiments/quality_bars.py dynamic     # static top-k, dynamic k, allocated densities at equal mean density
python experiments/quality_bars.py cost        # seconds to convert one 7B-shaped layer, and how it grows
python experiments/quality_bars.py embeddings FOLDER   # a sentence encoder: cosine and nearest-centroid accuracy
"""

import argparse
import importlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import LlamaConfig, LlamaForCausalLM

from moefy import recipe as recipes
from moefy.benchmark.compare import Comparison
from moefy.conversion.convert import convert
from moefy.data.corpus import load_corpus
from moefy.data.inputs import read_batches
from moefy.data.shards import split_shards
from moefy.errors import MoefyError
from moefy.experts.loading import load
from moefy.experts.passes import run
from moefy.experts.sparse_mlp import all_experts
from moefy.models.checkpoint import Checkpoint
from moefy.run.computing import machine

DEMO = Path("moefy/demo")
WORK = Path("runs/pareto")
conversion = importlib.import_module("moefy.conversion.convert")
LAYERS = ((4096, 11008), (2048, 5504), (1024, 2752))
"""Width and neurons of the layers whose conversion `cost` times."""


def gap() -> list[dict[str, Any]]:
    rows = []
    for name in ("llama", "opt"):
        bench = Comparison(DEMO / name, WORK / name, documents=22)
        for size in (32, 8):
            for density in (0.25, 0.5):
                recipe = recipes.from_dict(
                    {
                        "density": density,
                        "partition": {"expert_size": size},
                        "router": {"name": "mlp", "tokens": 32768},
                        "compensation": {"name": "none"},
                    }
                )
                row = bench.run(recipe)
                fits = row["routers"]
                closed = [fit["gap_closed"] for fit in fits]
                rows.append(
                    {
                        "model": name, "expert_size": size, "density": density, "kl": row["kl"],
                        "gap_closed": sum(closed) / len(closed), "least_layer": min(closed),
                    }
                )  # fmt: skip
    return rows


def relu() -> list[dict[str, Any]]:
    bench = Comparison(DEMO / "opt", WORK / "opt", documents=44)
    rows = []
    for name in ("fast", "largest_inputs"):
        row = bench.run(recipes.override(recipes.load(name), {"density": 0.2}))
        dense = float(bench.dense_nats())
        rows.append(
            {
                "recipe": name, "ffn_density": row["ffn_density"],
                "active_budget": row["active_budget"], "kl": row["kl"], "ce_dense": dense,
                "ce_increase": row["ce_increase"], "relative": row["ce_increase"] / dense,
            }
        )  # fmt: skip
    return rows


def dynamic() -> Iterator[dict[str, Any]]:
    variants = {
        "static top-k": {"selection.name": "topk", "budget.name": "uniform"},
        "threshold": {"selection.name": "threshold", "budget.name": "uniform"},
        "dynamic_k": {"selection.name": "dynamic_k", "budget.name": "uniform"},
        "top_p": {"selection.name": "top_p", "budget.name": "uniform"},
        "top-k, greedy": {"selection.name": "topk", "budget.name": "greedy"},
        "threshold, greedy": {"selection.name": "threshold", "budget.name": "greedy"},
        "threshold, solver": {"selection.name": "threshold", "budget.name": "solver"},
    }
    for name in ("llama", "opt"):
        bench = Comparison(DEMO / name, WORK / name, documents=22)
        for density in (0.2, 0.4):
            for variant, chosen in variants.items():
                recipe = recipes.override(recipes.load("fast"), {"density": density, **chosen})
                key = {"model": name, "density": density, "variant": variant}
                try:
                    row = bench.run(recipe)
                except MoefyError as error:  # scores after ReLU are signed, which some cannot take
                    yield {**key, "n/a": str(error)}
                    continue
                kept = ("kl", "ce_increase", "ffn_density", "density_by_layer")
                yield {**key, **{name: row[name] for name in kept}}


def cost() -> Iterator[dict[str, Any]]:
    """Whole conversions of one-layer models with random weights, stage by stage."""
    # Verification is not what is timed, and takes longer than all else.
    conversion.EVALUATED_DOCUMENTS = 4
    documents = [torch.randint(3, 500, (256,)).tolist() for _ in range(160)]
    for width, neurons in LAYERS:
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=neurons,
            num_hidden_layers=1,
            num_attention_heads=width // 128,
            vocab_size=512,
        )
        with tempfile.TemporaryDirectory() as work:
            source = Path(work) / "source"
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(source)
            for name in ("fast", "largest_inputs"):
                record = convert(source, Path(work) / name, recipe=name, corpus=documents)
                seconds = record["conversion"]["seconds"]
                yield {
                    "recipe": name, "width": width, "neurons": neurons,
                    "fit_and_tune": seconds["fit"] + seconds["tune"], "stages": seconds,
                    "threads": torch.get_num_threads(),
                }  # fmt: skip


@torch.no_grad()
def embeddings(folder: str) -> list[dict[str, Any]]:
    """Mean-pooled sentence embeddings; centroids from documents of the router shard."""
    rows = []
    shards = split_shards(load_corpus(None), 0)
    checkpoint = Checkpoint.open(folder)
    batches = {
        name: read_batches(checkpoint, "encoder", shards[name].take(176), 256)
        for name in ("router", "evaluation")
    }
    with tempfile.TemporaryDirectory() as work:
        for name in ("fast", "largest_inputs"):
            convert(
                folder,
                Path(work) / name,
                recipe=recipes.override(recipes.load(name), {"density": 0.5}),
            )
            model = load(Path(work) / name, dtype=torch.float32)

            def embed(which: str) -> tuple[Tensor, list[str]]:
                found, domains = [], []
                for batch in batches[which]:
                    hidden = run(model, batch).last_hidden_state  # type: ignore[attr-defined]  # noqa: B023
                    mask = batch.mask()[..., None].float()  # type: ignore[index]
                    found.append(normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
                    domains += [sample.document.domain for sample in batch.samples]
                return torch.cat(found), domains

            def accuracy(train: tuple[Tensor, list[str]], test: tuple[Tensor, list[str]]) -> float:
                labels = sorted(set(train[1]))
                centroid = torch.stack(
                    [train[0][[d == label for d in train[1]]].mean(0) for label in labels]
                )
                guess = (test[0] @ normalize(centroid, dim=-1).T).argmax(1)
                right = [labels[g] == d for g, d in zip(guess.tolist(), test[1], strict=True)]
                return sum(right) / len(right)

            sparse = {which: embed(which) for which in batches}
            with all_experts(model):
                dense = {which: embed(which) for which in batches}
            cosine = (sparse["evaluation"][0] * dense["evaluation"][0]).sum(-1)
            rows.append(
                {
                    "recipe": name, "density": 0.5, "cosine_mean": float(cosine.mean()),
                    "cosine_p1": float(cosine.quantile(0.01)),
                    "accuracy_dense": accuracy(dense["router"], dense["evaluation"]),
                    "accuracy_moefied": accuracy(sparse["router"], sparse["evaluation"]),
                    "documents": len(cosine),
                }
            )  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bar", choices=["gap", "relu", "dynamic", "cost", "embeddings"])
    parser.add_argument("folder", nargs="?")
    args = parser.parse_args()
    found = embeddings(args.folder) if args.bar == "embeddings" else globals()[args.bar]()
    record = {"kind": f"bar {args.bar}", "rows": [], "machine": machine()}
    for row in found:
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        record["rows"].append(row)
        file = Path(f"benchmarks/records/bar_{args.bar}.json")
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
