"""What tables point at, in words: the documents of examples, the names of tokens, the text around one.

A document is its text and where in it, in characters, every token ends. Without a text, or where the
tokenizer does not know, its ids stand for it.

Tokens are never decoded one by one: a character may be split over several tokens, and a tokenizer may
change what it reads. The tokenizer's own offsets say which characters a token covers; all pieces of a
split character cover that character.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moefy.data.corpus import Sample
from moefy.errors import MoefyError
from moefy.inspection.texts.reading import Reading
from moefy.inspection.texts.table import Table, table

_LOST = "\ufffd"
"""What decoding puts in the place of bytes that are no character by themselves."""


def texts_of(reading: Reading, tables: Mapping[str, Table]) -> dict[str, dict[str, Any]]:
    """By number, `text` and `ends` of every document that a table other than `documents` names."""
    shown = {
        number
        for name, given in tables.items()
        if name != "documents"
        for number in given.get("document", ())
        if number is not None
    }
    return {str(number): _text(reading, number) for number in sorted(shown)}


def _text(reading: Reading, number: int) -> dict[str, Any]:
    sample, spans = sample_of(reading, number), spans_of(reading, number)
    if spans is None:
        return _of_ids(sample.inputs["input_ids"].tolist())
    ends = _rising(end for _, end in spans)
    return {"text": sample.document.text[: ends[-1]], "ends": ends}


def _rising(ends: Iterable[int]) -> list[int]:
    """A token that stands for no character ends where the one before it does."""
    found: list[int] = []
    for end in ends:
        found.append(max(end, found[-1] if found else 0))
    return found


def _of_ids(ids: list[int]) -> dict[str, Any]:
    pieces = [f"{number} " for number in ids]
    return {"text": "".join(pieces), "ends": _rising(_sums(map(len, pieces)))}


def _sums(lengths: Iterable[int]) -> Iterable[int]:
    total = 0
    for length in lengths:
        total += length
        yield total


def vocabulary_of(reading: Reading, tables: Iterable[Table]) -> dict[str, str]:
    """The name of every token id in a column of the tables that holds some; nothing without a tokenizer.

    A token that is part of a character has the tokenizer's own name for it.
    """
    if reading.tokenizer is None:
        return {}
    ids = {
        number
        for given in tables
        for column in ("token", "next", "target")
        for number in given.get(column, ())
        if isinstance(number, int) and number >= 0
    }
    found = {}
    for number in sorted(ids):
        text = reading.tokenizer.decode([number])
        if _LOST in text:
            text = str(reading.tokenizer.convert_ids_to_tokens(number))
        found[str(number)] = text
    return found


def documents_table(reading: Reading) -> Table:
    """A row for every document that was read, without its text."""
    documents = reading.documents
    return table(
        {
            "document": list(range(len(documents))),
            "domain": [doc.domain for doc in documents.documents],
            "source": [doc.source_id for doc in documents.documents],
            "corpus": documents.corpora,
            "shard": documents.shards,
            "tokens": reading.tokens_Q,
            "sha256": [doc.sha256 for doc in documents.documents],
        }
    )


WIDTH = 24


@dataclass(frozen=True)
class Window:
    """Tokens `first` to `first + len(ids) - 1` of a document; the one asked for is `position`."""

    document: int
    position: int
    first: int
    ids: list[int]
    start: int
    """`text` is the document's text from this character on; 0 without text."""
    text: str
    """Empty for models without a tokenizer, and for documents of ids."""
    spans: list[tuple[int, int]]
    """For every token, where it begins and ends in the document's text; empty without text. Equal ends
    mark a token that stands for no character."""


def sample_of(reading: Reading, document: int) -> Sample:
    """What the model read of this document."""
    if not 0 <= document < len(reading.documents):
        raise MoefyError(
            f"document {document}: the inspection read documents 0 to {len(reading.documents) - 1}"
        )
    batch = bisect_right(reading.first_B, document) - 1
    return reading.batches[batch].samples[document - reading.first_B[batch]]


def spans_of(reading: Reading, document: int) -> list[tuple[int, int]] | None:
    """Where every token of a document begins and ends in its text, in characters; None where there is
    no text, or the tokenizer does not know."""
    sample = sample_of(reading, document)
    ids, tokenizer = sample.inputs["input_ids"].tolist(), reading.tokenizer
    if not sample.document.text or tokenizer is None or not tokenizer.is_fast:
        return None
    read = tokenizer(sample.document.text, return_offsets_mapping=True, verbose=False)
    found = [(int(start), int(end)) for start, end in read["offset_mapping"]]
    # Decoders may have been given a first token that the tokenizer does not put there.
    added = 1 if list(read["input_ids"][: len(ids)]) != ids else 0
    found = [(0, 0)] * added + found
    if list(read["input_ids"][: len(ids) - added]) != ids[added:]:
        raise MoefyError(
            f"document {document}: the tokenizer no longer gives the tokens that were read; load the "
            "model with the tokenizer that it was inspected with"
        )
    return found[: len(ids)]


def context(reading: Reading, document: int, position: int, width: int = WIDTH) -> Window:
    """The token at `position` with up to `width` tokens to either side.

    Raises `MoefyError` for a document or position that was not read.
    """
    ids = sample_of(reading, document).inputs["input_ids"].tolist()
    if not 0 <= position < len(ids):
        raise MoefyError(
            f"position {position} of document {document}: it has positions 0 to {len(ids) - 1}"
        )
    first, last = max(0, position - width), min(len(ids), position + width + 1)
    spans = spans_of(reading, document)
    if spans is None:
        return Window(document, position, first, ids[first:last], 0, "", [])
    here = spans[first:last]
    start = min((a for a, b in here if b > a), default=here[0][0])
    end = max(b for _, b in here)
    text = sample_of(reading, document).document.text[start : max(start, end)]
    return Window(document, position, first, ids[first:last], start, text, here)
