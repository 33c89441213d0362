"""The verbs as a user types them, on the bundled demo models where those are there."""

import errno
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_conversion import corpus_for
from tiny_models import build
from typer.testing import CliRunner

from moefy.cli.quickstart import demo_models
from moefy.cli.verbs import app
from moefy.data import corpus
from moefy.data.corpus import load_corpus
from moefy.experts import placement
from moefy.run.computing import computing


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    build("llama", folder / "source")
    rows = [
        json.dumps({"input_ids": r, "source_id": str(i)}) for i, r in enumerate(corpus_for("llama"))
    ]
    (folder / "ids.jsonl").write_text("\n".join(rows))
    say(
        "convert", folder / "source", folder / "out", "--corpus", folder / "ids.jsonl",
        "--recipe", "export", "--expert-size", 8, "--density", 0.5, "--set", "router.epochs=2",
    )  # fmt: skip
    return folder


def say(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def test_dry_run_reads_the_config_only(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "source" / "config.json").read_text())
    text = say("convert", tmp_path, folder / "new", "--dry-run", "--expert-size", 16)
    assert "64 neurons in 4 experts of 16" in text
    assert not (folder / "new").exists()
    data = json.loads(say("convert", tmp_path, folder / "new", "--dry-run", "--json"))
    assert data["layers"][0]["experts"] == 64


def test_eval_prints_a_table_or_json(folder, tmp_path):
    ids = folder / "ids.jsonl"
    text = say("eval", folder / "out", "--corpus", ids, "-q", "-o", tmp_path / "record.json")
    assert "KL to dense" in text
    for words in ("without position 0 and attention sinks", "bigram skill", "KL tail", "router: "):
        assert words in text
    assert "model.layers.1" not in text
    assert "model.layers.1" in say("eval", folder / "out", "--corpus", ids, "-q", "-v")
    record = json.loads(say("eval", folder / "out", "--corpus", ids, "-q", "--json"))
    kept = json.loads((tmp_path / "record.json").read_text())
    assert record["total"] == kept["total"]
    oracle = json.loads(
        say("eval", folder / "out", "--corpus", ids, "--router", "oracle", "--json")
    )
    assert oracle["total"]["kl"]["mean"] < record["total"]["kl"]["mean"]
    dense = json.loads(
        say("eval", folder / "out", "--corpus", ids, "--against", folder / "source", "--json")
    )
    assert dense["total"]["kl"]["mean"] == pytest.approx(record["total"]["kl"]["mean"], rel=1e-3)


def test_revert_and_ls_and_env(folder, tmp_path):
    say("revert", folder / "out", tmp_path / "back")
    back, source = tmp_path / "back", folder / "source"
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    text = say("ls")
    for word in (
        "kmeans",
        "conditional_mean",
        "threshold",
        "export",
        "gpt_neox",
        "masked",
        "views",
        "native",
    ):
        assert word in text
    assert "torch" in say("env")
    found = json.loads(say("env", "--json"))
    assert found["versions"]["moefy"] and found["moved"] == []


@pytest.mark.parametrize("name", sorted(demo_models()))
def test_generate_with_a_demo_model(name, tmp_path):
    source, corpus = demo_models()[name], tmp_path / "text.jsonl"
    texts = (document.text for document in load_corpus().take(40).documents)
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    few = ("context=64", "router.tokens=512", "partition.tokens=256")
    settings = [word for setting in few for word in ("--set", setting)]
    say(
        "convert", source, tmp_path / "out", "--recipe", "fast", "--corpus", corpus, *settings
    )  # fmt: skip
    text = say("generate", tmp_path / "out", "Question: What is", "--new-tokens", 8)
    assert text.startswith("Question: What is")
    assert len(text) > len("Question: What is") + 4
    dense = say("generate", tmp_path / "out", "Question: What is", "--new-tokens", 8, "--dense")
    assert dense.startswith("Question: What is")


def test_compare_shows_recipes_at_equal_budgets(folder, tmp_path):
    options = ("--corpus", folder / "ids.jsonl", "--budgets", "0.5", "-q")
    text = say("compare", folder / "source", "--recipes", "fast,wina,griffin", *options)
    assert "fast" in text
    assert "wina" in text
    assert "n/a: cannot go below this budget" in text
    data = json.loads(
        say("compare", folder / "source", "--recipes", "fast,wina", *options, "--json")
    )
    found = {row["recipe"]: row for row in data["rows"]}
    assert found["fast"]["active_budget"] <= 0.51
    assert 0.4 < found["wina"]["active_budget"] < 0.55
    assert found["fast"]["kl"] > 0


def refused(*arguments: object, code: int) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_the_version_and_the_python_are_told():
    assert say("--version") == "moefy 0.1.0\n"
    assert json.loads(say("env", "--json"))["python"] == platform.python_version()


@pytest.mark.parametrize(
    ("words", "new"),
    [
        (["eval", "OUT", "--output", "a.json"], "--output is --out now"),
        (["bench", "OUT", "--calibrate"], "--calibrate is moefy calibrate now"),
        (["bench", "OUT", "--generated=4"], "--generated is --new-tokens now"),
        (["recover", "OUT", "NEW", "--tokens", "9"], "--tokens is --train-tokens now"),
        (["sparsify", "OUT", "NEW", "--precision", "bf16"], "--precision is --dtype now"),
        (["generate", "OUT", "--tokens=9", "hello"], "--tokens is --new-tokens now"),
        (["diff", "OUT", "OUT", "--text", "a.txt"], "--text is --corpus now"),
    ],
)
def test_an_old_name_of_an_option_is_answered_by_the_new_one(words, new):
    assert refused(*words, code=2) == f"moefy: {new}\n"


def test_an_old_name_may_be_a_value(folder):
    assert "no such folder" in refused("generate", folder / "none", "--", "--tokens", code=1)


def test_out_is_a_folder_or_a_json_file(folder, tmp_path):
    ids, out = folder / "ids.jsonl", folder / "out"
    say("eval", out, "--corpus", ids, "-q", "--documents", 4, "-o", tmp_path / "all")
    assert json.loads((tmp_path / "all" / "evaluation.json").read_text())["documents"] == 4
    few = ("--tokens", 300, "--skip", "controls", "--skip", "causal", "-q", "--corpus", ids)
    text = say("inspect", out, *few, "-o", tmp_path / "one.json")
    assert f"written to {tmp_path / 'one.json'}" in text
    assert json.loads((tmp_path / "one.json").read_text())["kind"] == "inspection"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "one.json"]


def test_a_dense_model_has_its_cross_entropy(folder):
    ids = ("--corpus", folder / "ids.jsonl", "--json", "-q")
    record = json.loads(say("eval", folder / "source", *ids))
    assert set(record["total"]) >= {"ce", "accuracy", "tokens"}
    assert "ce_dense" not in record["total"]
    moefied = json.loads(say("eval", folder / "out", *ids, "--against", folder / "source"))
    # The folder reads the shard that nothing was fitted on, the dense model all of it.
    assert record["documents"] > moefied["documents"]
    assert moefied["total"]["ce_dense"]["mean"] == pytest.approx(
        record["total"]["ce"]["mean"], rel=0.2
    )
    assert "CE" in say("eval", folder / "source", *ids[:2], "-q")
    assert "without experts; --router" in refused(
        "eval", folder / "source", "--router", "oracle", code=1
    )


def test_documents_are_at_least_one(folder):
    assert "--documents" in refused("eval", folder / "out", "--documents", 0, code=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "./none", "OUT"], "no such folder"),
        (["generate", "none", "hello"], "none: no such folder; give one that moefy convert wrote"),
        (["diff", "a/b/c", "OUT"], "a/b/c: no such folder"),
        (["convert", "SOURCE", "OUT"], "exists already; choose another name or pass --overwrite"),
        (["prune", "SOURCE", "OUT", "--forget", "x"], "exists already"),
    ],
)
def test_a_wrong_path_is_told_before_torch_is_imported(folder, words, message):
    places = {"OUT": str(folder / "out"), "SOURCE": str(folder / "source")}
    code = (
        "import sys\nfrom moefy.cli.verbs import app\n"
        f"try:\n    app({[places.get(word, word) for word in words]!r})\n"
        "finally:\n    assert 'torch' not in sys.modules"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1), ran.stderr
    assert message in ran.stderr


def test_device_dtype_and_batch_size_reach_what_runs(folder, monkeypatch):
    seen = []
    pad = corpus._pad
    monkeypatch.setattr(
        corpus, "_pad", lambda samples: seen.append((len(samples), place())) or pad(samples)
    )

    def place() -> tuple[object, object]:
        found = placement.placement()
        return found.get("dtype"), found.get("device_map")

    words = ["eval", folder / "source", "--corpus", folder / "ids.jsonl", "-q", "--json"]
    wide = json.loads(say(*words))
    assert max(count for count, _ in seen) > 2
    seen.clear()
    asked = ["--batch-size", 2, "--dtype", "float16", "--device", "cpu"]
    narrow = json.loads(say(*words, *asked))
    assert {count for count, _ in seen} == {2}
    assert {where for _, where in seen} == {(torch.float16, None)}
    assert narrow["total"]["ce"]["mean"] != wide["total"]["ce"]["mean"]
    assert narrow["total"]["ce"]["mean"] == pytest.approx(wide["total"]["ce"]["mean"], abs=0.05)
    assert placement.now().dtype is None


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--device", "cuda:99", "--device cuda:99: this machine has"),
        ("--device", "gpu", "--device gpu: expected cpu, cuda or cuda:1"),
        ("--dtype", "float8", "unknown dtype 'float8'"),
        ("--batch-size", 0, "--batch-size 0: expected 1 or more"),
    ],
)
def test_what_this_machine_has_not_is_one_line(folder, option, value, message):
    assert message in refused("eval", folder / "out", option, value, code=1)


def test_what_is_asked_for_holds_in_the_block_alone():
    with computing(dtype="bfloat16", batch_size=3), computing(batch_size=2):
        assert (placement.now().dtype, placement.now().batch_size) == (torch.bfloat16, 2)
    assert placement.now().batch_size is None


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENAMETOOLONG, "choose a shorter name"),
        (errno.ENOSPC, "free some room and run again"),
        (errno.EACCES, "choose a place that may be read and written"),
        (errno.EIO, "--debug shows where"),
    ],
)
def test_an_error_of_the_operating_system_is_one_line(folder, tmp_path, monkeypatch, code, remedy):
    def failing(*_):
        raise OSError(code, os.strerror(code), "record.json")

    monkeypatch.setattr("moefy.cli.verbs.write", failing)
    monkeypatch.setattr("moefy.evaluation.folder.evaluate", lambda *_, **__: {})
    line = refused("eval", folder / "out", code=1)
    assert line == f"moefy: record.json: {os.strerror(code)}; {remedy}\n"


@pytest.mark.parametrize("length", [250, 300])
def test_a_name_that_is_too_long_is_one_line(folder, length):
    words = [
        "convert",
        folder / "source",
        folder / ("x" * length),
        "--corpus",
        folder / "ids.jsonl",
    ]
    line = refused(*words, "--expert-size", 16, "-q", code=1)
    assert "File name too long); choose" in line or "File name too long; choose" in line
    assert line.splitlines()[-1].startswith("moefy: ")


@pytest.fixture(scope="module")
def moved(folder, tmp_path_factory) -> Path:
    """`side`, of adapter form, whose base has become `elsewhere`."""
    place = tmp_path_factory.mktemp("moved")
    shutil.copytree(folder / "source", place / "source")
    say(
        "convert", place / "source", place / "side", "--corpus", folder / "ids.jsonl", "--adapter",
        "--recipe", "export", "--expert-size", 8, "--density", 0.5, "--set", "router.epochs=2",
    )  # fmt: skip
    (place / "source").rename(place / "elsewhere")
    return place


def test_the_base_of_an_adapter_that_has_moved_is_said_once_for_every_verb(folder, moved, tmp_path):
    ids, side, base = folder / "ids.jsonl", moved / "side", ("--base", moved / "elsewhere")
    assert "--base" in refused("eval", side, "--corpus", ids, code=1)
    here = json.loads(say("eval", side, *base, "--corpus", ids, "--json"))
    full = json.loads(say("eval", folder / "out", "--corpus", ids, "--json"))
    assert here["total"] == full["total"]
    say("diff", side, folder / "out", *base, "--corpus", ids, "--tokens", 400, "-q")
    assert "has no tokenizer" in refused("generate", side, "x", *base, code=1)
    few = ("--tokens", 400, "--skip", "controls", "--skip", "causal", "-q")
    say("inspect", side, *base, "--corpus", ids, *few)
    say("export", side, tmp_path / "dense", "--to", "dense", *base)
    name = "model.safetensors"
    assert (tmp_path / "dense" / name).read_bytes() == (folder / "out" / name).read_bytes()
    say("bench", side, *base, "--engine", "auto", "--samples", 5, "--new-tokens", 1, "--prompt-tokens", 4,
        "--no-calibrate", "-q")  # fmt: skip


def test_a_base_that_is_not_the_one_is_refused(folder, moved, tmp_path):
    build("gpt2", tmp_path / "other")
    ids = ("--corpus", folder / "ids.jsonl")
    for verb in (("eval", *ids), ("diff", *ids)):
        words = [
            verb[0],
            moved / "side",
            *([folder / "out"] if verb[0] == "diff" else []),
            *verb[1:],
        ]
        text = refused(*words, "--base", tmp_path / "other", code=1)
        assert "this artefact was made from" in text
    text = refused("eval", moved / "side", *ids, "--base", tmp_path / "none", code=1)
    assert "none: no such folder" in text
    text = refused("eval", folder / "out", *ids, "--base", moved / "elsewhere", code=1)
    assert "no model here is an adapter on a base; leave --base out" in text
    inside = moved / "elsewhere" / "new"
    text = refused(
        "export", moved / "side", inside, "--to", "dense", "--base", moved / "elsewhere", code=1
    )
    assert "which is read" in text and not inside.exists()
