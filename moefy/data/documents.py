"""Documents with labels, as statistics need them.

The unit of every statistic is the document, never the token: tokens of one document are alike.

Shapes: D documents.
"""

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moefy.data.corpus import Document

Ints = NDArray[np.int64]
SELECT, HELD_OUT = "select", "held_out"
"""The two shards: what examples are chosen from, and what claims are checked on."""


@dataclass(frozen=True)
class Documents:
    """Documents `[D]` in the order in which they are read."""

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
        """Number of every document's domain `[D]`."""
        number = {name: index for index, name in enumerate(self.domains)}
        return np.array([number[doc.domain] for doc in self.documents], dtype=np.int64)

    @property
    def sources(self) -> list[Hashable]:
        """The source of every document, with its domain."""
        return [(doc.domain, doc.source_id) for doc in self.documents]

    def of_shard(self, shard: str) -> NDArray[np.bool_]:
        """Which documents `[D]` are of this shard."""
        return np.array([name == shard for name in self.shards], dtype=bool)
