"""Layers that stay on disk until they run give the numbers of the model in memory."""

from pathlib import Path

import pytest
import torch
from tiny_conversion import convert_tiny
from tiny_models import build, example_inputs

import moefy
from moefy.errors import MoefyError
from moefy.evaluation import folder as measure
from moefy.evaluation.outputs import values_of
from moefy.experts.placement import placement
from moefy.experts.sparse_mlp import all_experts, sparse_mlps
from moefy.models.checkpoint import Checkpoint


@torch.no_grad()
def run(model, name):
    return values_of(model, model(**example_inputs(name)))


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "bloom"])
def test_offloaded_layers_compute_the_same(name, adapter, tmp_path):
    source = build(name, tmp_path / "source")
    convert_tiny(name, source, tmp_path / "out", adapter=adapter)
    here = moefy.load(tmp_path / "out")
    away = moefy.load(tmp_path / "out", device_map={"": "disk"}, offload_folder=tmp_path / "off")
    for _ in range(2):  # weights come and go
        assert all(p.is_meta for m in sparse_mlps(away).values() for p in (m.up_ND, m.down_ND))
        assert torch.equal(run(here, name), run(away, name))
    with all_experts(here), all_experts(away):
        assert torch.equal(run(here, name), run(away, name))


def test_some_layers_here_some_on_disk(tmp_path):
    convert_tiny("llama", build("llama", tmp_path / "source"), tmp_path / "out")
    here = moefy.load(tmp_path / "out")
    places = {
        "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
        "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    away = moefy.load(tmp_path / "out", device_map=places, offload_folder=tmp_path / "off")
    assert [m.up_ND.is_meta for m in sparse_mlps(away).values()] == [False, True]
    assert torch.equal(run(here, "llama"), run(away, "llama"))
    ids = torch.arange(3, 12)[None]
    want, got = (m.generate(ids, max_new_tokens=6, do_sample=False) for m in (here, away))
    assert torch.equal(want, got)


def test_offloaded_models_are_not_saved(tmp_path):
    convert_tiny("llama", build("llama", tmp_path / "source"), tmp_path / "out")
    away = moefy.load(tmp_path / "out", device_map={"": "disk"}, offload_folder=tmp_path / "off")
    with pytest.raises(MoefyError, match="load the model without offloading"):
        away.save_pretrained(tmp_path / "again")


def test_heads_in_experts_are_not_offloaded(tmp_path):
    source = build("llama", tmp_path / "source")
    convert_tiny("llama", source, tmp_path / "out", settings={"attention.density": 0.5})
    with pytest.raises(MoefyError, match="attention in experts cannot be"):
        moefy.load(tmp_path / "out", device_map={"": "disk"}, offload_folder=tmp_path / "off")


def test_too_little_memory_leaves_layers_on_disk(tmp_path, monkeypatch):
    source = build("llama", tmp_path / "source")
    convert_tiny("llama", source, tmp_path / "out")
    checkpoint = Checkpoint.open(tmp_path / "out")
    assert "device_map" not in placement(checkpoint)
    documents: Path = tmp_path / "text.jsonl"
    documents.write_text("\n".join('{"input_ids": [3, 4, 5, 6, 7, 8, 9]}' for _ in range(8)))
    want = measure.evaluate(tmp_path / "out", corpus=documents, quiet=True)
    monkeypatch.setattr("moefy.experts.placement.free_memory", lambda: 1000)
    assert placement(checkpoint)["device_map"] == {"": "disk"}
    got = measure.evaluate(tmp_path / "out", corpus=documents, quiet=True)
    # Where weights lie in memory may decide in which order they are added up.
    assert got["total"]["kl"]["mean"] == pytest.approx(want["total"]["kl"]["mean"], rel=1e-4)
