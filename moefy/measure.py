"""Evaluate, time and run folders that `convert` wrote: what the CLI's verbs call."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from moefy.artefact import read_artefact
from moefy.benchmark import bench_layer, bench_model
from moefy.checkpoint import Checkpoint
from moefy.console import Reporter
from moefy.data import load_corpus, split_shards
from moefy.errors import MoefyError, RecipeError, unknown_choice
from moefy.evaluate import evaluate
from moefy.inputs import load_tokenizer, read_batches
from moefy.modeling import (
    SparseMlp,
    all_experts,
    load,
    load_dense,
    placement,
    sparse_mlps,
    weights_of,
)
from moefy.recipe import from_dict
from moefy.routing import ROUTERS, choose

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def evaluate_folder(
    folder: Path,
    *,
    against: str | None = None,
    corpus: Any = None,
    documents: int = 1 << 30,
    router: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """`moefy.evaluate.evaluate` for a folder, on its evaluation shard.

    The corpus it was converted with is split as conversion split it; any other corpus is read
    whole. `router` puts another router that needs no fitting in the place of the fitted one.
    """
    model = load(folder, **placement())
    artefact = read_artefact(folder, verify=False)
    recipe = from_dict(artefact.recipe)
    text = load_corpus(corpus)
    if text.sha256 == artefact.corpus["sha256"]:
        text = split_shards(text, recipe.seed)["evaluation"]
    weights = weights_of(artefact, folder, verify=False)
    kind = model.moefy_sites[0].family.kind  # type: ignore[union-attr,index]
    batches = read_batches(weights, kind, text.take(documents), recipe.context)
    if router is not None:
        for module in sparse_mlps(model).values():
            _replace_router(module, router)
    dense = None if against is None else load_dense(Checkpoint.open(against), **placement())
    record = evaluate(model, batches, against=dense, report=Reporter(quiet=quiet))
    return {
        **record,
        "model": artefact.source["name"],
        "router": router or artefact.layers[0].router["name"],
        "corpus": {"name": text.name, "sha256": text.sha256},
        "recipe": artefact.recipe,
    }


def _replace_router(module: SparseMlp, name: str) -> None:
    kind = choose(ROUTERS, "router", name)
    if kind.trainable:
        raise RecipeError(
            f"router '{name}' needs fitting: convert again with --set router.name={name}"
        )
    routed = module.weights.take(slice(module.shared * module.expert_size, None))
    replacement = kind(routed.width, module.experts - module.shared, 0)
    replacement.initialise(routed)
    module.router = replacement


def bench_folder(
    folder: Path, prompt: int, generated: int, samples: int, *, quiet: bool = False
) -> dict[str, Any]:
    """`bench_model` of a folder against the stock model of the same weights."""
    sparse = load(folder, **placement())
    dense = load_dense(weights_of(read_artefact(folder, verify=False), folder), **placement())
    return bench_model(
        dense,
        sparse,
        prompt=prompt,
        generated=generated,
        samples=samples,
        report=Reporter(quiet=quiet),
    )


def bench_shape(
    shape: str, dtype: str, tokens: int, samples: int, compiled: bool = False
) -> dict[str, Any]:
    """`bench_layer` of a shape written `D,N,E,k`."""
    if dtype not in DTYPES:
        raise MoefyError(unknown_choice("dtype", dtype, DTYPES))
    numbers = shape.split(",")
    if len(numbers) != 4 or not all(part.strip().isdigit() for part in numbers):
        raise MoefyError(f"--layer {shape}: expected D,N,E,k, such as 4096,11008,64,16")
    width, neurons, experts, k = map(int, numbers)
    if not experts or neurons % experts or not 0 < k <= experts:
        raise MoefyError(f"--layer {shape}: N must be a multiple of E, and k from 1 to E")
    return bench_layer(
        width=width, neurons=neurons, experts=experts, k=k, tokens=tokens, dtype=DTYPES[dtype],
        samples=samples, compiled=compiled,
    )  # fmt: skip


def generate_text(
    folder: Path, prompt: str, *, tokens: int, sample: bool = False, dense: bool = False
) -> str:
    """Continue `prompt`; returns prompt and continuation."""
    model = load(folder, **placement())
    if not model.can_generate():
        raise MoefyError(f"{folder}: a {type(model).__name__} does not generate text")
    tokenizer = load_tokenizer(weights_of(read_artefact(folder, verify=False), folder).folder)
    if tokenizer is None:
        raise MoefyError(f"{folder}: has no tokenizer; use moefy.load and token ids from Python")
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    encoded.pop("token_type_ids", None)
    with all_experts(model) if dense else nullcontext():
        ids = model.generate(**encoded, max_new_tokens=tokens, do_sample=sample)  # type: ignore[operator]
    text: str = tokenizer.decode(ids[0], skip_special_tokens=True)
    return text
