"""A conversion reads the files that transformers reads, all of them, and no others."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_conversion import convert_tiny
from tiny_models import build
from typer.testing import CliRunner

import moefy
from moefy.cli.verbs import app
from moefy.conversion import convert as converting
from moefy.conversion.streamed import passes
from moefy.errors import CheckpointError, MoefyError, OutputError
from moefy.experts.loading import load_dense
from moefy.experts.sparse_heads import SparseHeads
from moefy.models.artefact import base_at, open_artefact
from moefy.models.checkpoint import Checkpoint, overwrite
from moefy.models.reorder import outlined, revert

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("files") / "llama")


@pytest.fixture
def source(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "source"))


def sharded(folder: Path, places: dict[str, str]) -> None:
    """Spread the one file of a folder over several: tensors whose name has the key go to the place."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {
        name: next((f for key, f in places.items() if key in name), "rest.safetensors")
        for name in tensors
    }
    for file in {*files.values()}:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        held = {name: tensors[name] for name, place in files.items() if place == file}
        save_file(held, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"],
)
def test_missing_tensors_are_refused_by_name(source: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    convert_tiny("llama", source, out)
    for folder in (source, out):
        tensors = load_file(folder / "model.safetensors")
        tensors.pop("lm_head.weight", None)
        del tensors[name]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        moefy.load(out, verify=False)
    with pytest.raises(CheckpointError, match=name):
        load_dense(Checkpoint.open(source))
    with pytest.raises(CheckpointError, match=name):
        convert_tiny("llama", source, tmp_path / "other")
    assert not list(tmp_path.glob("*other*"))
    said = CliRunner().invoke(app, ["convert", str(source), str(tmp_path / "x"), "--dry-run"])
    assert said.exit_code == 1
    assert name in said.stderr


def test_tensors_of_other_shapes_are_refused_by_name(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[7\]"):
        convert_tiny("llama", source, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_weights_that_are_no_numbers_with_a_point_are_refused(
    source: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors = load_file(source / "model.safetensors")
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=name):
        load_dense(Checkpoint.open(source))
    with pytest.raises(CheckpointError, match=name):
        convert_tiny("llama", source, tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("intermediate_size", 2**40), ("hidden_size", 2**40), ("num_hidden_layers", 2**31),
        ("num_hidden_layers", 10**30), ("num_attention_heads", 10**12), ("vocab_size", 10**18),
        ("num_labels", 10**12), ("max_position_embeddings", 10**15), ("intermediate_size", 2**30),
    ],
)  # fmt: skip
def test_absurd_sizes_are_refused_by_arithmetic(
    source: Path, tmp_path: Path, key: str, value: int
) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(MoefyError, match=key if value != 2**30 else "has shape") as caught:
        convert_tiny("llama", source, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_an_index_beside_another_single_file_is_refused(source: Path, tmp_path: Path) -> None:
    one = (source / "model.safetensors").read_bytes()
    sharded(source, {"layers.0": "first.safetensors"})
    (source / "model.safetensors").write_bytes(one)
    with pytest.raises(CheckpointError, match="may be two models"):
        convert_tiny("llama", source, tmp_path / "out")


def test_sub_folders_go_through_every_verb(source: Path, tmp_path: Path) -> None:
    dense = load_file(source / "model.safetensors")
    sharded(source, {"layers.0": "deep/er/0.safetensors", "layers.1": "1.safetensors"})
    made, again, back = (tmp_path / name for name in ("made", "again", "back"))
    convert_tiny("llama", source, made)
    files = {"config.json", "moefy.safetensors", *Checkpoint.open(made).weights}
    assert {*json.loads((made / "moefy.json").read_text())["sha256"]} == files
    assert {f.relative_to(made).as_posix() for f in made.rglob("*.safetensors")} <= files
    model = moefy.load(made)
    model.save_pretrained(again)
    saved = {f.relative_to(again): f.read_bytes() for f in again.rglob("*.safetensors")}
    assert saved == {f.relative_to(made): f.read_bytes() for f in made.rglob("*.safetensors")}
    moefy.load(again)
    revert(made, back)
    opened = Checkpoint.open(back)
    assert all(torch.equal(opened.read(name), value) for name, value in dense.items())


def test_saving_writes_nothing_outside_of_its_folder(source: Path, tmp_path: Path) -> None:
    made, outside = tmp_path / "made", tmp_path / "outside.safetensors"
    convert_tiny("llama", source, made)
    model = moefy.load(made)
    (made / "model.safetensors").rename(outside)
    before = outside.read_bytes()
    names = dict.fromkeys(load_file(outside), "../outside.safetensors")
    (made / INDEX).write_text(json.dumps({"weight_map": names}))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    with pytest.raises(CheckpointError, match="outside of the folder"):
        model.save_pretrained(tmp_path / "target")
    with pytest.raises(CheckpointError, match="outside of the folder"):
        moefy.load(made, verify=False)
    assert outside.read_bytes() == before


def test_experts_of_other_neurons_than_were_fitted_are_seen(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights whose neurons stand as in the source are the same dense model: a routed pass tells."""

    def as_they_were(checkpoint: Checkpoint, target: Path, *_: Any, **__: Any) -> Checkpoint:
        written = outlined(checkpoint, target)
        for name in checkpoint.tensors:
            overwrite(written.tensors[name], checkpoint.read(name))
        return written

    monkeypatch.setattr(converting, "reorder", as_they_were)
    with pytest.raises(MoefyError, match=r"model\.layers\.0 runs other experts than were fitted"):
        convert_tiny("llama", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_streaming_sees_experts_of_other_neurons_too(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "permute", lambda site, name, tensor, order_N: tensor)
    with pytest.raises(MoefyError, match=r"model\.layers\.0 runs other experts than were fitted"):
        convert_tiny("llama", source, tmp_path / "out", stream=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_other_heads_than_were_fitted_are_seen(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all of them on, as when outputs are compared with the source's, nothing is wrong."""
    source, options = build(name, tmp_path / "heads"), {"settings": {"attention.density": 0.5}}
    convert_tiny(name, source, tmp_path / "good", **options)
    plain = SparseHeads.forward

    def other(self: SparseHeads, heads: torch.Tensor) -> torch.Tensor:
        size = heads.shape[-1] // self.experts
        return plain(self, heads if self.all_on else heads.roll(size, -1))

    monkeypatch.setattr(SparseHeads, "forward", other)
    with pytest.raises(MoefyError, match=r"0\.\w*attn runs other heads than were fitted"):
        convert_tiny(name, source, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_is_not_resumed_with_another_tokenizer(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    (source / "tokenizer.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(converting, "_write", stop)
        with pytest.raises(KeyboardInterrupt):
            convert_tiny("llama", source, tmp_path / "out")
    (source / "tokenizer.json").write_text("{ }")
    with pytest.raises(OutputError, match="another"):
        convert_tiny("llama", source, tmp_path / "out", resume=True)
    (source / "tokenizer.json").write_text("{}")
    convert_tiny("llama", source, tmp_path / "out", resume=True)
    moefy.load(tmp_path / "out")


@pytest.fixture
def adapter(source: Path, tmp_path: Path) -> Path:
    convert_tiny("llama", source, tmp_path / "here" / "adapter", adapter=True)
    return tmp_path / "here" / "adapter"


def say_base(adapter: Path, **values: Any) -> None:
    meta = json.loads((adapter / "moefy.json").read_text())
    meta["source"] |= values
    (adapter / "moefy.json").write_text(json.dumps(meta))


def test_a_relative_base_is_relative_to_the_artefact(
    adapter: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(source, tmp_path / "here" / "base")
    say_base(adapter, name="../base")
    _, checkpoint = open_artefact(adapter)
    assert checkpoint.folder.resolve() == (tmp_path / "here" / "base").resolve()
    # What happens to lie where a command is given is not the base.
    shutil.rmtree(tmp_path / "here" / "base")
    monkeypatch.chdir(tmp_path / "here")
    say_base(adapter, name="source/base")
    shutil.copytree(source, tmp_path / "here" / "source" / "base")
    with pytest.raises(CheckpointError, match="base of this adapter"):
        open_artefact(adapter)


def test_a_base_that_is_said_for_a_while_is_hashed(
    adapter: Path, source: Path, tmp_path: Path
) -> None:
    moved = source.rename(tmp_path / "moved")
    with base_at(moved):
        assert open_artefact(adapter, verify=False)[1].folder == moved
    with pytest.raises(CheckpointError, match=r"base= or --base"):
        open_artefact(adapter, verify=False)
    other = build("llama_tied", tmp_path / "other")
    with base_at(other), pytest.raises(CheckpointError, match="this artefact was made from"):
        open_artefact(adapter, verify=False)


def test_a_base_on_the_hub_is_pinned_and_said_and_hashed(
    adapter: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["local_files_only"]))
        return str(source)

    monkeypatch.setattr("moefy.models.checkpoint.snapshot_download", download)
    monkeypatch.setattr(Checkpoint, "revision", "c" * 40)
    say_base(adapter, name="somebody/model")
    open_artefact(adapter, verify=False)
    assert asked == [("somebody/model", None, True)]  # no revision: nothing is fetched
    say_base(adapter, revision="c" * 40)
    open_artefact(adapter, verify=False)
    assert asked[1:] == [("somebody/model", "c" * 40, False)]
    assert "somebody/model" in capsys.readouterr().err
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors is another"):
        open_artefact(adapter, verify=False)
    say_base(adapter, name="https://somewhere/model")
    with pytest.raises(CheckpointError, match="base of this adapter"):
        open_artefact(adapter)
