"""Every wrong input is one line that says what, where, got and remedy; exit code 1; nothing written."""

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_conversion import convert_tiny, corpus_for
from tiny_models import build
from typer.testing import CliRunner

import moefy
from moefy.cli.verbs import app
from moefy.errors import CheckpointError, MoefyError, OutputError
from moefy.models import checkpoint as checkpoints


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return build("llama", tmp_path_factory.mktemp("bad") / "llama")


@pytest.fixture(scope="module")
def ids(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("ids") / "ids.jsonl"
    rows = [
        json.dumps({"input_ids": row, "source_id": str(i)})
        for i, row in enumerate(corpus_for("llama"))
    ]
    file.write_text("\n".join(rows))
    return file


@pytest.fixture
def source(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "source"))


def refuse(arguments: list[object], *words: str) -> str:
    """Run the CLI; it must exit with 1 and one line on stderr that has all the words."""
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 1, (result.output, result.exception)
    lines = [line for line in result.stderr.splitlines() if line.startswith("moefy: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in lines[0], lines[0]
    return lines[0]


def refuse_convert(source: Path, ids: Path, *words: str, options: tuple[object, ...] = ()) -> None:
    out = source.parent / "out"
    before = sorted(p.name for p in source.parent.iterdir())
    refuse(["convert", source, out, "--corpus", ids, "-q", *options], *words)
    assert sorted(p.name for p in source.parent.iterdir()) == before


def test_not_a_model_folder(tmp_path, ids):
    refuse(["convert", tmp_path / "absent" / "x", tmp_path / "out", "--corpus", ids], "absent")
    (tmp_path / "file").write_text("x")
    refuse(["convert", tmp_path / "file", tmp_path / "out", "--corpus", ids], "not a model folder")
    assert not (tmp_path / "out").exists()


def test_no_config(source, ids):
    (source / "config.json").unlink()
    refuse_convert(source, ids, "no config.json")


def test_config_is_not_json(source, ids):
    (source / "config.json").write_text("{")
    refuse_convert(source, ids, "not JSON")


def test_truncated_and_corrupt_weights(source, ids):
    file = source / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    refuse_convert(source, ids, "truncated or corrupt", "model.safetensors")
    file.write_bytes(b"\xff" * 8 + whole[8:])
    refuse_convert(source, ids, "truncated or corrupt")
    file.write_bytes(whole[:4])
    refuse_convert(source, ids, "truncated or corrupt")


def test_pickled_weights(source, ids):
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    refuse_convert(source, ids, "pickled", "save_pretrained")


def test_no_weights_at_all(source, ids):
    (source / "model.safetensors").unlink()
    refuse_convert(source, ids, "no model.safetensors")


def test_missing_shard(llama, tmp_path, ids):
    from transformers import AutoModelForCausalLM

    source = tmp_path / "source"
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(source, max_shard_size="20KB")
    sorted(source.glob("*.safetensors"))[1].unlink()
    refuse_convert(source, ids, "shards missing", "model-00002")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "no_such_model"}, "no_such_model"),
        ({"num_local_experts": 8}, "mixture of experts already"),
    ],
)
def test_unknown_and_moe_types(source, ids, change, word):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **change}))
    refuse_convert(source, ids, word)


def test_expert_counts_that_do_not_divide(source, ids):
    refuse_convert(source, ids, "64 neurons", "24", "nearest", options=("--experts", 24))
    refuse_convert(source, ids, "nearest", options=("--expert-size", 7))


def test_more_experts_than_there_are(source, ids):
    options = ("--experts", 8, "--set", "selection.k=9")
    refuse_convert(source, ids, "layer 0", "9 routed experts", "8", options=options)


def test_recipe_mistakes(source, ids):
    refuse_convert(source, ids, "did you mean 'router.name'", options=("--set", "router.nme=mlp"))
    refuse_convert(source, ids, "expected key=value", options=("--set", "router.name"))
    refuse_convert(source, ids, "did you mean 'linear'", options=("--set", "router.name=liner"))
    refuse_convert(
        source, ids, "did you mean 'kmeans'", options=("--set", "partition.method=kmean")
    )
    refuse_convert(source, ids, "did you mean 'topk'", options=("--set", "selection.name=topkk"))
    refuse_convert(source, ids, "evaluation", options=("--set", "router.name=oracle"))
    refuse_convert(source, ids, "did you mean 'fast'", options=("--recipe", "fastt"))
    refuse_convert(source, ids, "at most 1", options=("--density", 1.5))


def test_output_in_the_way_is_left_alone(source, ids, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    refuse_convert(source, ids, "--overwrite")
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_output_that_cannot_be_made(source, ids):
    (source.parent / "a_file").write_text("")
    refuse(
        ["convert", source, source.parent / "a_file" / "out", "--corpus", ids], "cannot be written"
    )


def test_no_room_on_disk_is_seen_before(source, ids, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9, 1000)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: usage)
    out = source.parent / "out"
    refuse(["convert", source, out, "--corpus", ids, "-q"], "GB of disk", "free")
    assert not out.exists()


def test_a_disk_that_fills_up_keeps_what_is_done(llama, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "copyfile", full)
        with pytest.raises(OutputError, match="--resume, nothing is lost"):
            convert_tiny("llama", llama, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / ".out.moefy-unfinished" / "layers").glob("*.json"))) == 2
    convert_tiny("llama", llama, tmp_path / "out", resume=True)
    assert moefy.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "holds no text"),
        (b"caf\xe9 au lait", "not UTF-8"),
        (b'{"input_ids": [3, 4]}', "four disjoint"),
    ],
)
def test_bad_corpora(source, tmp_path, content, word):
    corpus = tmp_path / ("c.jsonl" if content[:1] == b"{" else "c.txt")
    corpus.write_bytes(content)
    refuse_convert(source, corpus, word)


def test_token_ids_beyond_the_vocabulary(source, tmp_path):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("\n".join(json.dumps({"input_ids": [3, 4000 + i]}) for i in range(40)))
    refuse_convert(source, corpus, "token id", "96")


def test_text_for_a_model_without_a_tokenizer(source, tmp_path):
    corpus = tmp_path / "c.txt"
    corpus.write_text("<|endoftext|>".join(f"some text {i}" for i in range(40)))
    refuse_convert(source, corpus, "no tokenizer")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_nan_in_weights(source, ids, name):
    tensors = load_file(source / "model.safetensors")
    tensors[name][3:8] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    refuse(["convert", source, source.parent / "out", "--corpus", ids, "-q"], "NaN")
    assert not (source.parent / "out").exists()


@pytest.fixture
def converted(llama, tmp_path) -> Path:
    convert_tiny("llama", llama, tmp_path / "made")
    return tmp_path / "made"


def test_tampered_artefacts(converted):
    def loads(word: str) -> None:
        with pytest.raises(CheckpointError, match=word):
            moefy.load(converted)

    meta = converted / "moefy.json"
    good, side = meta.read_text(), (converted / "moefy.safetensors").read_bytes()
    weights = (converted / "model.safetensors").read_bytes()

    (converted / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    loads("SHA-256")
    (converted / "model.safetensors").write_bytes(weights)

    (converted / "moefy.safetensors").write_bytes(side[:-1] + bytes([side[-1] ^ 1]))
    loads("SHA-256")
    (converted / "moefy.safetensors").write_bytes(side)

    for change, word in (
        ({"format": 99}, "upgrade moefy"),
        ({"surprise": 1}, "'surprise' is unknown"),
    ):
        meta.write_text(json.dumps({**json.loads(good), **change}))
        loads(word)
    data = json.loads(good)
    del data["recipe"]
    meta.write_text(json.dumps(data))
    loads("'recipe' is missing")
    meta.write_text("{")
    loads("not JSON")
    meta.write_text(good)
    moefy.load(converted)


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("layers.0.permutation", None, "permutation is missing"),
        ("layers.0.permutation", torch.zeros(64, dtype=torch.int32), "not a permutation"),
        ("layers.1.router.weight", None, "layers.1.router"),
        ("layers.1.router.weight", torch.zeros(3, 3), "layers.1.router"),
    ],
)
def test_missing_and_misshapen_tensors(converted, name, value, word):
    file = converted / "moefy.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors | ({} if value is None else {name: value}), file)
    meta = json.loads((converted / "moefy.json").read_text())
    meta["sha256"][file.name] = checkpoints.sha256(file)
    (converted / "moefy.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=word):
        moefy.load(converted)


def test_adapter_whose_base_is_gone_or_another(source, tmp_path):
    convert_tiny("llama", source, tmp_path / "a", adapter=True)
    moved = tmp_path / "moved"
    source.rename(moved)
    with pytest.raises(CheckpointError, match="base of this adapter"):
        moefy.load(tmp_path / "a")
    assert moefy.load(tmp_path / "a", base=moved)
    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.safetensors is another"):
        moefy.load(tmp_path / "a", base=moved)
    with pytest.raises(MoefyError, match="an adapter"):
        moefy.models.reorder.revert(tmp_path / "a", tmp_path / "b")


def test_verbs_on_the_wrong_folder(source, tmp_path):
    for verb in (["eval", source], ["generate", source, "x"], ["revert", source, tmp_path / "o"]):
        if verb[0] != "eval":  # which measures dense models too
            refuse(verb, "moefy.json", "convert it first")
        refuse([verb[0], tmp_path / "absent", *verb[2:]], "absent: no such folder")
    refuse(["bench"], "--layer")
    refuse(["bench", "--layer", "64,64"], "D,N,E,k")
    refuse(["ls", "router"], "did you mean 'routers'")


def test_usage_errors_exit_with_2():
    assert CliRunner().invoke(app, ["convert"]).exit_code == 2
    assert CliRunner().invoke(app, ["convert", "a", "b", "--densty", "1"]).exit_code == 2
