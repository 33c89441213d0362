"""Cut the bundled evaluation corpus from labelled text, by source.

    python experiments/build_corpus.py ../shared/data/corpora

Writes `moefy/demo/corpus.jsonl`: one document a line, `{"domain", "source_id", "text"}`, at most
2,000 bytes each. A *source* is the work a document was cut from: a book, a file, a law, a paper, a
textbook chapter, a poet, or the document itself where every document is a work of its own. Whole
sources are held out, and `split` is the one place that decides which, so that `train_demo.py`
trains on exactly the rest.
"""

import argparse
import hashlib
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

MAX_BYTES = 2000
MIN_BYTES = 400
DOCUMENTS_PER_DOMAIN = 128
SEPARATOR = "<|endoftext|>"

# Names that occur in one book only; a chapter takes the book most named in it and its neighbours.
BOOKS = {
    "sherlock-holmes": "Holmes|Watson",
    "dracula": "Helsing|Harker|Seward|Mina|Lucy",
    "great-expectations": "Joe|Biddy|Havisham|Wemmick|Estella|Herbert|Jaggers",
    "middlemarch": "Dorothea|Lydgate|Casaubon|Bulstrode|Rosamond|Ladislaw",
    "war-of-the-worlds": "Martian|Ogilvy|Woking|Weybridge",
    "moby-dick": "Ahab|[Ww]hale|Queequeg|Stubb|Starbuck|Pequod",
    "pride-and-prejudice": "Bennet|Darcy|Bingley|Wickham|Longbourn",
}
HELD_OUT_BOOKS = {"sherlock-holmes", "war-of-the-worlds"}
# Share of sources held out where sources are many; files and laws are few, so more of them.
HELD_OUT_SHARE = {"c_code": 0.18, "python_code": 0.14, "law_de": 0.14, "latex_math": 0.2}
DEFAULT_SHARE = 0.07
DOMAINS = (
    "c_code", "dialogue", "latex_math", "law_de", "law_us", "math_qa",
    "medical", "novels", "python_code", "science", "zh_poetry",
)  # fmt: skip


@dataclass(frozen=True)
class Document:
    """One document of a labelled corpus and the work it was cut from."""

    domain: str
    source_id: str
    text: str


def read_domain(folder: Path) -> list[Document]:
    """All documents of one domain, `train.txt` then `valid.txt`, with their sources."""
    texts = [
        text.strip("\n")
        for name in ("train.txt", "valid.txt")
        for text in (folder / name).read_text(encoding="utf-8").split(SEPARATOR)
        if text.strip()
    ]
    domain = folder.name
    if domain == "novels":
        sources = _books(texts)
    elif domain == "latex_math":
        sources = [_chapter(text) for text in texts]
    elif domain == "zh_poetry":
        sources = [_poet(text) for text in texts]
    else:
        sources = [_digest(text) for text in texts]
    return [Document(domain, source, text) for source, text in zip(sources, texts, strict=True)]


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Training documents and held-out documents; no source is in both."""
    domain = documents[0].domain
    share = HELD_OUT_SHARE.get(domain, DEFAULT_SHARE)

    def held_out(source: str) -> bool:
        if domain == "novels":
            return source in HELD_OUT_BOOKS
        return int(_digest(domain + source), 16) % 1000 < 1000 * share

    train = [doc for doc in documents if not held_out(doc.source_id)]
    test = [doc for doc in documents if held_out(doc.source_id)]
    return train, _without_copies(test, train)


def _without_copies(test: list[Document], train: list[Document]) -> list[Document]:
    """Drop held-out documents of which a third or more stands line by line in training text."""
    seen = {line for doc in train for line in doc.text.splitlines() if len(line) >= 30}

    def copied(doc: Document) -> float:
        lines = doc.text.splitlines()
        return sum(len(line) for line in lines if line in seen) / max(1, sum(map(len, lines)))

    return [doc for doc in test if copied(doc) < 1 / 3]


def _books(texts: list[str]) -> list[str]:
    counts = [[len(re.findall(names, text)) for names in BOOKS.values()] for text in texts]
    books = list(BOOKS)
    found = []
    for index in range(len(texts)):
        window = counts[max(0, index - 2) : index + 3]
        totals = [sum(column) for column in zip(*window, strict=True)]
        own = counts[index]
        best = own if max(own) >= 5 else totals
        found.append(books[best.index(max(best))])
    return found


def _chapter(text: str) -> str:
    part = re.search(r"^% *part: *(.+)$", text, re.IGNORECASE | re.MULTILINE)
    chapter = re.search(r"^% *chapter: *(.+)$", text, re.IGNORECASE | re.MULTILINE)
    if part and chapter:
        return f"{part[1].strip()}/{chapter[1].strip()}".lower()
    return _digest(text)


def _poet(text: str) -> str:
    lines = text.splitlines()
    return lines[1].strip() if len(lines) > 1 else _digest(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def cut(text: str) -> list[str]:
    """Pieces of at most `MAX_BYTES`, cut at line ends, then at sentence ends, then anywhere."""
    pieces, piece = [], ""
    for part in re.findall(r"[^\n.!?。！？]*[\n.!?。！？]+\s*|.+", text):  # noqa: RUF001
        while len(part.encode()) > MAX_BYTES:
            head = part.encode()[: MAX_BYTES - 4].decode(errors="ignore")
            part = part[len(head) :]
            pieces.append(head)
        if len((piece + part).encode()) > MAX_BYTES:
            pieces.append(piece)
            piece = ""
        piece += part
    return [p.strip("\n") for p in [*pieces, piece] if len(p.encode()) >= MIN_BYTES]


def bundle(test: list[Document]) -> list[Document]:
    """`DOCUMENTS_PER_DOMAIN` pieces, taken in turn from every held-out source."""
    by_source: dict[str, list[str]] = defaultdict(list)
    for doc in test:
        by_source[doc.source_id] += cut(doc.text)
    rounds = max((len(pieces) for pieces in by_source.values()), default=0)
    ordered = sorted(by_source, key=_digest)
    taken = [(s, by_source[s][r]) for r in range(rounds) for s in ordered if r < len(by_source[s])]
    return [Document(test[0].domain, s, text) for s, text in taken[:DOCUMENTS_PER_DOMAIN]]


def main() -> None:
    """Write the bundled corpus and print what it holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpora", type=Path)
    parser.add_argument("--out", type=Path, default=Path("moefy/demo/corpus.jsonl"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", encoding="utf-8") as file:
        for domain in DOMAINS:
            train, test = split(read_domain(args.corpora / domain))
            documents = bundle(test)
            if len(documents) < 120:
                raise SystemExit(f"{domain}: only {len(documents)} documents; raise its share")
            for doc in documents:
                file.write(json.dumps(vars(doc), ensure_ascii=False) + "\n")
            held = len({doc.source_id for doc in documents})
            train_bytes = sum(len(doc.text.encode()) for doc in train)
            print(f"{domain:12} {len(documents)} documents of {held} sources; train {train_bytes}")
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
