"""Nothing that is evaluated was fitted on: what conversion and evaluation really read, by hash."""

import hashlib
import json
import sys
from types import SimpleNamespace

import pytest
from tiny_conversion import RECIPE, convert_tiny, corpus_for
from tiny_models import build

import moefy.conversion.convert
import moefy.evaluation.folder
from moefy.data.corpus import Corpus, Document, load_corpus
from moefy.data.shards import split_shards
from moefy.evaluation.folder import evaluate as evaluate_folder


def hashes(corpus):
    return {hashlib.sha256(repr((d.text, d.ids)).encode()).hexdigest() for d in corpus.documents}


@pytest.fixture
def read(monkeypatch):
    """The content of every corpus that is read, in order."""
    found = []

    def spy(original):
        def read_batches(checkpoint, kind, corpus, *rest):
            found.append(hashes(corpus))
            return original(checkpoint, kind, corpus, *rest)

        return read_batches

    for name in ("conversion.task", "conversion.convert", "evaluation.folder"):
        module = sys.modules[f"moefy.{name}"]
        monkeypatch.setattr(module, "read_batches", spy(module.read_batches))
    return found


@pytest.fixture
def folder(tmp_path):
    """A corpus in which every fourth document is there twice, under another label."""
    rows = [
        {"input_ids": ids, "source_id": str(i), "domain": "d"}
        for i, ids in enumerate(corpus_for("llama"))
    ]
    rows += [{**row, "source_id": f"copy {row['source_id']}"} for row in rows[::4]]
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "ids.jsonl").write_text(text)
    return tmp_path


def test_partition_router_hold_out_bigram_and_evaluation_share_no_document(folder, read):
    moefy.convert(
        build("llama", folder / "s"), folder / "o", recipe=RECIPE, corpus=folder / "ids.jsonl",
        quiet=True,
    )  # fmt: skip
    partition, router, held_out, *others, converted = read
    for first, second in ((partition, router), (partition, held_out), (router, held_out)):
        assert first
        assert not first & second
    fitted = set().union(partition, router, held_out, *others)
    assert converted
    assert not converted & fitted

    read.clear()
    record = evaluate_folder(folder / "o", corpus=folder / "ids.jsonl", quiet=True)
    evaluated, bigram = read
    assert evaluated >= converted
    assert bigram >= fitted
    assert not evaluated & bigram
    assert record["overlap"] == 0
    assert record["overlap_with"] == "the other shards of the corpus"
    assert record["bigram"]["documents"] == len(bigram)
    assert record["bigram"]["tokens"] > 0
    assert record["strata"]["rank_1"]["share"]["mean"] < 1


def texts(corpus, converted_with):
    artefact = SimpleNamespace(
        corpus={"name": converted_with.name, "sha256": converted_with.sha256}, recipe={"seed": 0}
    )
    return moefy.evaluation.folder._texts(corpus, artefact)


def test_another_corpus_is_compared_with_what_the_model_was_fitted_on():
    bundled = load_corpus()
    shards = split_shards(bundled, 0)
    known = [*shards["router"].documents[:3], shards["partition"].documents[0]]
    unseen = shards["evaluation"].documents[:5]
    new = [Document("new", "1", "never seen before")]
    other = Corpus("other", [*known, *unseen, *new])
    found = texts(other, bundled)
    assert found.evaluated is other
    assert other.overlap(found.not_evaluated) == 4
    assert not hashes(found.bigram) & hashes(other)
    assert len(found.bigram.documents) == len(bundled.documents) - 9


def test_without_the_corpus_of_the_conversion_the_record_says_so():
    lost, other = (
        Corpus("lost", [Document("d", "s", "gone")]),
        Corpus("o", [Document("d", "s", "x")]),
    )
    found = texts(other, lost)
    assert "not at hand" in found.compared
    assert hashes(found.bigram) == hashes(load_corpus())
    # Nothing is left to fit a bigram on where the bundled corpus itself is evaluated.
    assert texts(load_corpus(), lost).bigram.documents == []


def test_there_is_a_reason_where_there_is_no_bigram(tmp_path):
    convert_tiny("bert", build("bert", tmp_path / "s"), tmp_path / "b")
    record = evaluate_folder(tmp_path / "b", corpus=corpus_for("bert")[:9], quiet=True)
    assert record["bigram"] == {"tokens": 0, "why": "only language models have one"}
    assert "strata" not in record
    assert record["positions"]["without_first"]["cosine"]["mean"] < 1
    convert_tiny("llama", build("llama", tmp_path / "t"), tmp_path / "l")
    record = evaluate_folder(tmp_path / "l", corpus=corpus_for("llama")[:9], quiet=True)
    assert "tokenizer" in record["bigram"]["why"]
    assert "bigram_skill" not in record["total"]
