"""Which experts ran for a sample of whole documents, sorted in the ways that statistics of routing need.

A mask is a bit, so that 200,000 tokens of 12 layers of 64 experts take 19 MB. Memory is bounded by
the sample and does not grow with what is read beyond it.

In a `RoutingFrame` documents are numbered among those that have tokens, tokens by the ids that occur. Folds
are of whole units (documents, or sources where a domain has many), so that what is fitted on the other folds
has never seen the work that it is judged on. Figures of a layer are sums over documents, so that those of the
whole model are their totals.

Shapes: T tokens of the sample, Q documents with tokens, G units, E experts (the shared ones first; of a
`RoutedLayer` the routed ones alone), C groups of tokens.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from moefy.data.shards import Documents, Ints
from moefy.errors import CorpusError
from moefy.evaluation.statistics import Interval, ratio_interval, units
from moefy.inspection.account import Ledger
from moefy.inspection.part import Pass, PassPart, Runs, State
from moefy.inspection.texts.tokens import Tokens

TOKENS = 200_000
"""Most tokens of the sample."""

Bools = NDArray[np.bool_]
Singles = NDArray[np.float32]
Doubles = NDArray[np.float64]
Columns = dict[str, Any]


@dataclass(frozen=True)
class RoutingSample:
    """Tokens `[T]` of whole documents, and for each layer which experts ran."""

    documents: Documents
    tokens: Tokens
    packed: list[NDArray[np.uint8]]
    """Masks `[T, ceil(E / 8)]` of every layer."""
    experts: list[int]
    """E of every layer."""
    shared: list[int]
    """How many of them always run, counted from 0."""

    def mask(self, layer: int) -> Bools:
        """Which experts ran `[T, E]` in this layer, the shared ones first."""
        return np.unpackbits(self.packed[layer], axis=1, count=self.experts[layer]).astype(bool)

    def take(self, index: Bools | Ints) -> "RoutingSample":
        """These tokens of the sample."""
        return RoutingSample(
            self.documents,
            self.tokens.take(index),
            [packed[index] for packed in self.packed],
            self.experts,
            self.shared,
        )


@dataclass
class _Masks(State):
    """Of one layer."""

    experts: int
    shared: int
    packed: Runs[NDArray[np.uint8]]
    tokens: Runs[Tokens]
    """Of the first layer alone: all have the same."""


class RoutingSampler(PassPart[_Masks]):
    """Collects a `RoutingSample` during the pass, from documents drawn evenly beforehand."""

    def __init__(self, work: Pass, chosen_Q: Bools | None = None) -> None:
        super().__init__(work)
        self.documents = work.reading.documents
        if chosen_Q is None:
            chosen_Q = drawn_documents(work.reading.tokens_Q, TOKENS, work.seed)
        self.chosen_Q = chosen_Q

    def begin(self, ledger: Ledger) -> _Masks:
        """No masks yet."""
        return _Masks(ledger.experts, ledger.module.shared, Runs(), Runs())

    def take(self, state: _Masks, ledger: Ledger) -> None:
        """Masks of the tokens of chosen documents, a bit for each expert."""
        keep_T = self.chosen_Q[ledger.tokens.document_T]
        if not keep_T.any():
            return
        if ledger.layer == 0:
            state.tokens.merge([ledger.tokens.take(keep_T)])
        state.packed.merge([np.packbits(ledger.mask_TE.cpu().numpy()[keep_T], axis=1)])

    def sample(self) -> RoutingSample:
        """What was collected, in the order of the documents."""
        layers = [self.layers[layer] for layer in sorted(self.layers)]
        found = RoutingSample(
            self.documents,
            Tokens.join(layers[0].tokens.total),
            [np.concatenate(state.packed.total) for state in layers],
            [state.experts for state in layers],
            [state.shared for state in layers],
        )
        document_T = found.tokens.document_T
        if (np.diff(document_T) >= 0).all():
            return found
        return found.take(np.argsort(document_T, kind="stable"))


def drawn_documents(tokens_Q: Ints, limit: int, seed: int, among_Q: Bools | None = None) -> Bools:
    """Documents `[Q]` drawn at random until they hold `limit` tokens, at least one; all where they hold
    fewer. `among_Q` says which may be drawn; left out, any."""
    order_Q = np.random.default_rng(seed).permutation(len(tokens_Q))
    if among_Q is not None:
        order_Q = order_Q[among_Q[order_Q]]
    within_Q = np.cumsum(tokens_Q[order_Q]) <= limit
    within_Q[:1] = True
    chosen_Q = np.zeros(len(tokens_Q), dtype=bool)
    chosen_Q[order_Q[within_Q]] = True
    return chosen_Q


MIN_DOCUMENTS = 30
"""A row with fewer routed documents is shown in grey."""
MIN_COUNT = 10
"""Tokens of fewer occurrences are not listed, and not in vocabulary specialization."""
MANY_EXPERTS = 1024
"""Layers of more routed experts, such as single neurons, have no rows for tokens, domains, pairs."""
ENTRIES = 2**25
"""Most entries of one layer's mask: 134 MB in fp32. Beyond it, documents are drawn at random."""
FOLDS = 5
LEAST_UNITS = 3
"""One part to fit on, one to choose the smoothing by, one to be judged on."""


class Groups:
    """A grouping of tokens, with fast sums."""

    def __init__(self, index_T: Ints, size: int) -> None:
        """`index_T` is the group of every token, from 0 to `size - 1`."""
        self.index_T, self.size = index_T, size

    @classmethod
    def of(cls, *keys: Ints) -> "Groups":
        """Tokens that agree in every key `[T]` (from 0, or -1) are one group."""
        joint_T = np.zeros_like(keys[0])
        for key_T in keys:
            joint_T = joint_T * (int(key_T.max(initial=0)) + 2) + key_T + 1
        distinct, index_T = np.unique(joint_T, return_inverse=True)
        return cls(index_T.astype(np.int64), len(distinct))

    def take(self, chosen_T: Bools | Ints) -> "Groups":
        """The same groups of some tokens; a group may be left without any."""
        return Groups(self.index_T[chosen_T], self.size)

    @cached_property
    def count_C(self) -> Ints:
        """Tokens of every group."""
        return np.bincount(self.index_T, minlength=self.size)

    def sums(self, values_TX: NDArray[np.floating]) -> NDArray[np.floating]:
        """Sums `[C, X]` in the precision of the values; counts are exact up to 2^24 in fp32."""
        order_T, ends_C = self._order
        ones_T = np.ones(len(self.index_T), dtype=values_TX.dtype)
        rows = sparse.csr_array((ones_T, order_T, ends_C), shape=(self.size, len(order_T)))
        return np.asarray(rows @ values_TX)

    @cached_property
    def _order(self) -> tuple[Ints, Ints]:
        ends_C = np.concatenate([[0], np.cumsum(self.count_C)])
        return np.argsort(self.index_T, kind="stable"), ends_C

    def members(self) -> Iterator[Ints]:
        """Places of the tokens of every group, one group after the other."""
        order_T, ends_C = self._order
        return (order_T[start:end] for start, end in pairwise(ends_C))

    def first(self, values_T: Ints) -> Ints:
        """A value that all tokens of a group share `[C]`; 0 in groups without tokens."""
        found = np.zeros(self.size, dtype=np.int64)
        found[self.index_T] = values_T
        return found


@dataclass(frozen=True)
class RoutedLayer:
    """The routed experts of one layer."""

    layer: int
    shared: int
    mask_TE: Singles
    """1 where the expert ran."""

    @cached_property
    def load_E(self) -> Doubles:
        """Share of the tokens that run each."""
        return np.asarray(self.mask_TE.mean(0, dtype=np.float64))

    @cached_property
    def active_T(self) -> Ints:
        """How many ran for every token."""
        return np.asarray(self.mask_TE.sum(1), dtype=np.int64)

    @property
    def experts(self) -> int:
        """E."""
        return int(self.mask_TE.shape[1])

    def column(self, values_E: NDArray[np.floating], shared: float = np.nan) -> Doubles:
        """A column of the table of experts: the shared ones first, with a value of their own."""
        return np.concatenate([np.full(self.shared, shared), values_E])


class RoutingFrame:
    """A sample with everything about it that does not depend on a layer."""

    def __init__(self, sample: RoutingSample, seed: int = 0) -> None:
        """Raises `CorpusError` if there are under three units.

        Where the mask of a layer would have more than `ENTRIES` entries, documents are drawn.
        """
        self.sample, self.seed = _within(sample, seed), seed
        tokens = self.sample.tokens
        present_Q, document_T = np.unique(tokens.document_T, return_inverse=True)
        documents = self.sample.documents
        chosen = np.zeros(len(documents), dtype=bool)
        chosen[present_Q] = True
        self.unit_Q = units(documents, chosen)[present_Q]
        self.domains = sorted({documents.documents[d].domain for d in present_Q})
        number = {name: index for index, name in enumerate(self.domains)}
        self.domain_Q = np.array([number[documents.documents[d].domain] for d in present_Q])
        self.document = Groups(document_T.astype(np.int64), len(present_Q))
        self.units = int(self.unit_Q.max(initial=-1)) + 1
        if self.units < LEAST_UNITS:
            raise CorpusError(
                f"statistics of routing: {self.units} document(s) in the sample; what explains "
                f"routing is judged on other documents, give {LEAST_UNITS} or more"
            )
        self.domain_G = np.zeros(self.units, dtype=np.int64)
        self.domain_G[self.unit_Q] = self.domain_Q
        self.folds = min(FOLDS, self.units)
        self.fold_T = self._fold_Q()[document_T]
        self.domain = Groups(self.domain_Q[document_T], len(self.domains))
        self.unit = Groups(self.unit_Q[document_T], self.units)
        self.token = Groups.of(tokens.ids_T)
        self.previous = Groups.of(tokens.previous_T)
        bin_T = position_bin(tokens.position_T)
        self.bin = Groups(bin_T, int(bin_T.max()) + 1)
        self.stratum = Groups.of(document_T, bin_T)

    def __len__(self) -> int:
        return len(self.sample.tokens)

    @cached_property
    def factors(self) -> dict[str, tuple[Groups, Groups]]:
        """What may explain routing beside the token: its values, and its pairs with the token id."""
        groups = {"domain": self.domain, "previous": self.previous, "position": self.bin}
        token_T = self.token.index_T
        return {name: (g, Groups.of(token_T, g.index_T)) for name, g in groups.items()}

    @property
    def tokens_Q(self) -> Ints:
        """Tokens of every document."""
        return self.document.count_C

    def routed(self, layer: int) -> RoutedLayer:
        """The routed experts of a layer."""
        shared = self.sample.shared[layer]
        mask_TE = self.sample.mask(layer)[:, shared:].astype(np.float32)
        return RoutedLayer(layer, shared, mask_TE)

    def by_document(self, values_TX: NDArray[Any]) -> Doubles:
        """Sums over the tokens of every document `[Q, X]`, in fp64."""
        return np.asarray(self.document.sums(values_TX.astype(np.float64)))

    def interval(self, top_QX: NDArray[Any], bottom_Q: NDArray[Any]) -> Interval:
        """`sum top / sum bottom` over all documents with intervals; `bottom` may be `[Q, X]`."""
        return ratio_interval(top_QX, bottom_Q, self.unit_Q, seed=self.seed)

    def shuffled(self, strata: Groups, random: np.random.Generator) -> Ints:
        """Places `[T]` of a shuffle of tokens within each stratum."""
        order_T = np.argsort(strata.index_T, kind="stable")
        drawn_T = np.lexsort((random.random(len(self)), strata.index_T))
        found = np.empty(len(self), dtype=np.int64)
        found[order_T] = drawn_T
        return found

    def _fold_Q(self) -> Ints:
        """Units are dealt to the folds domain by domain, so that each fold has of every domain."""
        drawn_G = np.random.default_rng(self.seed).random(self.units)
        fold_G = np.empty(self.units, dtype=np.int64)
        fold_G[np.lexsort((drawn_G, self.domain_G))] = np.arange(self.units) % self.folds
        return fold_G[self.unit_Q]


def position_bin(position_T: Ints) -> Ints:
    """0, 1, 2-3, 4-7, 8-15 and so on: bin 0 is position 0, bin b starts at `2^(b - 1)`."""
    return np.where(position_T > 0, 1 + np.log2(np.maximum(position_T, 1)).astype(np.int64), 0)


def bin_edges(bins: int) -> tuple[Ints, Ints]:
    """First and last position of the bins."""
    first = np.concatenate([[0], 2 ** np.arange(bins - 1)]).astype(np.int64)
    return first, np.concatenate([first[1:] - 1, [2 * first[-1] - 1 if bins > 1 else 0]])


def _within(sample: RoutingSample, seed: int) -> RoutingSample:
    limit = ENTRIES // max(_routed(sample))
    if len(sample.tokens) <= limit:
        return sample
    document_T = sample.tokens.document_T
    present = np.unique(document_T)
    order = np.random.default_rng(seed).permutation(present)
    sizes = np.bincount(document_T)[order]
    kept = order[np.cumsum(sizes) <= max(limit, sizes[:LEAST_UNITS].sum())]
    return sample.take(np.isin(document_T, kept))


def _routed(sample: RoutingSample) -> Iterable[int]:
    return [all_ - shared for all_, shared in zip(sample.experts, sample.shared, strict=True)]


Totals = dict[str, tuple[Doubles, Doubles]]
"""By name, what stands above and below the fraction line, for every document `[Q]`."""


def over_running(
    frame: RoutingFrame, routed: RoutedLayer, values_T: Mapping[str, NDArray[Any]]
) -> Totals:
    """Means over the tokens that run any expert of values over the number that they run."""
    runs_T1, k_T = routed.active_T[:, None] > 0, np.maximum(routed.active_T, 1)
    share_TX = np.stack([values / k_T for values in values_T.values()], axis=1)
    top_QX = frame.by_document(share_TX * runs_T1)
    bottom_Q = frame.by_document(runs_T1)[:, 0]
    return {name: (top_QX[:, index], bottom_Q) for index, name in enumerate(values_T)}


def stacked(parts: list[Columns]) -> Columns:
    """The rows of several, as arrays."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def added(parts: list[Totals]) -> Totals:
    """The same figures over several layers."""
    found = {}
    for name in parts[0]:
        tops, bottoms = zip(*(part[name] for part in parts), strict=True)
        found[name] = np.sum(tops, axis=0), np.sum(bottoms, axis=0)
    return found


def ratio_columns(frame: RoutingFrame, totals: Totals) -> dict[str, Doubles]:
    """One row: every figure with its interval over documents."""
    top_QX = np.stack([top for top, _ in totals.values()], axis=1)
    bottom_QX = np.stack([bottom for _, bottom in totals.values()], axis=1)
    interval = frame.interval(top_QX, bottom_QX)
    return {
        key: values[index : index + 1]
        for index, name in enumerate(totals)
        for key, values in interval.columns(name).items()
    }
