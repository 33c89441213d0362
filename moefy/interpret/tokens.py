"""What is read: documents with labels, and what every token of them is.

The unit of every statistic is the document, never the token: tokens of one document are alike.

Shapes: T tokens, D documents (in this package's tables; of a model, D is the width).
"""

from collections.abc import Hashable
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from moefy.data import Document

Ints = NDArray[np.int64]
SELECT, HELD_OUT = "select", "held_out"
"""The two shards: what examples are chosen from, and what claims are checked on."""
NOTHING: Ints = np.zeros(0, dtype=np.int64)
NONE = -1
"""Where there is no such token."""


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
        """Names of the domains, sorted; `domain_D` counts in this order."""
        return sorted({doc.domain for doc in self.documents})

    @property
    def domain_D(self) -> Ints:
        """Number of every document's domain `[D]`."""
        number = {name: index for index, name in enumerate(self.domains)}
        return np.array([number[doc.domain] for doc in self.documents], dtype=np.int64)

    @property
    def sources(self) -> list[Hashable]:
        """The source of every document, as `evaluate.bootstrap.Bootstrap` wants it."""
        return [(doc.domain, doc.source_id) for doc in self.documents]

    def of_shard(self, shard: str) -> NDArray[np.bool_]:
        """Which documents `[D]` are of this shard."""
        return np.array([name == shard for name in self.shards], dtype=bool)


@dataclass(frozen=True)
class Tokens:
    """Tokens `[T]`, all int64; `NONE` where there is no such token."""

    ids_T: Ints
    """The token that is read."""
    previous_T: Ints
    """The token before it in the document."""
    target_T: Ints
    """The token that comes next, which a language model is to predict here."""
    predicted_T: Ints
    """The token that the moefied model puts first here."""
    position_T: Ints
    """Position in the document, from 0."""
    document_T: Ints
    """Number of the document in `Documents`."""

    def __len__(self) -> int:
        return len(self.ids_T)

    def take(self, index: NDArray[np.bool_] | Ints | slice) -> "Tokens":
        """The tokens at these places."""
        return Tokens(*(getattr(self, field.name)[index] for field in fields(self)))

    @classmethod
    def join(cls, parts: list["Tokens"]) -> "Tokens":
        """Several runs of tokens as one, or none."""
        return cls(
            *(
                np.concatenate([NOTHING, *(getattr(part, field.name) for part in parts)])
                for field in fields(cls)
            )
        )
