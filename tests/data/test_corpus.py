import hashlib
import json
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefy.data.corpus import (
    IGNORED,
    Corpus,
    Document,
    load_corpus,
    make_batches,
)
from moefy.data.shards import SHARDS, hold_out, split_shards
from moefy.errors import CorpusError


def test_bundled_corpus_is_what_the_documentation_says():
    corpus = load_corpus()
    assert len(corpus.domains) >= 8
    for domain in corpus.domains:
        documents = [doc for doc in corpus.documents if doc.domain == domain]
        assert len(documents) >= 120
    assert all(0 < len(doc.text.encode()) <= 2000 for doc in corpus.documents)
    assert all(doc.source_id for doc in corpus.documents)


def test_bundled_shards_share_no_document_and_no_source():
    corpus = load_corpus()
    shards = split_shards(corpus, seed=0)
    few = {
        domain
        for domain in corpus.domains
        if len({d.source_id for d in corpus.documents if d.domain == domain}) < 20
    }
    for first in SHARDS:
        for second in SHARDS:
            if first < second:
                a, b = shards[first].documents, shards[second].documents
                assert not {d.text for d in a} & {d.text for d in b}
                sources = [
                    {(d.domain, d.source_id) for d in s if d.domain not in few} for s in (a, b)
                ]
                assert not sources[0] & sources[1]
    assert sum(len(s.documents) for s in shards.values()) == len(corpus.documents)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 40)), min_size=8, max_size=200),
    st.integers(0, 5),
)
def test_shards_are_a_partition(labels, seed):
    documents = [Document(f"d{d}", f"s{s}", text=f"text {i}") for i, (d, s) in enumerate(labels)]
    corpus = Corpus("made", documents)
    try:
        shards = split_shards(corpus, seed)
    except CorpusError:
        return
    texts = [doc.text for shard in shards.values() for doc in shard.documents]
    assert sorted(texts) == sorted(doc.text for doc in documents)
    again = split_shards(corpus, seed)
    assert {n: s.documents for n, s in again.items()} == {n: s.documents for n, s in shards.items()}


def test_too_small_a_corpus_says_so():
    with pytest.raises(CorpusError, match="four disjoint"):
        split_shards(load_corpus(["one", "two", "three"]), 0)


def test_hold_out_is_disjoint():
    corpus = load_corpus([f"text {i}" for i in range(40)])
    rest, out = hold_out(corpus, 0.15, 0)
    assert len(out.documents) == 6
    assert not {d.text for d in rest.documents} & {d.text for d in out.documents}
    assert len(rest.documents) + len(out.documents) == 40


def test_folders_files_and_jsonl(tmp_path):
    for domain in ("law", "code"):
        (tmp_path / "c" / domain).mkdir(parents=True)
        (tmp_path / "c" / domain / "a.txt").write_text("one line\n" * 400, encoding="utf-8")
    corpus = load_corpus(tmp_path / "c")
    assert corpus.domains == ["code", "law"]
    assert all(len(d.text.encode()) <= 2000 for d in corpus.documents)
    joined = "".join(d.text for d in corpus.documents if d.domain == "law")
    assert joined == ("one line\n" * 400).rstrip()

    (tmp_path / "x.txt").write_text("first\n<|endoftext|>\nsecond\n", encoding="utf-8")
    assert [d.text.strip() for d in load_corpus(tmp_path / "x.txt").documents] == [
        "first",
        "second",
    ]

    rows = [{"text": "a b", "domain": "p", "source_id": "s"}, {"input_ids": [1, 2, 3]}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    documents = load_corpus(tmp_path / "x.jsonl").documents
    assert documents[0] == Document("p", "s", "a b")
    assert documents[1].ids == (1, 2, 3)

    np.save(tmp_path / "p.npy", np.zeros((3, 3, 8, 8), dtype=np.float32))
    assert [d.image.shape for d in load_corpus(tmp_path / "p.npy").documents] == [(3, 8, 8)] * 3


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "holds no text"),
        ("latin.txt", b"caf\xe9", "not UTF-8"),
        ("bad.jsonl", b"{oops", "line 1"),
        ("bare.jsonl", b'{"domain": "x"}', "line 1"),
        ("flat.npy", None, "expected \\[images, C, H, W\\]"),
    ],
)
def test_bad_corpora_are_named(tmp_path, name, content, words):
    file = tmp_path / name
    if content is None:
        np.save(file, np.zeros(3))
    else:
        file.write_bytes(content)
    with pytest.raises(CorpusError, match=words) as caught:
        load_corpus(file)
    assert name.split(".")[0] in str(caught.value)


def test_missing_files_are_not_taken_for_dataset_names(tmp_path):
    with pytest.raises(CorpusError, match="no such file"):
        load_corpus(tmp_path / "absent.txt")


def test_decoder_samples_predict_every_next_token_and_padding_none():
    corpus = load_corpus([[5, 6, 7, 8], [9, 10]])
    (batch,) = make_batches(corpus.samples(None, "decoder", 16))
    by_length = sorted(range(2), key=lambda i: int(batch.inputs["attention_mask"][i].sum()))
    assert batch.inputs["input_ids"][by_length[0]].tolist() == [9, 10, 0, 0]
    assert batch.targets_BT[by_length[0]].tolist() == [10, IGNORED, IGNORED, IGNORED]
    assert batch.targets_BT[by_length[1]].tolist() == [6, 7, 8, IGNORED]
    assert batch.mask()[by_length[0]].tolist() == [True, True, False, False]


def test_encoder_decoder_samples_split_the_document():
    (sample,) = load_corpus([[5, 6, 7, 8, 9]]).samples(None, "encoder-decoder", 16)
    assert sample.inputs["input_ids"].tolist() == [5, 6]
    assert sample.inputs["decoder_input_ids"].tolist() == [0, 7, 8]
    assert sample.targets_T.tolist() == [7, 8, 9]


def test_text_without_a_tokenizer_is_refused():
    with pytest.raises(CorpusError, match="no tokenizer"):
        load_corpus(["some text"]).samples(None, "decoder", 16)
    with pytest.raises(CorpusError, match="not an image"):
        load_corpus(["some text"]).samples(None, "image", 16)


def test_batches_hold_every_sample_once():
    samples = load_corpus([[1] * n for n in range(2, 60)]).samples(None, "decoder", 64)
    batches = make_batches(samples, tokens=128)
    assert sum(len(b.samples) for b in batches) == len(samples)
    assert all(b.inputs["input_ids"].numel() <= 128 for b in batches)
    assert sum(int(b.mask().sum()) for b in batches) == sum(range(2, 60))
    assert torch.equal(batches[0].inputs["input_ids"].bool(), batches[0].mask())


def hashes(corpus):
    """The content of documents, whatever their labels."""
    return {
        hashlib.sha256(repr((d.text, d.ids, None if d.image is None else d.image.tolist())).encode())
        .hexdigest()
        for d in corpus.documents
    }  # fmt: skip


def five_shards(corpus, seed):
    """What conversion and evaluation read: partition, router, hold-out, examples, evaluation."""
    shards = split_shards(corpus, seed)
    router, held_out = hold_out(shards["router"], 0.15, seed)
    return {**shards, "router": router, "hold-out": held_out}


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_bundled_shards_and_hold_out_share_no_content(seed):
    shards = five_shards(load_corpus(), seed)
    for first, second in combinations(shards.values(), 2):
        assert not hashes(first) & hashes(second)
    assert sum(len(hashes(shard)) for shard in shards.values()) == len(hashes(load_corpus()))


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 30), min_size=30, max_size=90), st.integers(0, 5))
def test_what_a_corpus_holds_twice_is_in_one_shard_only(contents, seed):
    documents = [
        Document(f"d{i % 3}", f"s{i % 41}", text=f"text {c}", ids=(c,) if c % 2 else ())
        for i, c in enumerate(contents)
    ]
    corpus = Corpus("made", documents)
    try:
        shards = five_shards(corpus, seed)
    except CorpusError:
        return
    for first, second in combinations(shards.values(), 2):
        assert not hashes(first) & hashes(second)
    assert set().union(*map(hashes, shards.values())) == hashes(corpus)


def test_content_is_compared_without_labels():
    image = torch.arange(12.0).view(3, 2, 2)
    first = Corpus(
        "a", [Document("x", "1", "one"), Document("x", "2", ids=(1, 2)), Document("x", "3", image=image)]
    )  # fmt: skip
    same = Corpus("b", [Document("y", "9", d.text, d.ids, d.image) for d in first.documents])
    assert first.overlap(same) == 3
    assert first.without(same).documents == []
    other = [
        Document("x", "1", "one "),
        Document("x", "2", ids=(1, 3)),
        Document("x", "3", image=image.view(3, 4, 1)),
    ]
    assert Corpus("c", other).overlap(first) == 0
    assert Corpus("c", [*other, first.documents[1]]).overlap(first) == 1
