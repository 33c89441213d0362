import errno
import json

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moefy.errors import CheckpointError, OutputError
from moefy.models.checkpoint import Checkpoint, outline, overwrite, read_header
from moefy.run.output import OutputFolder

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_outline_and_overwrite_rebuild_a_file(tmp_path, dtype):
    source, target = tmp_path / "model.safetensors", tmp_path / "made.safetensors"
    tensors = {"a": torch.randn(4, 3).to(dtype), "b": torch.arange(5), "empty": torch.zeros(0, 2)}
    save_file(tensors, source, metadata={"format": "pt", "of": "a user"})
    outline(source, target)
    assert target.stat().st_size == source.stat().st_size
    assert target.read_bytes() != source.read_bytes()
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    for name, value in tensors.items():
        assert torch.equal(checkpoint.read(name), value)
        overwrite(read_header(target)[name], checkpoint.read(name))
    assert torch.equal(torch.cat(list(checkpoint.rows("a", 3))), tensors["a"])
    assert torch.equal(checkpoint.map("a"), tensors["a"])
    assert target.read_bytes() == source.read_bytes()


def test_overwrite_replaces_one_tensor(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4, 2), "b": torch.arange(3)}, file)
    overwrite(read_header(file)["a"], torch.full((4, 2), 7.0))
    assert torch.equal(load_file(file)["a"], torch.full((4, 2), 7.0))
    assert torch.equal(load_file(file)["b"], torch.arange(3))
    with pytest.raises(CheckpointError, match="do not replace"):
        overwrite(read_header(file)["a"], torch.zeros(3, 2))


def test_what_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4, 2), "c": torch.zeros(2, dtype=torch.complex64)}, file)
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="C64"):
        checkpoint.read("c")
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="cut short"):
        checkpoint.read("a")
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read("a")


def test_index_and_shards_must_agree(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    with pytest.raises(CheckpointError, match="names b"):
        Checkpoint.open(tmp_path)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="not a weight index"):
        Checkpoint.open(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert torch.equal(Checkpoint.open(tmp_path).read("a"), torch.zeros(2))


def test_output_appears_by_rename_only(tmp_path):
    folder = OutputFolder(tmp_path / "out")
    folder.begin("x", resume=False, overwrite=False)
    finished = folder.work / "model"
    finished.mkdir()
    (finished / "file").write_text("1")
    assert not folder.out.exists()
    folder.commit(finished)
    assert (folder.out / "file").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OutputError, match="--overwrite"):
        folder.begin("x", resume=False, overwrite=False)
    folder.begin("y", resume=False, overwrite=True)
    finished.mkdir()
    assert (folder.out / "file").exists()
    folder.commit(finished)
    assert not (folder.out / "file").exists()


def test_hub_ids_that_cannot_be_had_are_one_clear_error():
    with pytest.raises(CheckpointError, match="Hub"):
        Checkpoint.open("someone/no-such-model-anywhere")
    with pytest.raises(CheckpointError, match="Hub"):
        Checkpoint.open("./no/such/folder at all")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EACCES, "denied"), SafetensorError("invalid header"), RuntimeError("shapes")],
)
def test_only_a_full_disk_is_called_one(error, tmp_path):
    with pytest.raises(type(error), match=str(error.args[-1])), OutputFolder(tmp_path).full_disk():
        raise error
