"""A real LLM from end to end: SmolLM2-135M-Instruct, which `scripts/setup --models` fetches.

The texts and token counts are as small as conversion takes: what is shown here is that every step works at
this depth and vocabulary and in bf16, not how good it gets.
"""

import json
import math
from importlib import resources
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from moefy.cli.verbs import app
from moefy.experts.loading import load
from moefy.experts.sparse_mlp import all_experts

pytestmark = pytest.mark.real

DENSITY = 0.75
UNIFORM = math.log(49152)
"""Nats of a token where nothing is known of it: beyond that a model is worse than none."""
ASKED = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


def say(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few English documents of the bundled corpus, cut short."""
    bundled = (resources.files("moefy") / "demo" / "corpus.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in bundled.splitlines()]
    chosen = [
        json.dumps({**row, "text": row["text"][:600]})
        for domain in ("novels", "science", "medical")
        for row in [row for row in rows if row["domain"] == domain][:16]
    ]
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("\n".join(chosen), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def converted(smollm2: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model moefied by the quick recipe on few tokens, its record beside it."""
    folder = tmp_path_factory.mktemp("real")
    record = say(
        "convert", smollm2, folder / "out", "--recipe", "fast", "--density", DENSITY, "--corpus", texts,
        "--set", "partition.tokens=512", "--set", "router.tokens=512", "-q", "--json",
    )  # fmt: skip
    (folder / "record.json").write_text(record, encoding="utf-8")
    return folder


def test_the_plan_is_that_of_its_config(smollm2, tmp_path):
    text = say("convert", smollm2, tmp_path / "out", "--recipe", "fast", "--dry-run")
    assert "134.5 M parameters" in text and "in 30 MLPs" in text and "1536 neurons" in text
    assert not (tmp_path / "out").exists()


def test_every_expert_on_is_the_dense_model(smollm2, converted):
    ids = torch.arange(1000, 1040).view(1, 40)
    sparse = load(converted / "out", dtype=torch.float32)
    dense = LlamaForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with torch.no_grad():
        want, few = dense(ids).logits, sparse(ids).logits
        with all_experts(sparse):
            got = sparse(ids).logits
    # The same products are added up in another order, 30 layers deep, in numbers of 24 bits.
    assert float((got - want).norm() / want.norm()) < 30 * 2**-18
    assert float((few - want).norm() / want.norm()) > 0.01


def test_its_quality_is_between_the_dense_models_and_nothing(converted):
    quality = json.loads((converted / "record.json").read_text(encoding="utf-8"))["evaluation"]
    total = quality["total"]
    assert quality["ffn_density"] == pytest.approx(DENSITY, abs=0.1)
    assert 0 < total["kl"]["mean"] < UNIFORM / 4
    assert 0 < total["ce_dense"]["mean"] < UNIFORM / 2
    assert total["ce"]["mean"] < UNIFORM / 2


def test_the_dense_answer_is_right(converted):
    assert "The capital of France is Paris." in say(
        "generate", converted / "out", ASKED, "--new-tokens", 10, "--dense"
    )


def test_no_engine_is_refused_in_bf16(converted):
    record = json.loads(
        say(
            "bench", converted / "out", "--dtype", "bfloat16", "--prompt-tokens", 32, "--new-tokens", 4,
            "--samples", 5, "--engine", "eager", "--engine", "native", "--engine", "views",
            "--engine", "auto", "-q", "--json",
        )
    )  # fmt: skip
    for cell in record["cells"]:
        assert set(cell["engines"]) >= {"eager", "native", "views", "auto"}, cell["refused"]
