"""`moefy diff`: any two checkpoints with one tokenizer, beside stock transformers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import moefy
from moefy.cli import app
from moefy.data import load_corpus
from moefy.errors import CheckpointError, MoefyError
from moefy.interpret.table import rows
from moefy.interpret.tokens import HELD_OUT

LLAMA = Path(__file__).parents[1] / "moefy" / "demo" / "llama"


@pytest.fixture(scope="module")
def texts():
    """A few documents of each domain, of which none is the whole bundled corpus."""
    return load_corpus().take(33)


@pytest.fixture(scope="module")
def shorter(tmp_path_factory):
    """The llama demo without its last layer."""
    folder = tmp_path_factory.mktemp("shorter")
    config = AutoConfig.from_pretrained(LLAMA)
    config.num_hidden_layers -= 1
    AutoModelForCausalLM.from_pretrained(LLAMA, config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(shorter, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("diff") / "out"
    return moefy.diff(LLAMA, shorter, corpora=texts, out=out, quiet=True), out


def log_p(model, ids):
    """Log-probability of every next token of one document, in fp64."""
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1].double()
    return logits.log_softmax(-1)


def stock(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def naive(base, other, inspection, corpus):
    """Delta and KL of every held-out document by its number, one document at a time."""
    by_hash = {doc.sha256: doc for doc in corpus.documents}
    tokenizer, found = AutoTokenizer.from_pretrained(LLAMA), {}
    for row in rows(inspection.table("documents")):
        if row["shard"] != HELD_OUT:
            continue
        text = by_hash[row["sha256"]].text
        ids = [tokenizer.bos_token_id or 0, *tokenizer(text)["input_ids"]]
        ids = torch.tensor(ids)[: row["tokens"]]
        first, second = log_p(base, ids), log_p(other, ids)
        kl = (first.exp() * (first - second)).sum(-1)
        delta = (first - second).gather(1, ids[1:, None])[:, 0]
        found[row["document"]] = (row["domain"], delta, kl)
    return found


def test_a_layer_less_beside_stock_transformers(found, shorter, texts):
    """Means, KL and both tails, from one document at a time."""
    inspection, _ = found
    documents = naive(stock(LLAMA), stock(shorter), inspection, texts)
    assert len(documents) >= 15
    deltas = torch.cat([delta for _, delta, _ in documents.values()])
    kls = torch.cat([kl for _, _, kl in documents.values()])
    summary = rows(inspection.table("hunt_summary"))[0]
    assert summary["tokens"] == len(deltas)
    assert summary["delta"] == pytest.approx(deltas.mean().item(), rel=1e-4)
    assert summary["kl"] == pytest.approx(kls.mean().item(), rel=1e-4)
    assert summary["delta_low"] < summary["delta"] < summary["delta_high"]
    assert summary["delta"] > 0.05, "the layer that is gone did something"
    for row in rows(inspection.table("hunt_domains")):
        own = [delta for domain, delta, _ in documents.values() if domain == row["domain"]]
        assert row["delta"] == pytest.approx(torch.cat(own).mean().item(), rel=1e-3, abs=1e-5)
    tail = rows(inspection.table("hunt"))
    for row in tail:
        delta = documents[row["document"]][1][row["position"]].item()
        assert row["delta"] == pytest.approx(delta, rel=1e-3, abs=1e-4)
    worst, best = (
        next(row["delta"] for row in tail if row["tail"] == name) for name in ("loses", "gains")
    )
    assert worst == pytest.approx(deltas.max().item(), rel=1e-3)
    assert best == pytest.approx(deltas.min().item(), rel=1e-3)


def test_the_other_way_round_has_the_other_sign(found, shorter, texts):
    inspection, _ = found
    back = moefy.diff(shorter, LLAMA, corpora=texts, quiet=True)
    forth = rows(inspection.table("hunt_summary"))[0]
    assert rows(back.table("hunt_summary"))[0]["delta"] == pytest.approx(-forth["delta"], rel=1e-5)
    losers = [r["document"] for r in rows(inspection.table("hunt")) if r["tail"] == "loses"]
    gainers = [r["document"] for r in rows(back.table("hunt")) if r["tail"] == "gains"]
    assert gainers == losers


def test_dense_beside_moefied(made):
    """A moefied folder runs moefied, and only documents are read that nothing was fitted on."""
    moefied, corpus = made("demo_llama"), load_corpus().take(64)
    found = moefy.diff(LLAMA, moefied, corpora=corpus, quiet=True)
    documents = naive(stock(LLAMA), moefy.load(moefied, dtype=torch.float32), found, corpus)
    read = {r["sha256"] for r in rows(found.table("documents")) if r["shard"] == HELD_OUT}
    held = moefy.data.split_shards(corpus, 0)["evaluation"].documents
    assert read == {doc.sha256 for doc in held}
    kl = torch.cat([kl for _, _, kl in documents.values()]).mean().item()
    assert kl > 0.1
    assert rows(found.table("hunt_summary"))[0]["kl"] == pytest.approx(kl, rel=1e-3)


def test_models_with_the_same_experts_show_how_much_routing_they_share(made):
    """Of the same routers everything; models with other experts have no such table."""
    folders = [made(kind) for kind in ("demo_llama", "demo_opt")]
    corpus = load_corpus().take(64)
    same = moefy.diff(folders[0], folders[0], corpora=corpus, quiet=True)
    table = rows(same.table("saturation"))
    assert [row["saturation"] for row in table] == [1.0] * 6
    assert all(row["saturation_chance"] < row["saturation_load"] < 0.95 for row in table)
    other = moefy.diff(*folders, corpora=corpus, quiet=True)
    assert "saturation" not in other.tables
    dense = moefy.diff(LLAMA, folders[0], corpora=corpus, quiet=True)
    assert "saturation" not in dense.tables


def test_a_model_beside_itself_shows_nothing(texts):
    same = moefy.diff(LLAMA, LLAMA, corpora=texts, quiet=True)
    assert rows(same.table("hunt")) == []
    assert rows(same.table("hunt_summary"))[0]["kl"] == pytest.approx(0, abs=1e-9)


def test_the_command_prints_tables_and_writes_the_report(shorter, tmp_path):
    text = tmp_path / "texts.jsonl"
    documents = load_corpus().take(22).documents
    text.write_text(
        "".join(json.dumps({"text": d.text, "domain": d.domain}) + "\n" for d in documents)
    )
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["diff", str(LLAMA), str(shorter), "--text", str(text), "-o", str(out), "-q"]
    )
    assert result.exit_code == 0, result.output
    assert "delta, nats" in result.output and "novels" in result.output
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "hunt" in page and str(shorter.name) in page
    kept = json.loads((out / "inspection.json").read_text(encoding="utf-8"))
    assert np.isfinite(kept["tables"]["hunt_summary"]["delta"][0])


def test_two_models_that_only_share_a_tokenizer(texts):
    found = moefy.diff(LLAMA, LLAMA.parent / "opt", corpora=texts, quiet=True)
    assert rows(found.table("hunt_summary"))[0]["kl"] > 0.1


def test_another_tokenizer_is_said_and_nothing_written(texts, tmp_path):
    other, out = tmp_path / "other", tmp_path / "out"
    stock(LLAMA).save_pretrained(other)
    tokenizer = AutoTokenizer.from_pretrained(LLAMA)
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(other)
    with pytest.raises(CheckpointError, match="different tokenizers"):
        moefy.diff(LLAMA, other, corpora=texts, out=out, quiet=True)
    assert not out.exists()


def test_a_folder_that_is_not_there_is_said(texts, tmp_path):
    with pytest.raises(MoefyError, match="nowhere"):
        moefy.diff(LLAMA, tmp_path / "nowhere", corpora=texts, quiet=True)
