"""The text around a token, by offsets into the document as it was given.

Tokens are never decoded one by one: a character may be split over several tokens, and a tokenizer may
change what it reads. The tokenizer's own offsets say which characters a token covers; all pieces of a
split character cover that character.
"""

from bisect import bisect_right
from dataclasses import dataclass

from moefy.data import Sample
from moefy.errors import MoefyError
from moefy.interpret.reading import Reading

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
