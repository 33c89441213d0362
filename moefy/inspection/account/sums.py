"""Sums over the tokens of blocks of documents: what means and their intervals are made from.

A block is a unit of the statistics (a document, or a source where a domain has many), or several
units of one domain where there are more than `BLOCKS`: memory then no longer grows with the text. The
first token of a document is kept apart, because in many models its norms dwarf all others.

Shapes: T tokens, D documents, G blocks, C columns.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moefy.data.documents import Documents, Ints
from moefy.evaluation.statistics import Floats, Interval, ratio_interval, units
from moefy.inspection.texts.tokens import Tokens

BLOCKS = 512
"""About the most blocks; at least one for each domain."""


class Blocks:
    """Which block every document belongs to; a block is of one domain."""

    def __init__(self, documents: Documents, most: int = BLOCKS) -> None:
        unit_D, domain_D = units(documents), documents.domain_D
        each = max(1, most // max(1, len(documents.domains)))
        self.block_D = np.zeros(len(documents), dtype=np.int64)
        domains: list[int] = []
        for domain in range(len(documents.domains)):
            here_D = domain_D == domain
            number_D = np.unique(unit_D[here_D], return_inverse=True)[1] % each
            self.block_D[here_D] = len(domains) + number_D
            domains += [domain] * (int(number_D.max(initial=-1)) + 1)
        self.domain_G = np.array(domains, dtype=np.int64)
        """Number of every block's domain `[G]`."""

    def __len__(self) -> int:
        return len(self.domain_G)

    def interval(self, top_GC: Floats, bottom_GC: Floats) -> Interval:
        """`sum top / sum bottom` over blocks with intervals; `bottom` may be `[G]`."""
        return ratio_interval(top_GC, bottom_GC, np.arange(len(self)))


class BlockSums:
    """Sums `[G, C]`, of first tokens and of all others, in fp64."""

    def __init__(self, blocks: Blocks, columns: int) -> None:
        self.blocks = blocks
        self._sums = torch.zeros(2 * len(blocks), columns, dtype=torch.float64)

    def add(self, tokens: Tokens, values_TC: Tensor) -> None:
        """Add the values of these tokens."""
        row_T = self.blocks.block_D[tokens.document_T] * 2 + (tokens.position_T > 0)
        self._sums.index_add_(0, torch.from_numpy(row_T), values_TC.cpu().double())

    @property
    def part(self) -> Tensor:
        """What `merge` takes."""
        return self._sums

    def merge(self, part: Tensor) -> None:
        """Add the sums over other tokens."""
        self._sums += part

    @property
    def first_GC(self) -> Floats:
        """Sums over first tokens."""
        return np.asarray(self._sums[0::2].numpy())

    @property
    def later_GC(self) -> Floats:
        """Sums over all other tokens."""
        return np.asarray(self._sums[1::2].numpy())

    @property
    def all_GC(self) -> Floats:
        """Sums over all tokens."""
        return self.first_GC + self.later_GC


class SeenDocuments:
    """In how many documents each of E things happened: a bit for each document and thing."""

    def __init__(self, documents: int, things: int) -> None:
        self.things = things
        self.part: NDArray[np.uint8] = np.zeros((documents, -(-things // 8)), dtype=np.uint8)
        """What `merge` takes."""

    def add(self, document_T: Ints, happened_TE: Tensor) -> None:
        """Take in tokens and what happened at each; tokens of a document follow each other."""
        starts = np.flatnonzero(np.diff(document_T, prepend=-1))
        if len(starts):
            any_DE = np.logical_or.reduceat(happened_TE.cpu().numpy(), starts, axis=0)
            self.part[document_T[starts]] |= np.packbits(any_DE, axis=1)

    def merge(self, part: NDArray[np.uint8]) -> None:
        """Take in other tokens."""
        self.part |= part

    @property
    def count_E(self) -> Ints:
        """Documents `[E]`."""
        seen_DE = np.unpackbits(self.part, axis=1, count=self.things)
        return np.asarray(seen_DE.sum(0, dtype=np.int64))
