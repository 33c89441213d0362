"""From a moefied model and texts to what an inspection reads: two disjoint shards of documents.

Examples are chosen from the shard `select`, and every claim is checked on `held_out`. Neither has
been seen by the partition or the router where the text is that of the conversion; other texts are
split by a hash of each document.

Shapes: Q documents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from moefy.data.corpus import Batch, Corpus, load_corpus
from moefy.data.inputs import load_tokenizer, read_batches
from moefy.data.shards import HELD_OUT, SELECT, Documents, Ints, select_and_check
from moefy.errors import UnsupportedModel
from moefy.experts.moefied import of
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
    shards: dict[str, list[tuple[str, Corpus]]] = {SELECT: [], HELD_OUT: []}
    hashes = {}
    for given, source in named.items():
        corpus = load_corpus(source)
        name = given or corpus.name
        hashes[name] = corpus.sha256
        for shard, part in zip(shards, select_and_check(corpus, artefact), strict=True):
            shards[shard].append((name, part))
    each = {
        shard: max(1, round(tokens * len_ / sum(map(_documents, shards.values()))))
        for shard, len_ in ((shard, _documents(parts)) for shard, parts in shards.items())
    }
    batches: list[Batch] = []
    labels: list[tuple[str, str]] = []
    for shard, parts in shards.items():
        owner = {doc: name for name, part in parts for doc in _keys(part)}
        joined = Corpus(shard, [doc for _, part in parts for doc in part.documents])
        found = read_batches(checkpoint, kind, joined, context, each[shard])
        batches += found
        for batch in found:
            labels += [(shard, owner[_key(s.document)]) for s in batch.samples]
    documents = Documents(
        [sample.document for batch in batches for sample in batch.samples],
        [shard for shard, _ in labels],
        [name for _, name in labels],
    )
    vocabulary = read_config(checkpoint).get_text_config().vocab_size
    return Reading(batches, documents, load_tokenizer(checkpoint.folder), kind, vocabulary, hashes)


def _documents(parts: list[tuple[str, Corpus]]) -> int:
    return sum(len(part.documents) for _, part in parts)


def _key(document: Any) -> tuple[str, str, str]:
    return document.domain, document.source_id, document.sha256


def _keys(corpus: Corpus) -> list[tuple[str, str, str]]:
    return [_key(doc) for doc in corpus.documents]
