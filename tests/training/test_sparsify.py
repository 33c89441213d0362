"""Sparsifying: fewer neurons are active, the checkpoint stays an ordinary one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build, example_inputs
from torch import Tensor
from transformers import AutoModelForCausalLM

from moefy.conversion.convert import convert
from moefy.data.corpus import Document, make_batches
from moefy.errors import MoefyError, RecipeError, UnsupportedModel
from moefy.experts.loading import load_dense
from moefy.experts.passes import run as forward
from moefy.models.checkpoint import Checkpoint
from moefy.models.config import read_config
from moefy.models.locate import meta_model, sites
from moefy.training.recipe import SparsifyRecipe
from moefy.training.sparsify import Activations, sparsify

RECIPE = SparsifyRecipe(
    tokens=4000, batch_tokens=400, context=32, check_every=5, learning_rate=0.02, weight=8.0
)


def text(documents: int = 200) -> list[list[int]]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(3, 90, (30,), generator=g).tolist() for _ in range(documents)]


def run(source: Path, out: Path, **options: Any) -> dict[str, Any]:
    recipe = replace(RECIPE, **options.pop("settings", {}))
    return sparsify(source, out, recipe=recipe, corpus=text(), quiet=True, **options)


@pytest.mark.parametrize("penalty", ["hoyer", "l1"])
def test_penalties_are_those_of_a_plain_loop(penalty: str, tmp_path: Path) -> None:
    source = Checkpoint.open(build("llama", tmp_path / "llama"))
    model, found = load_dense(source), sites(meta_model(read_config(source)))
    seen: list[Tensor] = []
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    activations = Activations(model, found, penalty)
    documents = [Document("d", str(i), ids=tuple(ids[: 10 + i])) for i, ids in enumerate(text(5))]
    from moefy.data.corpus import Corpus

    (batch,) = make_batches(Corpus("c", documents).samples(None, "decoder", 32))
    with torch.no_grad(), activations.over(batch):
        forward(model, batch)
    want = []
    for h_BTN in seen:
        rows = [
            h_BTN[b, t].double()
            for b, d in enumerate(batch.samples)
            for t in range(len(d.document.ids))
        ]
        one = [
            float(h.abs().sum() ** 2 / (h**2).sum() / len(h))
            if penalty == "hoyer"
            else float(h.abs().mean())
            for h in rows
        ]
        want.append(sum(one) / len(one))
    assert float(activations.mean()) == pytest.approx(sum(want) / len(want), rel=1e-5)
    assert float(activations.density()) == 1.0


@pytest.mark.parametrize("penalty", ["hoyer", "l1"])
def test_fewer_neurons_are_active_than_in_the_control(penalty: str, tmp_path: Path) -> None:
    source = build("opt", tmp_path / "opt")
    record = run(source, tmp_path / "out", settings={"penalty": penalty}, control=True)
    assert record["after"]["hoyer"] < 0.8 * record["control"]["hoyer"]
    assert record["after"]["hoyer"] < 0.8 * record["before"]["hoyer"]
    assert json.loads((tmp_path / "out" / "sparsify.json").read_text()) == json.loads(
        json.dumps(record)
    )
    assert (tmp_path / "out" / "curves.png").exists()
    # The same tensors under the same names, for plain transformers.
    old, new = (
        load_file(source / "model.safetensors"),
        load_file(tmp_path / "out" / "model.safetensors"),
    )
    assert {n: (t.shape, t.dtype) for n, t in old.items()} == {
        n: (t.shape, t.dtype) for n, t in new.items()
    }
    assert not any(torch.equal(old[name], new[name]) for name in old if "fc1.weight" in name)


@torch.no_grad()
def test_relu_takes_the_place_of_the_activation_and_it_converts(tmp_path: Path) -> None:
    source = build("llama", tmp_path / "llama")
    record = run(source, tmp_path / "out", settings={"relu": True, "penalty": "none"})
    assert record["before"]["active"] == 1.0
    assert 0.2 < record["after"]["active"] < 0.8
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.hidden_act == "relu"
    old = json.loads((source / "config.json").read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        **old,
        "hidden_act": "relu",
    }
    seen: list[Tensor] = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(
        lambda _, given: seen.append(given[0])
    )
    model(**example_inputs("llama"))
    assert 0.2 < (seen[0] == 0).float().mean() < 0.8
    converted = convert(
        tmp_path / "out", tmp_path / "moefied", recipe="fast", corpus=text(), quiet=True
    )
    assert converted["evaluation"]["total"]["kl"]["mean"] >= 0


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = build("opt", tmp_path / "opt")
    run(source, tmp_path / "whole")
    from moefy.training import loop

    add = loop.Log.add

    def interrupted(self: Any, row: dict[str, Any]) -> None:
        add(self, row)
        if row["step"] == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Log, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()
    run(source, tmp_path / "cut", resume=True)
    want, got = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_what_cannot_be_sparsified_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="cannot be changed by a key of its config"):
        run(build("bloom", tmp_path / "bloom"), tmp_path / "out", settings={"relu": True})
    with pytest.raises(RecipeError, match="did you mean 'hoyer'"):
        replace(RECIPE, penalty="hoyr")
    with pytest.raises(MoefyError, match="no cross-entropy to train on"):
        run(build("bert_base", tmp_path / "bert"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
