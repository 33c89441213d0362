"""The verbs as a user types them, on the bundled demo models where those are there."""

import json
from pathlib import Path

import pytest
from tiny_conversion import corpus_for
from tiny_models import build
from typer.testing import CliRunner

from moefy.cli.quickstart import demo_models
from moefy.cli.verbs import app
from moefy.data.corpus import load_corpus


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
    text = say("convert", tmp_path, tmp_path / "out", "--dry-run", "--expert-size", 16)
    assert "64 neurons in 4 experts of 16" in text
    assert not (tmp_path / "out").exists()
    data = json.loads(say("convert", tmp_path, tmp_path / "out", "--dry-run", "--json"))
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
    for word in ("kmeans", "conditional_mean", "threshold", "export", "gpt_neox"):
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
    text = say("generate", tmp_path / "out", "Question: What is", "--tokens", 8)
    assert text.startswith("Question: What is")
    assert len(text) > len("Question: What is") + 4
    dense = say("generate", tmp_path / "out", "Question: What is", "--tokens", 8, "--dense")
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
