"""Corpora as people have them: read as they are meant, or refused by file, place and remedy."""

import bz2
import gzip
import io
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch

from moefy.data.corpus import load_corpus
from moefy.data.files import PIECE_BYTES
from moefy.errors import CorpusError

SEPARATORS = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei"


def lines(*rows) -> bytes:
    return "\n".join(
        r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows
    ).encode()


def texts(path: Path) -> list[str]:
    return [doc.text for doc in load_corpus(path).documents]


def test_lines_end_at_line_feeds_alone(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines({"text": SEPARATORS}, {"text": "two"}))
    assert texts(file) == [SEPARATORS, "two"]
    file.write_bytes(lines({"text": "one"}, {"text": "two"}).replace(b"\n", b"\r\n\r\n"))
    assert texts(file) == ["one", "two"]
    (tmp_path / "a.txt").write_text(SEPARATORS, encoding="utf-8")
    assert texts(tmp_path / "a.txt") == [SEPARATORS]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    content = {".txt": b"text", ".csv": b"text\ntext", ".json": b'[{"text": "text"}]'}
    raw = content.get(Path(name).suffix, b'{"text": "text"}')
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + raw)
    assert texts(tmp_path / name) == ["text"]


BAD = {
    "null": ({"text": None}, "'text' is null"),
    "list": ({"text": ["a"]}, "'text' is a list"),
    "number": ({"text": 3}, "'text' is 3"),
    "object": ({"text": {}}, "'text' is an object"),
    "surrogate": (r'{"text": "ab\ud800"}', r"lone surrogate '\\ud800' at character 2"),
    "label": (r'{"text": "a", "domain": "\udfff"}', "lone surrogate"),
    "null label": ({"text": "a", "domain": None}, "'domain' is null"),
    "list label": ({"text": "a", "source_id": []}, "'source_id' is a list"),
    "array": ([1, 2], "it is a list"),
    "scalar": ("3", "it is 3"),
    "nothing": ({"body": "a"}, "neither 'text' nor 'input_ids' in body"),
    "no ids": ({"input_ids": []}, "neither"),
    "negative": ({"input_ids": [1, -1]}, "'input_ids' has -1 at 1"),
    "fraction": ({"input_ids": [1.5]}, "'input_ids' has 1.5 at 0"),
    "digits": ({"input_ids": ["1"]}, "'input_ids' has '1' at 0"),
    "huge": ({"input_ids": [2**63]}, "expected whole numbers"),
    "string": ({"input_ids": "12"}, "expected a list of whole numbers"),
    "deep": ("[" * 100_000, "nested too deep|Expecting value"),
    "digits of a number": ("1" * 5000, "not a document"),
    "cut": ('{"text": "a', "Unterminated"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_record_is_refused_by_file_and_line(tmp_path, bad):
    row, words = BAD[bad]
    file = tmp_path / "some.jsonl"
    file.write_bytes(lines({"text": "good"}, "", row))
    with pytest.raises(CorpusError, match=words) as caught:
        load_corpus(file)
    assert f"{file}: line 3 is not a document" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_items_in_memory_are_refused_by_number():
    for bad in (None, ["a"], [1, None], {"text": None}, "\ud800", 7):
        with pytest.raises(CorpusError, match="item 1 is not a document"):
            load_corpus(["good", bad])
    found = load_corpus([{"text": "a", "domain": "d"}, np.arange(3), torch.arange(2), range(2)])
    assert [(d.domain, d.text, d.ids) for d in found.documents] == [
        ("d", "a", ()), ("tokens", "", (0, 1, 2)), ("tokens", "", (0, 1)), ("tokens", "", (0, 1)),
    ]  # fmt: skip


def test_what_tools_hide_is_no_text(tmp_path):
    for name in (".git/objects/ab", ".ipynb_checkpoints/a.txt", "law/.cache/b.txt", ".hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\xff not text")
    (tmp_path / "law" / "a.txt").write_text("text")
    corpus = load_corpus(tmp_path)
    assert [(doc.domain, doc.text) for doc in corpus.documents] == [("law", "text")]


ROWS = [{"text": 'one, two\n"three"', "domain": "p"}, {"text": "four", "domain": "q"}]


def parquet(rows) -> bytes:
    import pyarrow  # of the dev extra
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), out)
    return out.getvalue()


FILES = {
    "a.jsonl": lambda: lines(*ROWS),
    "a.ndjson": lambda: lines(*ROWS),
    "a.json": lambda: json.dumps(ROWS, indent=1).encode(),
    "lines.json": lambda: lines(*ROWS),
    "a.csv": lambda: b'text,domain\n"one, two\n""three""",p\nfour,q\n',
    "a.tsv": lambda: b'domain\ttext\np\t"one, two\n""three"""\nq\tfour\n',
    "a.parquet": lambda: parquet(ROWS),
    "a.jsonl.gz": lambda: gzip.compress(lines(*ROWS)),
    "a.json.bz2": lambda: bz2.compress(json.dumps(ROWS).encode()),
    "a.csv.xz": lambda: lzma.compress(b'text,domain\n"one, two\n""three""",p\nfour,q\n'),
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_documents(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name]())
    found = load_corpus(tmp_path / name).documents
    assert [(doc.text, doc.domain) for doc in found] == [(r["text"], r["domain"]) for r in ROWS]
    assert len({doc.source_id for doc in found}) == 2
    inside = load_corpus(tmp_path).documents
    assert [doc.text for doc in inside] == [doc.text for doc in found]


def test_packed_text_is_text(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n<|endoftext|>\ntwo"))
    assert [text.strip() for text in texts(tmp_path / "a.txt.gz")] == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", gzip.compress(b"x"), r"is gzip; let its name end in \.gz"),
        ("a.gz", gzip.compress(b"x" * 99)[:-9], "cannot be unpacked .* copy or download it again"),
        ("a.gz", b"plain", "cannot be unpacked"),
        ("a.jsonl.xz", b"plain", "cannot be unpacked"),
        ("a.zst", b"\x28\xb5\x2f\xfd12", "zstd -d"),
        ("a.zip", b"PK\x03\x04", "zip archive"),
        ("a.docx", b"PK\x03\x04", "save it as text"),
        ("a.pdf", b"%PDF-1.7", "PDF"),
        ("a.txt", b"PAR1...", r"let its name end in \.parquet"),
        ("a.txt", "ab".encode("utf-16"), "UTF-16 -t UTF-8"),
        ("a.txt", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.json", b'{"a": 1}', "line 1 is not a document .*neither"),
        ("a.json", b'[{"text": "a"}, 3]', "record 2 is not a document"),
        ("a.json", b"[" * 99_999, "not a document"),
        ("a.json", b"[]", "holds no text"),
        ("a.jsonl", b"\n \n", "holds no text"),
        ("a.jsonl", b'{"text": " \\n"}', "holds no text"),
        ("a.csv", b"text\n", "holds no text"),
        ("a.csv", b"text,domain\n,p\n", "holds no text"),
        ("a.csv", b"body\na\n", "neither 'text' nor 'input_ids' in body"),
        ("a.csv", b'text\n"a', "follows line 1 is not a row"),
        ("a.parquet", b"PAR1 and no more", "truncated or corrupt parquet"),
        ("a.npy", b"", "truncated or no stack"),
        ("a.npy", b"\x80\x04]q\x00.", "truncated or no stack"),
        ("a.safetensors", b"abc", "truncated or no stack"),
        ("a.png", b"abc", "not an image"),
    ],
)
def test_what_cannot_be_read_is_named_with_the_remedy(tmp_path, name, content, words):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(CorpusError, match=words) as caught:
        load_corpus(file)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_long_documents_are_cut_alike_in_every_kind_of_file(tmp_path, name):
    text = "ähnlich " * 20_000 + "\n" + "line\n" * 2_000 + "end"
    content = {".txt": text, ".csv": f'text\n"{text}"\n', ".json": json.dumps([text])}
    raw = content.get(Path(name).suffix, json.dumps({"text": text}))
    (tmp_path / name).write_text(raw, encoding="utf-8")
    found = texts(tmp_path / name)
    assert "".join(found) == text
    assert len(found) > 80 and all(len(piece.encode()) <= PIECE_BYTES for piece in found)
    assert len({doc.source_id for doc in load_corpus(tmp_path / name).documents}) == 1


def test_one_line_of_megabytes_takes_no_square_of_time(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 5_000_000, encoding="utf-8")
    found = texts(tmp_path / "a.txt")
    assert len(found) == 5_000 and set(found) == {"é" * 1000}
