"""From a moefied model and texts to what an inspection reads, and back to what its tables point at, in words.

Two disjoint shards of documents are read: examples are chosen from `select`, and every claim is checked on
`held_out`. Neither has been seen by the partition or the router where the text is that of the conversion;
other texts are split by a hash of each document.

A shown document is its text and where in it, in characters, every token ends. Without a text, or where the
tokenizer does not know, its ids stand for it. Tokens are never decoded one by one: a character may be split
over several tokens, and a tokenizer may change what it reads. The tokenizer's own offsets say which
characters a token covers; all pieces of a split character cover that character.

Shapes: Q documents.
"""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.data.corpus import IGNORED, Batch, Corpus, Document, Sample, load_corpus
from moefy.data.inputs import load_tokenizer, read_batches
from moefy.data.shards import HELD_OUT, SELECT, Documents, Ints, select_and_check
from moefy.errors import MoefyError, UnsupportedModel
from moefy.experts.moefied import of
from moefy.inspection.record import Table, table
from moefy.models.artefact import Artefact
from moefy.models.checkpoint import Checkpoint
from moefy.models.config import read_config
from moefy.recipe import from_dict

TOKENS = 200_000
"""Most tokens that are read where nothing else is said."""
KINDS = ("decoder", "encoder")


@dataclass(frozen=True)
class Reading:
    """What is read, in the order in which it is read."""

    batches: list[Batch]
    documents: Documents
    tokenizer: Any
    """None for models without one; contexts are then shown as ids."""
    kind: str
    """`decoder` or `encoder`."""
    vocabulary: int
    corpora: dict[str, str]
    """SHA-256 of every corpus."""

    @cached_property
    def first_B(self) -> list[int]:
        """Number of the first document of every batch."""
        sizes = [len(batch.samples) for batch in self.batches]
        return [0, *np.cumsum(sizes).tolist()][:-1]

    @cached_property
    def tokens_Q(self) -> Ints:
        """Tokens of every document `[Q]`."""
        sizes = [len(sample.inputs["input_ids"]) for b in self.batches for sample in b.samples]
        return np.array(sizes, dtype=np.int64)

    def of_shard(self, shard: str) -> list[Batch]:
        """The batches of one shard."""
        first = zip(self.batches, self.first_B, strict=True)
        return [batch for batch, at in first if self.documents.shards[at] == shard]


def read(
    model: PreTrainedModel,
    corpora: Mapping[str, Any] | Any = None,
    *,
    tokens: int = TOKENS,
) -> Reading:
    """The documents to inspect `model` (from `moefy.load`) on, about `tokens` tokens of them.

    `corpora` is what `load_corpus` takes, or a mapping of names to that; None is the bundled corpus.
    Domains are taken in turn, so that each has as many documents as the others where it can.

    Raises `UnsupportedModel` for images and encoder-decoders, `CorpusError` for texts that are too
    short to be split.
    """
    artefact = of(model).artefact
    checkpoint = of(model).checkpoint
    kind = of(model).kind
    if kind not in KINDS:
        raise UnsupportedModel(
            f"{type(model).__name__}: inspect reads tokens of decoders and encoders, not of a model "
            f"of kind '{kind}'"
        )
    context = from_dict(artefact.recipe).context
    return read_texts(checkpoint, kind, context, artefact, corpora, tokens=tokens)


def read_texts(
    checkpoint: Checkpoint,
    kind: str,
    context: int,
    artefact: Artefact | None,
    corpora: Mapping[str, Any] | Any = None,
    *,
    tokens: int = TOKENS,
) -> Reading:
    """`read` for any checkpoint, documents cut to `context` tokens; `artefact` says what must be left
    out because something was fitted on it."""
    named = corpora if isinstance(corpora, Mapping) else {None: corpora}
    shards = {shard: Corpus(shard, []) for shard in (SELECT, HELD_OUT)}
    owner: dict[tuple[str, ...], str] = {}
    hashes = {}
    for given, source in named.items():
        corpus = load_corpus(source)
        name = given or corpus.name
        hashes[name] = corpus.sha256
        for shard, part in zip(shards, select_and_check(corpus, artefact), strict=True):
            shards[shard].documents.extend(part.documents)
            owner |= {(shard, *_key(document)): name for document in part.documents}
    known = sum(len(corpus.documents) for corpus in shards.values())
    batches: list[Batch] = []
    labels: list[str] = []
    for shard, corpus in shards.items():
        share = max(1, round(tokens * len(corpus.documents) / known))
        found = read_batches(checkpoint, kind, corpus, context, share)
        batches += found
        labels += [shard] * sum(len(batch.samples) for batch in found)
    chosen = [sample.document for batch in batches for sample in batch.samples]
    names = [owner[shard, *_key(doc)] for shard, doc in zip(labels, chosen, strict=True)]
    documents = Documents(chosen, labels, names)
    vocabulary = read_config(checkpoint).get_text_config().vocab_size
    return Reading(batches, documents, load_tokenizer(checkpoint.folder), kind, vocabulary, hashes)


def _key(document: Any) -> tuple[str, str, str]:
    return document.domain, document.source_id, document.sha256


def sample_of_ids(name: str, ids_T: Tensor) -> Sample:
    """Token ids as if they had been read: a document of this domain and source without text."""
    document = Document(name, name, ids=tuple(ids_T.tolist()))
    inputs = {"input_ids": ids_T, "attention_mask": torch.ones_like(ids_T)}
    return Sample(document, inputs, torch.cat([ids_T[1:], torch.tensor([IGNORED])]), 0)


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
        return pieces_of_ids(sample.inputs["input_ids"].tolist())
    ends = rising(end for _, end in spans)
    return {"text": sample.document.text[: ends[-1]], "ends": ends}


def rising(ends: Iterable[int]) -> list[int]:
    """A token that stands for no character ends where the one before it does."""
    found: list[int] = []
    for end in ends:
        found.append(max(end, found[-1] if found else 0))
    return found


def pieces_of_ids(ids: list[int]) -> dict[str, Any]:
    """Token ids as a text, and where each of them ends."""
    pieces = [f"{number} " for number in ids]
    return {"text": "".join(pieces), "ends": rising(_sums(map(len, pieces)))}


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
    """Where every token of a document begins and ends in its text, in characters; None if there is
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
