import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moefy.errors import CheckpointError, OutputError
from moefy.models.checkpoint import INDEX, Checkpoint, copy_folder, outline, overwrite, read_header
from moefy.run.folder import OutputFolder

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


def model_files(folder: Path, files: dict[str, str], tensors: dict[str, torch.Tensor]) -> Path:
    """A folder whose index says `files`, each written with all `tensors` that it names."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    for name in {*files.values()}:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: tensors[k] for k, v in files.items() if v == name}, place)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    return folder


TWO = {"a": torch.zeros(2), "b": torch.ones(3)}


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "sub/../../x.safetensors", "/tmp/x.safetensors", "", "a//b", "./a"]
)
def test_shards_outside_of_the_folder_are_refused(tmp_path, name):
    folder = model_files(tmp_path / "m", {"a": "one.safetensors"}, TWO)
    save_file(TWO, tmp_path / "x.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError, match="outside of the folder"):
        Checkpoint.open(folder)


def test_links_out_of_the_folder_are_refused_and_those_of_the_hubs_cache_are_not(tmp_path):
    save_file(TWO, tmp_path / "x.safetensors")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").symlink_to(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        Checkpoint.open(folder)
    (folder / "model.safetensors").unlink()
    save_file(TWO, folder / "model.safetensors")
    (folder / "notes.txt").symlink_to(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"notes\.txt: a link out"):
        copy_folder(folder, tmp_path / "copy")
    repo = tmp_path / "models--somebody--model"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (tmp_path / "x.safetensors").rename(repo / "blobs" / "1234")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1234")
    (snapshot / "config.json").write_text("{}")
    opened = Checkpoint.open(snapshot)
    assert torch.equal(opened.read("b"), TWO["b"])
    assert opened.revision == "a" * 40
    (tmp_path / "linked").symlink_to(folder)  # a link to the whole folder is the folder
    assert list(Checkpoint.open(tmp_path / "linked").tensors) == ["a", "b"]


def test_shards_in_sub_folders_are_files_of_the_folder(tmp_path):
    folder = model_files(tmp_path / "m", {"a": "deep/1.safetensors", "b": "2.safetensors"}, TWO)
    opened = Checkpoint.open(folder)
    assert opened.weights == ["2.safetensors", "deep/1.safetensors"]
    assert set(opened.hashes()) == {"config.json", *opened.weights}
    copy_folder(folder, tmp_path / "copy", skip={*opened.weights})
    assert not list((tmp_path / "copy").rglob("*.safetensors"))


def test_one_file_and_an_index_of_others_is_refused(tmp_path):
    folder = model_files(tmp_path / "m", {"a": "1.safetensors", "b": "2.safetensors"}, TWO)
    save_file(TWO, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="may be two models"):
        Checkpoint.open(folder)
    (folder / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys("ab", "model.safetensors")})
    )
    assert len(Checkpoint.open(folder).files) == 1
    (folder / "config.json").write_text(json.dumps({"transformers_weights": "1.safetensors"}))
    with pytest.raises(CheckpointError, match="transformers_weights"):
        Checkpoint.open(folder)


def test_a_tensor_in_two_shards_and_an_adapter_are_refused(tmp_path):
    folder = model_files(tmp_path / "m", {"a": "1.safetensors", "b": "2.safetensors"}, TWO)
    save_file(TWO, folder / "2.safetensors")
    with pytest.raises(CheckpointError, match=r"a is in 1\.safetensors and in 2\.safetensors"):
        Checkpoint.open(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge it first"):
        Checkpoint.open_config(folder)


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [2], "data_offsets": [0, 4]}, {"shape": [-2], "data_offsets": [0, 8]},
        {"shape": [2**62, 2**62], "data_offsets": [0, 8]}, {"shape": [2.0], "data_offsets": [0, 8]},
        {"shape": [True, 2], "data_offsets": [0, 8]}, {"shape": 2, "data_offsets": [0, 8]},
        {"shape": [2], "data_offsets": [8, 0]}, {"shape": [2], "data_offsets": [0]}, {},
    ],
)  # fmt: skip
def test_headers_that_contradict_themselves_are_refused(tmp_path, entry):
    header = json.dumps({"a": {"dtype": "F32", **entry}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        read_header(file)


def test_tensors_that_overlap_are_refused(tmp_path):
    place = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"a": place, "b": place}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="overlap"):
        read_header(file)


def test_names_that_no_file_system_takes_are_one_line(tmp_path):
    for name in ("x" * 5000, "a\0b", str(tmp_path / ("y" * 300))):
        with pytest.raises(CheckpointError):
            Checkpoint.open(name)
