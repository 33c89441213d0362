"""`moefy diff`: any two checkpoints with one tokenizer, beside stock transformers.

What is compared with a loop is stored in fp32, in which every machine then runs it; bf16 is run in 16 bits
where the processor can, and there a batch and a document by itself round apart.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_conversion import RECIPE
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import moefy
from moefy.cli.verbs import app
from moefy.data.corpus import Corpus, load_corpus
from moefy.data.documents import HELD_OUT
from moefy.errors import CheckpointError, MoefyError
from moefy.inspection.record import rows
from moefy.recipe import override

LLAMA = Path(__file__).parents[2] / "moefy" / "demo" / "llama"


def beginnings(documents: int) -> Corpus:
    """How so many documents begin, as many of each domain."""
    whole = load_corpus().take(documents)
    return Corpus("short", [replace(doc, text=doc.text[:300]) for doc in whole.documents])


@pytest.fixture(scope="module")
def texts():
    return beginnings(33)


def of_llama(folder, layers):
    """The first layers of the llama demo, in fp32."""
    config = AutoConfig.from_pretrained(LLAMA)
    config.num_hidden_layers = layers
    model = AutoModelForCausalLM.from_pretrained(LLAMA, config=config, dtype=torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(LLAMA).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return of_llama(tmp_path_factory.mktemp("llama"), 3)


@pytest.fixture(scope="module")
def shorter(tmp_path_factory):
    """The same without its last layer."""
    return of_llama(tmp_path_factory.mktemp("shorter"), 2)


@pytest.fixture(scope="module")
def moefied(llama, tmp_path_factory):
    """The same moefied, with one random partition and with another."""
    folder = tmp_path_factory.mktemp("moefied")
    settings = {
        "partition.method": "random", "partition.expert_size": 64, "partition.tokens": 256,
        "router.tokens": 512, "router.epochs": 1, "compensation.name": "none",
    }  # fmt: skip
    for seed in (0, 1):
        recipe = override(RECIPE, {**settings, "seed": seed})
        moefy.convert(llama, folder / str(seed), recipe=recipe, corpus=beginnings(64), quiet=True)
    return folder / "0", folder / "1"


@pytest.fixture(scope="module")
def found(llama, shorter, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("diff") / "out"
    return moefy.diff(llama, shorter, corpora=texts, out=out, quiet=True), out


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


def test_a_layer_less_beside_stock_transformers(found, llama, shorter, texts):
    """Means, KL and both tails, from one document at a time."""
    inspection, _ = found
    documents = naive(stock(llama), stock(shorter), inspection, texts)
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


def test_the_other_way_round_has_the_other_sign(found, llama, shorter, texts):
    inspection, _ = found
    back = moefy.diff(shorter, llama, corpora=texts, quiet=True)
    forth = rows(inspection.table("hunt_summary"))[0]
    assert rows(back.table("hunt_summary"))[0]["delta"] == pytest.approx(-forth["delta"], rel=1e-5)
    losers = [r for r in rows(inspection.table("hunt")) if r["tail"] == "loses"]
    gainers = [r for r in rows(back.table("hunt")) if r["tail"] == "gains"]
    lost, gained = ({(r["document"], r["position"]) for r in side} for side in (losers, gainers))
    assert lost == gained
    values = [-r["delta"] for r in gainers]
    assert values == pytest.approx([r["delta"] for r in losers], rel=1e-4, abs=1e-5)


def test_dense_beside_moefied(llama, moefied):
    """A moefied folder runs moefied, and only documents are read that nothing was fitted on."""
    folder, corpus = moefied[0], beginnings(64)
    found = moefy.diff(llama, folder, corpora=corpus, quiet=True)
    documents = naive(stock(llama), moefy.load(folder, dtype=torch.float32), found, corpus)
    read = {r["sha256"] for r in rows(found.table("documents")) if r["shard"] == HELD_OUT}
    held = moefy.data.shards.split_shards(corpus, 0)["evaluation"].documents
    assert read == {doc.sha256 for doc in held}
    kl = torch.cat([kl for _, _, kl in documents.values()]).mean().item()
    assert kl > 0.1
    assert rows(found.table("hunt_summary"))[0]["kl"] == pytest.approx(kl, rel=1e-3)


def test_models_with_the_same_experts_show_how_much_routing_they_share(llama, moefied):
    """Of the same routers everything; models with other experts have no such table."""
    corpus = beginnings(64)
    same = moefy.diff(moefied[0], moefied[0], corpora=corpus, quiet=True)
    table = rows(same.table("saturation"))
    assert [row["saturation"] for row in table] == [1.0] * 3
    assert all(row["saturation_chance"] < row["saturation_load"] < 0.95 for row in table)
    other = moefy.diff(*moefied, corpora=corpus, quiet=True)
    assert "saturation" not in other.tables
    dense = moefy.diff(llama, moefied[0], corpora=corpus, quiet=True)
    assert "saturation" not in dense.tables


def test_a_model_beside_itself_shows_nothing(texts):
    same = moefy.diff(LLAMA, LLAMA, corpora=texts, quiet=True)
    assert rows(same.table("hunt")) == []
    assert rows(same.table("hunt_summary"))[0]["kl"] == pytest.approx(0, abs=1e-9)


def test_the_command_prints_tables_and_writes_the_report(llama, shorter, tmp_path):
    text = tmp_path / "texts.jsonl"
    documents = beginnings(22).documents
    text.write_text(
        "".join(json.dumps({"text": d.text, "domain": d.domain}) + "\n" for d in documents)
    )
    out = tmp_path / "out"
    result = CliRunner().invoke(
        app, ["diff", str(llama), str(shorter), "--corpus", str(text), "-o", str(out), "-q"]
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
