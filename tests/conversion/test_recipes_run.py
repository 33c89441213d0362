"""Every shipped recipe, made as small as the model, converts one and gives what it promises."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_conversion import corpus_for
from tiny_models import build, example_inputs

import moefy
from moefy import recipe as recipes
from moefy.conversion.convert import convert
from moefy.errors import RecipeError
from moefy.evaluation.outputs import values_of
from moefy.experts.loading import load_dense
from moefy.experts.sparse_mlp import all_experts, sparse_mlps
from moefy.models.checkpoint import Checkpoint
from moefy.recipe import Recipe

BASELINES = ["teal", "wina"]
NAMES = sorted(set(recipes.shipped()) - set(BASELINES))


def small(name: str) -> Recipe:
    """The shipped recipe with fewer tokens and, where a size is given, experts that fit 64 neurons."""
    recipe = recipes.load(name)
    settings: dict[str, Any] = {
        "context": 32,
        "partition.tokens": 128,
        "router.tokens": 256,
        "router.epochs": min(2, recipe.router.epochs),
        "router.batch_size": 64,
        "density": 0.5,
    }
    if recipe.partition.expert_size is not None:
        settings["partition.expert_size"] = min(8, recipe.partition.expert_size)
    if recipe.partition.expert_size is None and recipe.partition.experts is None:
        settings["partition.expert_size"] = 8
    if recipe.distil.steps:
        settings |= {"distil.steps": 2, "distil.tokens": 60}
    return recipes.override(recipe, settings)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids of three domains, for recipes that compare them."""
    file = tmp_path_factory.mktemp("corpus") / "ids.jsonl"
    rows = [
        {"input_ids": ids, "domain": f"d{i % 3}", "source_id": str(i)}
        for i, ids in enumerate(corpus_for("llama"))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_converts(name: str, corpus: Path, tmp_path: Path) -> None:
    source, recipe = build("llama", tmp_path / "source"), small(name)
    record = convert(source, tmp_path / "out", recipe=recipe, corpus=corpus, quiet=True)
    model = moefy.load(tmp_path / "out")
    inputs = example_inputs("llama")
    # Rounded, the result is what plain transformers makes of it, in the neurons' own order.
    rounded = recipe.storage.bits < 16
    stock = load_dense(Checkpoint.open(tmp_path / "out" if rounded else source))
    dense = values_of(stock, stock(**inputs))
    with all_experts(model):
        assert ((values_of(model, model(**inputs)) - dense).norm() / dense.norm()) < 1e-5
    sparse = values_of(model, model(**inputs))
    assert ((sparse - dense).norm() / dense.norm()) > 1e-3
    quality = record["evaluation"]
    density = quality["ffn_density"]
    if recipe.selection.name == "prompt_static":
        # Half of every document is dense, rounded down by the token.
        assert 0.6 < density < 0.76
    else:
        # Selections that vary were set on other documents of very few tokens.
        assert density == pytest.approx(0.5, abs=0.02 if recipe.selection.name == "topk" else 0.15)
    assert quality["active_budget"] > 0
    for module in sparse_mlps(model).values():
        if recipe.partition.shared is None:
            assert module.shared < module.experts / 2
        else:
            assert module.shared == recipe.partition.shared
    ids = inputs["input_ids"][:1]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


@pytest.mark.parametrize("name", BASELINES)
def test_baselines_serve_evaluation_only(name: str, tmp_path: Path) -> None:
    source = build("llama", tmp_path / "source")
    with pytest.raises(RecipeError, match=f"baseline '{name}': it serves evaluation only"):
        convert(source, tmp_path / "out", recipe=name, corpus=corpus_for("llama"), quiet=True)
    assert not (tmp_path / "out").exists()


def test_methods_that_need_a_gate_or_domains_say_so(tmp_path: Path) -> None:
    opt, llama = build("opt", tmp_path / "opt"), build("llama", tmp_path / "llama")
    with pytest.raises(RecipeError, match="reads the gate"):
        convert(opt, tmp_path / "a", recipe=small("cats"), corpus=corpus_for("opt"), quiet=True)
    with pytest.raises(RecipeError, match="fewer than two"):
        convert(
            llama, tmp_path / "b", recipe=small("expertweaver"),
            corpus=corpus_for("llama"), quiet=True,
        )  # fmt: skip
    for name in ("a", "b"):
        assert not (tmp_path / name).exists()


@torch.no_grad()
@pytest.mark.parametrize("name", ["default", "best"])
def test_layers_are_tuned_together_in_sixteen_bits(
    name: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on GPUs and on CPUs with such arithmetic: samples in fp32 meet weights in bf16."""
    monkeypatch.setattr("moefy.experts.placement._has_bf16", lambda: True)
    source = build("llama", tmp_path / "source")
    load_dense(Checkpoint.open(source), dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    shutil.copytree(source, tmp_path / "half", dirs_exist_ok=True, ignore=ignore_weights)
    settings = {"budget.per": "time", "distil.scope": "layer", "budget.name": "solver"}
    for density in (0.25, 0.75):  # some of the gate, and all of it
        recipe = recipes.override(small(name), {**settings, "density": density})
        out = tmp_path / f"{density}"
        record = convert(tmp_path / "half", out, recipe=recipe, corpus=corpus, quiet=True)
        assert record["conversion"]["tuning"]["budget"]["held_out_kl"] < 1
        model = moefy.load(out)
        assert {m.up_ND.dtype for m in sparse_mlps(model).values()} == {torch.bfloat16}
        assert values_of(model, model(**example_inputs("llama"))).isfinite().all()


def ignore_weights(_: str, names: list[str]) -> set[str]:
    return {name for name in names if name.endswith(".safetensors") or name == "config.json"}
