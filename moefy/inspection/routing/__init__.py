"""Which experts ran for a sample of whole documents: what every statistic of routing is made from.

A mask is a bit, so that 200,000 tokens of 12 layers of 64 experts take 19 MB. Memory is bounded by
the sample and does not grow with what is read beyond it.

Shapes: T tokens of the sample, E experts (the shared ones first).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moefy.data.shards import Documents, Ints
from moefy.inspection.account import Ledger
from moefy.inspection.part import Pass, PassPart, Runs, State
from moefy.inspection.texts.tokens import Tokens

TOKENS = 200_000
"""Most tokens of the sample."""

Bools = NDArray[np.bool_]


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
            state.tokens.add(ledger.tokens.take(keep_T))
        state.packed.add(np.packbits(ledger.mask_TE.cpu().numpy()[keep_T], axis=1))

    def sample(self) -> RoutingSample:
        """What was collected, in the order of the documents."""
        layers = [self.layers[layer] for layer in sorted(self.layers)]
        found = RoutingSample(
            self.documents,
            Tokens.join(layers[0].tokens.part),
            [np.concatenate(state.packed.part) for state in layers],
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
