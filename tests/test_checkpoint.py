import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from moefy.checkpoint import Checkpoint, OutputFolder, overwrite, permute_in_place, read_header
from moefy.errors import CheckpointError, OutputError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@settings(deadline=None, max_examples=40)
@given(
    neurons=st.integers(1, 12),
    width=st.integers(1, 9),
    axis=st.integers(0, 1),
    parts=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)
def test_permuting_in_place_is_indexing(tmp_path_factory, neurons, width, axis, parts, dtype, seed):
    file = tmp_path_factory.mktemp("p") / "model.safetensors"
    g = torch.Generator().manual_seed(seed)
    shape = (parts * neurons, width) if axis == 0 else (width, parts * neurons)
    first, second = torch.randn(shape, generator=g).to(dtype), torch.randn(3, generator=g)
    save_file({"a": first, "b": second}, file, metadata={"format": "pt"})
    whole = file.read_bytes()
    order = torch.randperm(neurons, generator=g)

    permute_in_place(read_header(file)["a"], order.numpy(), axis, parts)
    index = torch.cat([order + part * neurons for part in range(parts)])
    got = load_file(file)
    assert torch.equal(got["a"], first.index_select(axis, index))
    assert torch.equal(got["b"], second)

    permute_in_place(read_header(file)["a"], order.argsort().numpy(), axis, parts)
    assert file.read_bytes() == whole


def test_overwrite_replaces_one_tensor(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(4, 2), "b": torch.arange(3)}, file)
    overwrite(read_header(file)["a"], torch.full((4, 2), 7.0))
    assert torch.equal(load_file(file)["a"], torch.full((4, 2), 7.0))
    assert torch.equal(load_file(file)["b"], torch.arange(3))
    with pytest.raises(CheckpointError, match="do not replace"):
        overwrite(read_header(file)["a"], torch.zeros(3, 2))


def test_unsupported_dtypes_are_named(tmp_path):
    save_file({"a": torch.zeros(4, 2, dtype=torch.int8)}, tmp_path / "m.safetensors")
    tensor = read_header(tmp_path / "m.safetensors")["a"]
    with pytest.raises(CheckpointError, match="I8"):
        permute_in_place(tensor, np.arange(4), 0)


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
