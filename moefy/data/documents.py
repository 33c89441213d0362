"""Documents with labels, as statistics need them.

The unit of every statistic is the document, never the token: tokens of one document are alike.

Shapes: Q documents.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from moefy.data.corpus import Document

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
