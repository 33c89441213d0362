"""Which text is for what: shards of a corpus, the roles they play, shares and counts.

    texts = by_role(load_corpus(), seed=recipe.seed)
    train, judge = texts["router"], texts["evaluation"].take(EVALUATED_DOCUMENTS)

A corpus is cut into four shards that share no document, nor a source in domains with 20 sources or
more, and every reader asks for a role. Nothing that is fitted, trained or chosen on one shard is ever
measured on the same. The seed of a conversion decides the shards of all that is done with its result.

The unit of every statistic is the document, never the token: tokens of one document are alike.
`Documents` has the labels that statistics need. Shapes: Q documents.
"""

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from moefy.data.corpus import MANY_SOURCES, Corpus, Document
from moefy.errors import CorpusError
from moefy.models.artefact import Artefact
from moefy.recipe import Recipe, from_dict

SHARDS = {"partition": 0.15, "router": 0.5, "examples": 0.1, "evaluation": 0.25}
"""Share of every domain's documents."""
HELD_OUT_SHARE = 0.15
"""Share of the router shard that is not fitted on: it stops fitting, sets thresholds and densities."""
SELECT_SHARE = 0.3
"""Share of the documents that examples are chosen from, in a corpus nothing was fitted on."""

_FITTED, _HELD_OUT = "router, fitted on", "router, held out"
ROLES: dict[str, tuple[str, ...]] = {
    # conversion
    "partition": ("partition",),
    "router": (_FITTED,),
    "held-out": (_HELD_OUT,),
    "evaluation": ("evaluation",),
    # training reads what conversion fits on, and checks on what that holds out
    "training": (_FITTED, "partition"),
    # bigrams: all but what is evaluated
    "fitted": ("partition", "router", "examples"),
    # inspection: examples are chosen on one shard, and claims checked on `evaluation`
    "examples": ("examples",),
    # removal: importance, how much may go, what is trained on to bring it back; figures of `evaluation`
    "rank": ("examples",),
    "decide": ("partition",),
    "relearn": ("router",),
    "measure": ("evaluation",),
}
"""The shards, or parts of the router shard, that each role reads."""

CONTEXT: int = Recipe.context
"""Tokens that a document is cut to where no recipe says."""
EVALUATED_DOCUMENTS = 44
"""Most documents that a verb measures on where it is not asked for more."""
LEAST_HELD_OUT = 2048
"""Held-out tokens that a conversion reads at least."""
HELD_OUT_TOKENS = 4096
"""Held-out tokens that training is checked on."""
BIGRAM_TOKENS = 10_000_000
"""Most tokens that a bigram is fitted on."""


def tokens_of_roles(recipe: Recipe) -> dict[str, int]:
    """Tokens that a conversion reads: for the partition, for routers, and held out from those."""
    return {
        "partition": recipe.partition.tokens,
        "router": recipe.router.tokens,
        "held-out": max(LEAST_HELD_OUT, round(recipe.router.tokens * HELD_OUT_SHARE)),
    }


def by_role(corpus: Corpus, seed: int) -> dict[str, Corpus]:
    """What each of `ROLES` reads. Raises what `split_shards` raises."""
    shards = split_shards(corpus, seed)
    fitted, held = hold_out(shards["router"], HELD_OUT_SHARE, seed)
    parts = {**shards, _FITTED: fitted, _HELD_OUT: held}
    return {
        role: replace(corpus, documents=[doc for name in names for doc in parts[name].documents])
        for role, names in ROLES.items()
    }


def of_conversion(corpus: Corpus, artefact: Artefact) -> dict[str, Corpus] | None:
    """`by_role` as the conversion split this corpus; None for one that it did not read."""
    if corpus.sha256 != artefact.corpus["sha256"]:
        return None
    return by_role(corpus, from_dict(artefact.recipe).seed)


def select_and_check(corpus: Corpus, artefact: Artefact | None) -> tuple[Corpus, Corpus]:
    """What examples are chosen from, and what claims about them are checked on.

    Of the corpus of the conversion that nothing was fitted on; any other is split by a hash of each
    document. Raises `CorpusError` where one of them would be empty.
    """
    texts = None if artefact is None else of_conversion(corpus, artefact)
    if texts is not None:
        return texts["examples"], texts["evaluation"]
    unique = list({doc.sha256: doc for doc in corpus.documents}.values())
    low = [int(doc.sha256[:8], 16) < SELECT_SHARE * 2**32 for doc in unique]
    select = [doc for doc, is_low in zip(unique, low, strict=True) if is_low]
    check = [doc for doc, is_low in zip(unique, low, strict=True) if not is_low]
    if not select or not check:
        raise CorpusError(
            f"corpus {corpus.name}: {len(unique)} different documents do not fill two disjoint "
            "shards; give more text"
        )
    return replace(corpus, documents=select), replace(corpus, documents=check)


def split_shards(corpus: Corpus, seed: int) -> dict[str, Corpus]:
    """Four shards, `SHARDS`, that share no document, nor a source where a domain has 20 or more.

    What the corpus holds twice is used once, so that no shard knows the content of another. Raises
    `CorpusError` where a shard would be empty.
    """
    parts: dict[str, list[Document]] = {name: [] for name in SHARDS}
    unique = list({doc.sha256: doc for doc in reversed(corpus.documents)}.values())[::-1]
    for domain in corpus.domains:
        documents = [doc for doc in unique if doc.domain == domain]
        sources = sorted({doc.source_id for doc in documents})
        if len(sources) >= MANY_SOURCES:
            units = [[doc for doc in documents if doc.source_id == s] for s in sources]
        else:
            units = [[doc] for doc in documents]
        order = np.random.default_rng([seed, _number(domain)]).permutation(len(units))
        total = sum(len(unit) for unit in units)
        # Each unit goes where the most is still missing, so that every shard fills evenly.
        have = dict.fromkeys(SHARDS, 0)
        for index in order:
            name = max(SHARDS, key=lambda n: SHARDS[n] * total - have[n])
            have[name] += len(units[index])
            parts[name] += units[index]
    empty = [name for name, documents in parts.items() if not documents]
    if empty:
        raise CorpusError(
            f"corpus {corpus.name}: {len(corpus.documents)} documents do not fill four disjoint "
            f"shards ({', '.join(SHARDS)}); '{empty[0]}' stays empty; give at least 8 documents"
        )
    return {name: replace(corpus, documents=docs) for name, docs in parts.items()}


def hold_out(corpus: Corpus, share: float, seed: int) -> tuple[Corpus, Corpus]:
    """Two corpora without a common document: the rest, and about this share of every domain."""
    order = np.random.default_rng([seed, 1]).permutation(len(corpus.documents))
    cut = max(1, round(share * len(order)))
    rest = [corpus.documents[i] for i in sorted(order[cut:])]
    out = [corpus.documents[i] for i in sorted(order[:cut])]
    return replace(corpus, documents=rest or out), replace(corpus, documents=out)


def _number(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


Ints = NDArray[np.int64]
SELECT, HELD_OUT = "select", "held_out"
"""The two shards: what examples are chosen from, and what claims are checked on."""


@dataclass(frozen=True)
class Documents:
    """Documents `[Q]` in the order in which they are read."""

    documents: list[Document]
    shards: list[str]
    """`SELECT` or `HELD_OUT` for each."""
    corpora: list[str]
    """The corpus that each came from."""

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def domains(self) -> list[str]:
        """Names of the domains, sorted; `domain_Q` counts in this order."""
        return sorted({doc.domain for doc in self.documents})

    @property
    def domain_Q(self) -> Ints:
        """Number of every document's domain `[Q]`."""
        number = {name: index for index, name in enumerate(self.domains)}
        return np.array([number[doc.domain] for doc in self.documents], dtype=np.int64)

    @property
    def sources(self) -> list[Hashable]:
        """The source of every document, with its domain."""
        return [(doc.domain, doc.source_id) for doc in self.documents]

    def take(self, numbers: Sequence[int]) -> "Documents":
        """Some of them, in this order."""
        return Documents(*([column[n] for n in numbers] for column in vars(self).values()))

    @classmethod
    def joined(cls, parts: Iterable["Documents"]) -> "Documents":
        """Those of several, one after another."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(list(chain.from_iterable(column)) for column in columns))

    def of_shard(self, shard: str) -> NDArray[np.bool_]:
        """Which documents `[Q]` are of this shard."""
        return np.array([name == shard for name in self.shards], dtype=bool)
