"""A bigram language model: how well text is predicted by the token before alone.

    P(b | a) = (c(a, b) + m U(b)) / (c(a) + m),      U(b) = (c(b) + k) / (n + k V)

The counts of pairs are interpolated with the add-k unigram `U`; the rarer a context, the more it is
left to `U`. `k` and `m` are those of a small grid that predict one half of the documents best from
the other half, so that the baseline is as strong as its text allows.

Shapes: B documents, T tokens, P predicted tokens, V vocabulary.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moefy.data.corpus import IGNORED, Batch

K = (0.01, 0.1, 1.0, 10.0, 100.0)
M = tuple(2.0**power for power in range(13))
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass
class _Counts:
    """How often each pair, context and token occurs."""

    keys_P: Ints
    """`a * V + b` of the pairs that occur, sorted."""
    times_P: Ints
    contexts_V: Ints
    tokens_V: Ints

    @classmethod
    def of(cls, a_P: Ints, b_P: Ints, vocabulary: int) -> "_Counts":
        keys, times = np.unique(a_P * vocabulary + b_P, return_counts=True)
        contexts, tokens = (np.bincount(ids, minlength=vocabulary) for ids in (a_P, b_P))
        return cls(keys, times, contexts, tokens)

    def unigram(self, k: float) -> Floats:
        total = float(self.tokens_V.sum()) + k * len(self.tokens_V)
        return (self.tokens_V.astype(np.float64) + k) / total

    def pairs(self, a_P: Ints, b_P: Ints) -> Ints:
        wanted = a_P * len(self.tokens_V) + b_P
        at = np.searchsorted(self.keys_P, wanted).clip(max=len(self.keys_P) - 1)
        return np.where(self.keys_P[at] == wanted, self.times_P[at], 0)

    def seen(self, context: int) -> tuple[Ints, Ints]:
        """The tokens that followed a context, and how often."""
        vocabulary = len(self.tokens_V)
        first, last = np.searchsorted(
            self.keys_P, [context * vocabulary, (context + 1) * vocabulary]
        )
        return self.keys_P[first:last] - context * vocabulary, self.times_P[first:last]


class Bigram:
    """The model fitted on the predicted tokens of some batches."""

    def __init__(self, batches: list[Batch], vocabulary: int) -> None:
        documents = [pair for batch in batches for pair in _documents(batch)]
        a_P, b_P = _joined(documents)
        self.counts = _Counts.of(a_P, b_P, vocabulary)
        self.documents, self.tokens = len(documents), len(b_P)
        self.k, self.m = _strengths(documents, vocabulary)

    def record(self) -> dict[str, Any]:
        """What it was fitted on, as JSON values."""
        return {"documents": self.documents, "tokens": self.tokens, "k": self.k, "m": self.m}

    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Nats of every target and its rank `[B, T]`; zero where nothing is predicted.

        The rank is 1 + the number of tokens that are more probable than the target.
        """
        read_BT, target_BT = _tokens(batch)
        keep_BT = target_BT != IGNORED
        a_P, b_P = read_BT[keep_BT], target_BT[keep_BT]
        prior_V = self.m * self.counts.unigram(self.k)
        # Within a context all probabilities have the same divisor, so that ranks need none.
        score_P = self.counts.pairs(a_P, b_P) + prior_V[b_P]
        rank_P = 1 + len(prior_V) - np.searchsorted(np.sort(prior_V), score_P, side="right")
        for context in np.unique(a_P):
            here = a_P == context
            tokens, times = self.counts.seen(context)
            above = times + prior_V[tokens] > score_P[here, None]
            rank_P[here] += above.sum(1) - (prior_V[tokens] > score_P[here, None]).sum(1)
        nats_BT, rank_BT = np.zeros(keep_BT.shape), np.zeros(keep_BT.shape, dtype=np.int64)
        nats_BT[keep_BT] = np.log(self.counts.contexts_V[a_P] + self.m) - np.log(score_P)
        rank_BT[keep_BT] = rank_P
        return torch.from_numpy(nats_BT), torch.from_numpy(rank_BT)


def _tokens(batch: Batch) -> tuple[Ints, Ints]:
    """The token that each position reads, and the one that it predicts `[B, T]`."""
    assert batch.targets_BT is not None
    read = batch.inputs.get("decoder_input_ids", batch.inputs.get("input_ids"))
    assert read is not None
    return read.numpy(), batch.targets_BT.numpy()


def _documents(batch: Batch) -> list[tuple[Ints, Ints]]:
    """Context and target of every predicted token, document by document."""
    rows = zip(*_tokens(batch), strict=True)
    return [(a_T[b_T != IGNORED], b_T[b_T != IGNORED]) for a_T, b_T in rows]


def _joined(documents: list[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    """Contexts and targets of all documents `[P]`."""
    return np.concatenate([a for a, _ in documents]), np.concatenate([b for _, b in documents])


def _strengths(documents: list[tuple[Ints, Ints]], vocabulary: int) -> tuple[float, float]:
    """The `k` and `m` that predict every second document best from the others, and they it."""
    nats = dict.fromkeys(product(K, M), 0.0)
    halves = [_joined(half) for half in (documents[::2], documents[1::2]) if half]
    for fitted, (a_P, b_P) in zip(halves, reversed(halves), strict=True):
        counts = _Counts.of(*fitted, vocabulary)
        pairs_P, totals_P = counts.pairs(a_P, b_P), counts.contexts_V[a_P]
        for k, m in nats:
            p_P = (pairs_P + m * counts.unigram(k)[b_P]) / (totals_P + m)
            nats[k, m] -= float(np.log(p_P).sum())
    return min(nats, key=lambda pair: nats[pair])
