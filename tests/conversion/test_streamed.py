"""Streamed conversion: the same numbers as in memory, one layer at a time, whatever happens meanwhile."""

import json
import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_conversion import RECIPE, convert_tiny, corpus_for, kill_conversion
from tiny_models import FAMILIES_TINY, SEARCHED_TINY, build, tiny_model

import moefy
from moefy.conversion import streamed as streaming
from moefy.conversion.streamed import passes
from moefy.conversion.streamed.layerwise import LayerwiseModel, require_a_chain
from moefy.conversion.task import Conversion
from moefy.data.corpus import load_corpus
from moefy.data.inputs import read_batches
from moefy.errors import CheckpointError, MoefyError, RecipeError, UnsupportedModel
from moefy.evaluation.outputs import values_of
from moefy.experts.loading import load_dense
from moefy.experts.sparse_mlp import SparseMlp, all_experts
from moefy.models.artefact import read_artefact
from moefy.models.checkpoint import Checkpoint, sha256
from moefy.models.reorder import revert
from moefy.recipe import override

IN_MEMORY_ONLY = {"t5", "t5_gated", "mt5", "bart", "vit"}
NAMES = [*FAMILIES_TINY, *SEARCHED_TINY]

GREEDY = {
    "partition.expert_size": 1, "router.name": "largest_inputs", "selection.name": "threshold",
    "compensation.name": "none", "budget.name": "greedy", "density": 0.3,
}  # fmt: skip


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def batches_of(name: str, checkpoint: Checkpoint) -> list:
    kind = FAMILIES_TINY.get(name) or SEARCHED_TINY[name]
    encoder = kind.family in ("bert", "roberta", "distilbert", "electra")
    return read_batches(
        checkpoint, "encoder" if encoder else "decoder", load_corpus(corpus_for(name)), 32, 200
    )


def test_no_layer_keeps_the_inputs_of_its_last_pass(tmp_path, monkeypatch):
    """They would add up to more than a layer."""
    held, plain = [], LayerwiseModel.layer

    @contextmanager
    def layer(self, *args):
        with plain(self, *args):
            yield
        routed = (m for one in self.layers for m in one.modules() if isinstance(m, SparseMlp))
        held.extend(module.context.previous_TD for module in routed)

    monkeypatch.setattr(LayerwiseModel, "layer", layer)
    source = build("llama", tmp_path / "source")
    convert_tiny("llama", source, tmp_path / "out", stream=True)
    assert held and all(x is None for x in held)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_layer_by_layer_is_the_stock_model(name, tmp_path):
    checkpoint = Checkpoint.open(build(name, tmp_path / "m"))
    if name in IN_MEMORY_ONLY:
        with pytest.raises(UnsupportedModel, match="in memory"):
            require_a_chain(checkpoint)
        return
    require_a_chain(checkpoint)
    layerwise = LayerwiseModel(checkpoint, torch.float32)
    stock = load_dense(checkpoint, dtype=torch.float32)
    batches = batches_of(name, checkpoint)
    states = [layerwise.enter(batch) for batch in batches]
    for index in range(len(layerwise.sites)):
        with layerwise.layer(index):
            states = [layerwise.run(index, b, h) for b, h in zip(batches, states, strict=True)]
    for batch, hidden in zip(batches, states, strict=True):
        want, got = values_of(stock, stock(**batch.inputs)), layerwise.leave(batch, hidden)
        assert relative(got.logits(got.rows_JD), want[got.keep_BT]) < 1e-6


def test_only_the_layer_in_use_is_in_memory(tmp_path):
    layerwise = LayerwiseModel(Checkpoint.open(build("llama", tmp_path / "m")), torch.float32)

    def held() -> set[str]:
        parameters = layerwise.model.named_parameters()
        return {n.split(".")[2] for n, p in parameters if "layers" in n and not p.is_meta}

    assert held() == set()
    with layerwise.layer(1):
        assert held() == {"1"}
    assert held() == set()


@pytest.fixture
def dense_inputs(monkeypatch):
    """Routers are fitted on what dense layers send, as in memory."""
    monkeypatch.setattr(streaming, "stream", partial(streaming.stream, follow=False))


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "bert_base", "gpt_neox"])
def test_fitted_on_dense_inputs_it_is_the_conversion_in_memory(name, tmp_path, dense_inputs):
    source = build(name, tmp_path / "source")
    in_memory = convert_tiny(name, source, tmp_path / "a")
    streamed = convert_tiny(name, source, tmp_path / "b", stream=True)
    first, second = read_artefact(tmp_path / "a"), read_artefact(tmp_path / "b")
    assert first.tensors.keys() == second.tensors.keys()
    for key, value in first.tensors.items():
        if key.endswith("permutation"):
            assert torch.equal(value, second.tensors[key])
        else:
            assert relative(second.tensors[key], value) < 1e-5, key
    assert [entry.selection for entry in first.layers] == [e.selection for e in second.layers]
    for file in Checkpoint.open(tmp_path / "a").files:
        assert sha256(file) == sha256(tmp_path / "b" / file.name)
    metric = "cosine" if name == "bert_base" else "kl"
    want = in_memory["evaluation"]["total"][metric]["mean"]
    assert streamed["evaluation"]["total"][metric]["mean"] == pytest.approx(want, rel=1e-3)
    got, want = streamed["evaluation"], in_memory["evaluation"]
    for key in ("tokens", "ffn_density", "active_budget", "active_parameters"):
        assert got[key] == pytest.approx(want[key], rel=1e-6), key
    recall = want["router_quality"]["mean"]["recall"]
    assert got["router_quality"]["mean"]["recall"] == pytest.approx(recall, rel=1e-3)


def test_allocated_densities_are_those_of_memory_with_the_same_metric(tmp_path, monkeypatch):
    source = build("llama", tmp_path / "source")
    monkeypatch.setattr(
        "moefy.conversion.in_memory._fits", lambda *_: False
    )  # no backward pass: the same metric
    in_memory = convert_tiny("llama", source, tmp_path / "a", settings=GREEDY)
    streamed = convert_tiny("llama", source, tmp_path / "b", settings=GREEDY, stream=True)
    first, second = (r["conversion"]["tuning"]["budget"] for r in (in_memory, streamed))
    assert second["active"] == first["active"] and first["kept"] == second["kept"]
    density = streamed["evaluation"]["ffn_density"]
    assert density == pytest.approx(in_memory["evaluation"]["ffn_density"], abs=0.02)
    a, b = (r["evaluation"]["total"]["kl"]["mean"] for r in (in_memory, streamed))
    assert b == pytest.approx(a, rel=0.1)
    # What was measured is what is loaded: thresholds, densities, weights.
    sparse = moefy.load(tmp_path / "b")
    assert len({m.selection.settings()["threshold"] for m in _mlps(sparse)}) == 2


def _mlps(model):
    from moefy.experts.sparse_mlp import sparse_mlps

    return sparse_mlps(model).values()


def test_its_own_evaluation_is_that_of_the_loaded_model(tmp_path):
    from moefy.data.shards import split_shards
    from moefy.evaluation.evaluate import evaluate

    source = build("llama", tmp_path / "source")
    records = convert_tiny("llama", source, tmp_path / "out", settings=GREEDY, stream=True)
    corpus = split_shards(load_corpus(corpus_for("llama")), 0)["evaluation"]
    batches = read_batches(
        Checkpoint.open(source), "decoder", corpus.take(44), 32, streaming.EVALUATED_TOKENS
    )
    found = evaluate(moefy.load(tmp_path / "out"), batches)
    for key in ("kl", "ce", "ce_dense", "agreement"):
        got = records["evaluation"]["total"][key]["mean"]
        assert got == pytest.approx(found["total"][key]["mean"], rel=1e-4), key
    assert records["evaluation"]["ffn_density"] == pytest.approx(found["ffn_density"], rel=1e-6)
    assert records["evaluation"]["positions"]["sinks"] == found["positions"]["sinks"]


def test_what_follows_the_experts_differs_from_what_follows_dense_layers(tmp_path, monkeypatch):
    source = build("llama", tmp_path / "source")
    convert_tiny("llama", source, tmp_path / "a", stream=True)
    monkeypatch.setattr(streaming, "stream", partial(streaming.stream, follow=False))
    convert_tiny("llama", source, tmp_path / "b", stream=True)
    first, second = (read_artefact(tmp_path / n).tensors for n in "ab")
    # The first layer reads the same either way, the second does not.
    assert torch.equal(first["layers.0.router.weight"], second["layers.0.router.weight"])
    assert relative(first["layers.1.router.weight"], second["layers.1.router.weight"]) > 1e-4
    assert torch.equal(first["layers.1.permutation"], second["layers.1.permutation"])


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_every_tensor_is_read_once_and_written_once_and_those_of_mlps_are_checked(
    name, tmp_path, monkeypatch
):
    source = build(name, tmp_path / "source")
    read, written = [], []
    plain, put = Checkpoint.read, passes.overwrite

    def reading(self, key):
        if self.folder == source:
            read.append(key)
        return plain(self, key)

    def writing(tensor, value):
        written.append(tensor)
        put(tensor, value)

    monkeypatch.setattr(Checkpoint, "read", reading)
    monkeypatch.setattr(passes, "overwrite", writing)
    convert_tiny(name, source, tmp_path / "out", stream=True)
    tensors = Checkpoint.open(source).tensors
    layers = [key for key in read if ".layers." in key]
    # MLPs a second time, to compute some tokens of the written ones once more.
    again = [key for key in tensors if ".mlp." in key]
    assert sorted(layers) == sorted([key for key in tensors if ".layers." in key] + again)
    assert len(written) == len(set(written)) == len(tensors)
    # The few others: once for the copy, once to run.
    assert all(read.count(key) <= 2 for key in tensors)
    monkeypatch.undo()
    revert(tmp_path / "out", tmp_path / "back")
    for file in Checkpoint.open(source).files:
        assert sha256(file) == sha256(tmp_path / "back" / file.name)


def sharded(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    model = tiny_model(name).auto.from_pretrained(build(name, folder.with_name("unsharded")))
    model.to(dtype).save_pretrained(folder, max_shard_size="20KB")
    assert len(Checkpoint.open(folder).files) > 2
    return folder


def bytes_of(folder: Path) -> dict[str, str]:
    files = [f for f in folder.iterdir() if f.suffix == ".safetensors" or f.name == "moefy.json"]
    return {f.name: sha256(f) for f in files}


def test_shards_in_16_bits(tmp_path):
    source = sharded("llama", tmp_path / "source", torch.bfloat16)
    records = convert_tiny("llama", source, tmp_path / "out", settings=GREEDY, stream=True)
    assert records["conversion"]["all_experts_relative_error"] < 2e-2
    assert {t.dtype for t in Checkpoint.open(tmp_path / "out").tensors.values()} == {"BF16"}
    sparse = moefy.load(tmp_path / "out", dtype=torch.float32)
    dense = load_dense(Checkpoint.open(source), dtype=torch.float32)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad(), all_experts(sparse):
        assert relative(sparse(ids).logits, dense(ids).logits) < 1e-5


@pytest.mark.parametrize(
    ("after", "settings"),
    [
        ("layers/others", GREEDY), ("layers/0.json", {}), ("layers/0.json", GREEDY),
        ("states/held-out-dense-1.bin", GREEDY), ("checked/dense-1.bin", {}),
    ],
)  # fmt: skip
def test_killed_runs_resume_to_the_same_bytes(after, settings, tmp_path):
    source = build("llama", tmp_path / "source")
    convert_tiny("llama", source, tmp_path / "whole", settings=settings, stream=True)
    target = tmp_path / "out"
    kill_conversion("llama", source, target, after, settings=settings, stream=True)
    if not target.exists():
        with pytest.raises(MoefyError, match="another model, recipe or corpus"):
            convert_tiny("llama", source, target, settings=settings, resume=True)
        convert_tiny("llama", source, target, settings=settings, stream=True, resume=True)
    assert bytes_of(target) == bytes_of(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def test_a_shard_that_goes_missing_meanwhile(tmp_path, monkeypatch):
    source = sharded("llama", tmp_path / "source")
    convert_tiny("llama", source, tmp_path / "whole", stream=True)
    names = Checkpoint.open(source).tensors
    shard = names["model.layers.1.mlp.down_proj.weight"].file
    keep = Conversion.keep

    def losing(*args, **extra):
        keep(*args, **extra)
        shard.rename(shard.with_suffix(".gone"))

    monkeypatch.setattr(Conversion, "keep", losing)
    with pytest.raises(CheckpointError, match=f"{shard.name}: cannot be read"):
        convert_tiny("llama", source, tmp_path / "out", stream=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="shards missing"):
        convert_tiny("llama", source, tmp_path / "out", stream=True, resume=True)
    shard.with_suffix(".gone").rename(shard)
    monkeypatch.setattr(Conversion, "keep", keep)
    convert_tiny("llama", source, tmp_path / "out", stream=True, resume=True)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_disk_that_fills_up_loses_nothing(tmp_path, monkeypatch):
    source = build("llama", tmp_path / "source")
    convert_tiny("llama", source, tmp_path / "whole", stream=True)
    put, count = passes.overwrite, []

    def full(*args):
        count.append(1)
        if len(count) > 12:
            raise OSError(28, "No space left on device")
        put(*args)

    monkeypatch.setattr(passes, "overwrite", full)
    with pytest.raises(MoefyError, match=r"disk is full.*--resume"):
        convert_tiny("llama", source, tmp_path / "out", stream=True)
    monkeypatch.setattr(passes, "overwrite", put)
    convert_tiny("llama", source, tmp_path / "out", stream=True, resume=True)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_weights_that_are_not_finite_are_named(tmp_path):
    model = tiny_model("llama").auto.from_pretrained(build("llama", tmp_path / "whole"))
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.weight holds NaN"):
        convert_tiny("llama", tmp_path / "source", tmp_path / "out", stream=True)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget.name": "solver"}, "budget.name=solver"),
        ({"distil.steps": 5}, "distil.steps=5"),
        ({"attention.density": 0.5}, "attention.density"),
        ({"router.look_ahead": True}, "look_ahead"),
        ({"budget.target_kl": 0.1, "budget.name": "greedy"}, "target for KL"),
    ],
)
def test_what_needs_the_whole_model_is_refused(settings, said, tmp_path):
    source = build("llama", tmp_path / "source")
    with pytest.raises(RecipeError, match=f"{said}.*--stream"):
        convert_tiny("llama", source, tmp_path / "out", settings=settings, stream=True)
    assert not list(tmp_path.glob(".out*"))


def test_layers_that_hand_on_more_are_refused(tmp_path):
    from transformers.models.llama.modeling_llama import LlamaModel

    source = build("llama", tmp_path / "source")
    batch = batches_of("llama", Checkpoint.open(source))[0]
    plain = LlamaModel.forward

    def leaking(self, **kwargs):
        embeds = self.embed_tokens(kwargs.pop("input_ids"))
        for layer in self.layers:
            embeds = layer(embeds, attention_mask=None, from_embeddings=embeds * 2)
        return embeds

    LlamaModel.forward = leaking
    try:
        layerwise = LayerwiseModel(Checkpoint.open(source), torch.float32)
        with pytest.raises(UnsupportedModel, match=r"layers\.1 is given more.*in memory"):
            layerwise.run(1, batch, torch.zeros(*batch.inputs["input_ids"].shape, 32))
    finally:
        LlamaModel.forward = plain


def test_a_full_disk_is_found_before_anything_is_made(tmp_path, monkeypatch):
    source = build("llama", tmp_path / "source")
    usage = type("usage", (), {"free": 10})()
    monkeypatch.setattr("moefy.models.checkpoint.shutil.disk_usage", lambda _: usage)
    with pytest.raises(MoefyError, match="of disk"):
        convert_tiny("llama", source, tmp_path / "out", stream=True)
    assert not list(tmp_path.glob(".out*"))


def test_the_card_of_the_source_is_kept(tmp_path):
    source = build("llama", tmp_path / "source")
    (source / "README.md").write_text("of the source")
    convert_tiny("llama", source, tmp_path / "out", stream=True)
    assert (tmp_path / "out" / "README.source.md").read_text() == "of the source"
    assert "moefy" in (tmp_path / "out" / "README.md").read_text()


def test_an_adapter_is_refused(tmp_path):
    source = build("llama", tmp_path / "source")
    with pytest.raises(RecipeError, match="adapter"):
        convert_tiny("llama", source, tmp_path / "out", adapter=True, stream=True)


def test_too_little_memory_points_to_streaming(tmp_path, monkeypatch):
    source = build("llama", tmp_path / "source")
    monkeypatch.setattr(sys.modules["moefy.conversion.convert"], "free_memory", lambda: 1000)
    with pytest.raises(MoefyError, match="--stream"):
        convert_tiny("llama", source, tmp_path / "out")
    convert_tiny("llama", source, tmp_path / "out", stream=True)


def test_records_count_what_was_read_and_written(tmp_path):
    source = build("llama", tmp_path / "source")
    convert_tiny("llama", source, tmp_path / "out", stream=True)
    record = json.loads((tmp_path / "out" / "records.json").read_text())["conversion"]
    assert record["streamed"] is True
    size = Checkpoint.open(source).bytes
    assert record["bytes_read"]["hash the result"] >= size
    assert record["bytes_written"]["stream"] >= size
    peaks = [*record["peak_memory_after"].values(), record["peak_memory"]]
    assert record["peak_memory_after"].keys() == record["seconds"].keys()
    assert peaks[0] > 10**7 and peaks == sorted(peaks)


def test_the_recipe_is_what_in_memory_would_refuse_too(tmp_path):
    source = build("llama", tmp_path / "source")
    with pytest.raises(RecipeError, match="unknown partition method"):
        moefy.convert(
            source, tmp_path / "out", recipe=override(RECIPE, {"partition.method": "x"}),
            corpus=corpus_for("llama"), stream=True, quiet=True,
        )  # fmt: skip
    assert load_file(source / "model.safetensors")
