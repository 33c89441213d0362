"""A part of the one pass: what it keeps of every layer, how processes add up, what tables it gives.

    class Loudest(PassPart[Kept]):                           # and one row of `inspect.PARTS`
        def begin(self, ledger):                         # what is kept of a layer, all zero
            return Kept(largest=Largest(np.zeros(ledger.experts)))

        def take(self, kept, ledger):                    # one layer and a chunk of tokens
            kept.largest.add(ledger.norm_TE.amax(0).cpu().numpy())

        def rows(self, layer):                           # tables of a layer, by name
            return {"experts": of_experts(layer, {"loudest": self.layers[layer].largest.total})}

Whatever of a layer is an `Accumulator` is sent to the first process and merged there: counts and records
come out exactly as in one process; sums are in fp64 and differ in their last digits, because they are added up
in another order. Nothing goes through a file.

A block of documents is a unit of the statistics (a document, or a source where a domain has many), or
several units of one domain if there are more than `BLOCKS`: memory then no longer grows with the text.
The first token of a document is kept apart, because in many models its norms dwarf all others.

Shapes: Q documents, G blocks, X columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from moefy.data.shards import Documents, Ints
from moefy.evaluation.statistics import Floats, Interval, ratio_interval, units
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.inspection.account import Ledger, Unembedding, find_unembedding
from moefy.inspection.record import Table, joined
from moefy.inspection.texts import Reading
from moefy.inspection.texts.tokens import Tokens
from moefy.run.console import Reporter
from moefy.run.processes import ALONE, Processes

BLOCKS = 512
"""About the most blocks; at least one for each domain."""

P = TypeVar("P", bound="PassPart[Any]")
S = TypeVar("S", bound="State")
T = TypeVar("T")
A = TypeVar("A")
V = TypeVar("V", Tensor, NDArray[Any])


@dataclass
class Pass:
    """What all parts of one pass are made from."""

    model: PreTrainedModel
    reading: Reading
    seed: int = 0
    controls: bool = True
    """Whether figures are also made for random partitions, and compared between texts."""
    report: Reporter | None = None
    processes: Processes = ALONE

    def __post_init__(self) -> None:
        self.parts: list[PassPart[Any]] = []
        """Those that are made already."""

    @cached_property
    def modules(self) -> dict[int, SparseMlp]:
        """The MLPs by layer."""
        return sparse_mlps(self.model)

    @cached_property
    def blocks(self) -> "Blocks":
        """By what sums over documents are kept."""
        return Blocks(self.reading.documents)

    @cached_property
    def unembedding(self) -> Unembedding | None:
        """From the residual stream to logits; None for models that have no such map."""
        if self.reading.kind != "decoder":
            return None
        return find_unembedding(self.model, self.reading.batches[0].inputs["input_ids"][0])

    def part(self, kind: type[P]) -> P:
        """An earlier part, for one that builds on it."""
        return next(part for part in self.parts if isinstance(part, kind))


class Accumulator(ABC, Generic[A]):
    """Something that is added up over tokens, and over processes."""

    def __init__(self, total: A) -> None:
        self.total: A = total
        """All so far; none yet when it is made."""

    @abstractmethod
    def merge(self, part: A) -> None:
        """Take in the total of another, which heard other documents."""


class State:
    """What a part keeps of one layer: accumulators, dicts of them, and plain facts."""

    @property
    def part(self) -> dict[str, Any]:
        """Every accumulator's part."""
        found: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, Accumulator):
                found[name] = value.total
            elif isinstance(value, dict):
                found[name] = {key: each.total for key, each in value.items()}
        return found

    def merge(self, part: Mapping[str, Any]) -> None:
        """Take in what another process has kept of the layer."""
        for name, other in part.items():
            mine = getattr(self, name)
            if isinstance(mine, dict):
                for key, each in other.items():
                    mine[key].merge(each)
            else:
                mine.merge(other)


class PassPart(Generic[S]):
    """Listens to ledgers; when the pass is over it gives tables."""

    everywhere: ClassVar[bool] = False
    """Whether tables are made by all processes together; else the first makes them of what all heard."""
    before: "PassPart[Any] | None" = None
    """What must have heard the first batch in every process, whoever reads that."""

    def __init__(self, work: Pass) -> None:
        self.work = work
        self.layers: dict[int, S] = {}

    def begin(self, ledger: Ledger) -> S | None:
        """What is kept of a layer, nothing heard yet; None where nothing is to be."""
        return None

    def take(self, state: S, ledger: Ledger) -> None:
        """Add a chunk of tokens to what is kept of its layer."""

    def rows(self, layer: int) -> dict[str, Table]:
        """The tables of one layer, by name; the same names for all."""
        return {}

    def hear(self, ledger: Ledger) -> None:
        """Take in one layer and a chunk of tokens."""
        state = self.layers.get(ledger.layer)
        if state is None:
            state = self.begin(ledger)
            if state is None:
                return
            self.layers[ledger.layer] = state
        self.take(state, ledger)

    def part(self, layer: int) -> Any:
        """What was heard of a layer, without model and texts; None where nothing was."""
        state = self.layers.get(layer)
        return None if state is None else state.part

    def merge(self, layer: int, part: Any) -> None:
        """Take in what another process heard of a layer."""
        self.layers[layer].merge(part)

    def tables(self) -> dict[str, Table]:
        """All tables, once the pass is over: those of the layers, one below the other."""
        found = [self.rows(layer) for layer in sorted(self.layers)]
        return {name: joined(each[name] for each in found) for name in (found[0] if found else ())}


def gather(parts: Sequence[PassPart[Any]], layers: Iterable[int], processes: Processes) -> None:
    """Merge what all have heard into the parts of the first process, one layer at a time so that no
    more is held twice. All processes call it with the same parts and layers."""
    if processes.count == 1:
        return
    for layer in layers:
        for part in parts:
            heard = processes.all([part.part(layer)])
            for other in heard[1:] if processes.main else ():
                if other is not None:
                    part.merge(layer, other)


class Sum(Accumulator[V]):
    """A total, from zeros of its shape and type."""

    def add(self, values: V) -> None:
        """Add to the total."""
        self.total += values

    def merge(self, part: V) -> None:
        """Add another total."""
        self.total += part


class Largest(Accumulator[NDArray[Any]]):
    """The largest value of each of several, from zeros."""

    def merge(self, part: Any) -> None:
        """Take in values, or the largest of others."""
        np.maximum(self.total, part, out=self.total)


class Runs(Accumulator[list[T]]):
    """Pieces, in the order in which they come."""

    def __init__(self) -> None:
        super().__init__([])

    def merge(self, part: list[T]) -> None:
        """Take in pieces, behind these."""
        self.total += part


class Blocks:
    """Which block every document belongs to; a block is of one domain."""

    def __init__(self, documents: Documents, most: int = BLOCKS) -> None:
        unit_Q, domain_Q = units(documents), documents.domain_Q
        each = max(1, most // max(1, len(documents.domains)))
        self.block_Q = np.zeros(len(documents), dtype=np.int64)
        domains: list[int] = []
        for domain in range(len(documents.domains)):
            here_Q = domain_Q == domain
            number_Q = np.unique(unit_Q[here_Q], return_inverse=True)[1] % each
            self.block_Q[here_Q] = len(domains) + number_Q
            domains += [domain] * (int(number_Q.max(initial=-1)) + 1)
        self.domain_G = np.array(domains, dtype=np.int64)
        """Number of every block's domain `[G]`."""

    def __len__(self) -> int:
        return len(self.domain_G)

    def interval(self, top_GX: Floats, bottom_GX: Floats) -> Interval:
        """`sum top / sum bottom` over blocks with intervals; `bottom` may be `[G]`."""
        return ratio_interval(top_GX, bottom_GX, np.arange(len(self)))

    def columns(self, figures: Mapping[str, tuple[Floats, Floats]]) -> dict[str, Floats]:
        """Columns `name`, `name_low`, `name_high` of figures that each are sums above and below the
        fraction line: `[G, X]`, or `[G]` for a single row; below the line one column may serve for all."""
        tops = [top.reshape(len(self), -1) for top, _ in figures.values()]
        sizes = [bottom.reshape(len(self), -1) for _, bottom in figures.values()]
        bottoms = [np.broadcast_to(b, top.shape) for b, top in zip(sizes, tops, strict=True)]
        # All in one call: cells that are zero in the same blocks share their resamples.
        found = self.interval(np.concatenate(tops, axis=1), np.concatenate(bottoms, axis=1))
        cuts = np.cumsum([top.shape[1] for top in tops])[:-1]
        return {
            name + end: part
            for end, values in found.columns("").items()
            for name, part in zip(figures, np.split(values, cuts), strict=True)
        }


class BlockSums(Accumulator[Tensor]):
    """Sums `[G, X]`, of first tokens and of all others, in fp64."""

    def __init__(self, blocks: Blocks, columns: int) -> None:
        self.blocks = blocks
        super().__init__(torch.zeros(2 * len(blocks), columns, dtype=torch.float64))

    def add(self, tokens: Tokens, values_TX: Tensor) -> None:
        """Add the values of these tokens."""
        row_T = self.blocks.block_Q[tokens.document_T] * 2 + (tokens.position_T > 0)
        self.total.index_add_(0, torch.from_numpy(row_T), values_TX.cpu().double())

    def merge(self, part: Tensor) -> None:
        """Add the sums over other tokens."""
        self.total += part

    @property
    def first_GX(self) -> Floats:
        """Sums over first tokens."""
        return np.asarray(self.total[0::2].numpy())

    @property
    def later_GX(self) -> Floats:
        """Sums over all other tokens."""
        return np.asarray(self.total[1::2].numpy())

    @property
    def all_GX(self) -> Floats:
        """Sums over all tokens."""
        return self.first_GX + self.later_GX


class SeenDocuments(Accumulator[NDArray[np.uint8]]):
    """In how many documents each of X things happened: a bit for each document and thing."""

    def __init__(self, documents: int, things: int) -> None:
        self.things = things
        super().__init__(np.zeros((documents, -(-things // 8)), dtype=np.uint8))

    def add(self, document_T: Ints, happened_TX: NDArray[np.bool_]) -> None:
        """Take in tokens and what happened at each; tokens of a document follow each other."""
        starts = np.flatnonzero(np.diff(document_T, prepend=-1))
        if len(starts):
            any_QX = np.logical_or.reduceat(happened_TX, starts, axis=0)
            self.total[document_T[starts]] |= np.packbits(any_QX, axis=1)

    def merge(self, part: NDArray[np.uint8]) -> None:
        """Take in other tokens."""
        self.total |= part

    @property
    def count_X(self) -> Ints:
        """Documents `[X]`."""
        seen_QX = np.unpackbits(self.total, axis=1, count=self.things)
        return np.asarray(seen_QX.sum(0, dtype=np.int64))
