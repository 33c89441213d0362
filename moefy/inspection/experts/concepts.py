"""How well neurons tell a concept apart, and which experts hold more than their share of those that do.

The score of neuron j is `|h_j| ||d_j||`, which no rescale of the neuron changes; `Predictivity` takes the
AUROC of it while tokens stream by. Scores are counted in bins of a quarter of an octave around the
layer's mean; the AUROC is that of the binned score, ties counted half (Zhang et al. 2023 use average
precision and the better of both signs, which is inflated where a concept is rare; one sign alone is not).
Concepts are the domains of documents and the classes of tokens. First tokens are left out.

`enrichment` follows Zhang et al. 2023: of the N neurons of a layer take the 1 % that predict a concept
best. If the partition knew nothing of it, the number in an expert of F neurons would be hypergeometric. p
is the chance of at least as many, q is over all cells of the table. The best neurons are chosen on the
shard `select`; cells that are rejected there are looked at again with the best neurons of `held_out`. The
same is counted for random partitions of the same sizes. Neurons are drawn in an order that their scores
decide, so that renumbering them changes nothing.

Shapes: T tokens, N neurons, E experts, C concepts, B bins, R random partitions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from moefy.data.documents import HELD_OUT, SELECT, Ints
from moefy.evaluation.statistics import Floats, null_p, q_values
from moefy.inspection.account import Ledger
from moefy.inspection.part import Pass, PassPart, SeenDocuments, State, Sum
from moefy.inspection.record import Table, joined, table
from moefy.inspection.texts.tokens import Tokens, classes_of, token_classes, uniforms

TOKENS = 20_000
"""About the most tokens of each layer and shard."""
BINS = 48
_OCTAVE = 4
_LOWEST = -8
"""Bin 0 holds all below about 2^-8 of the layer's mean score; the last begins at 2^3.75 of it."""

Bools = NDArray[np.bool_]


@dataclass
class _Scale(State):
    mean: float | None = None


class Scales(PassPart[_Scale]):
    """Mean score of every layer over the first tokens that are heard: what bins are set around.

    Where several processes listen, all must have heard the same batch first.
    """

    def begin(self, ledger: Ledger) -> _Scale:
        """Not known yet."""
        return _Scale()

    def take(self, state: _Scale, ledger: Ledger) -> None:
        """Take the mean from the first chunk that holds more than first tokens."""
        if state.mean is None and bool(ledger.later_T.any()):
            state.mean = float(_scores(ledger, ledger.later_T).mean()) or 1.0


def _scores(ledger: Ledger, at_T: Tensor) -> Tensor:
    score_TN: Tensor = ledger.h_TN[at_T].abs() * ledger.mlp.down_ND.norm(dim=1)
    return score_TN


@dataclass
class Counts(State):
    """Of one layer, by shard."""

    experts: int
    scores: dict[str, Sum[NDArray[Any]]]
    """Tokens by concept, neuron and bin of the score `[C + 1, N, B]`; the last row counts all tokens."""
    seen: dict[str, SeenDocuments]
    """Documents by concept `[C]`."""

    def positives(self, shard: str) -> Ints:
        """Tokens of each concept `[C]` that were counted."""
        return np.asarray(self.scores[shard].total[:-1, 0].sum(1, dtype=np.int64))

    def auroc(self, shard: str) -> Floats:
        """AUROC `[C, N]` of every neuron for every concept against all other tokens; NaN where a concept
        has no tokens, or all."""
        counts = self.scores[shard].total
        found = np.full((len(counts) - 1, counts.shape[1]), np.nan)
        for concept, inside_NB in enumerate(counts[:-1].astype(float)):
            outside_NB = counts[-1] - inside_NB
            below_NB = outside_NB.cumsum(1) - outside_NB / 2
            pairs = inside_NB[0].sum() * outside_NB[0].sum()
            if pairs:
                found[concept] = (inside_NB * below_NB).sum(1) / pairs
        return found


class Predictivity(PassPart[Counts]):
    """Memory is `2 L 2 (C + 1) N B` bytes, and a bit for each document and concept of a layer and shard."""

    def __init__(self, work: Pass, *, tokens: int = TOKENS) -> None:
        super().__init__(work)
        reading, documents = work.reading, work.reading.documents
        self.classes = token_classes(reading.tokenizer, reading.vocabulary)
        self.domain_Q = documents.domain_Q
        self.names = [*documents.domains, *self.classes]
        self.kinds = ["domain"] * len(documents.domains) + ["class"] * len(self.classes)
        self.domains = len(documents.domains)
        self.shard_Q = {shard: documents.of_shard(shard) for shard in (SELECT, HELD_OUT)}
        self.share = {
            shard: tokens / max(1, int(reading.tokens_Q[here].sum()))
            for shard, here in self.shard_Q.items()
        }
        # The draw may give some tokens more than was asked for, never twice as many.
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if 2 * tokens < 2**16 else np.uint32)
        self.before = self.scales = Scales(work)

    def begin(self, ledger: Ledger) -> Counts:
        """No counts yet."""
        shape, documents = (len(self.names) + 1, ledger.mlp.neurons, BINS), len(self.domain_Q)
        return Counts(
            ledger.experts,
            {shard: Sum(np.zeros(shape, dtype=self.dtype)) for shard in self.shard_Q},
            {shard: SeenDocuments(documents, len(self.names)) for shard in self.shard_Q},
        )

    def take(self, state: Counts, ledger: Ledger) -> None:
        """Count the scores of drawn tokens by concept, in either shard."""
        self.scales.hear(ledger)
        tokens = ledger.tokens
        drawn_T, later_T = uniforms(tokens, self.work.seed), tokens.position_T > 0
        for shard, here_Q in self.shard_Q.items():
            here_T = here_Q[tokens.document_T] & later_T & (drawn_T < self.share[shard])
            if here_T.any():
                member_CT = self.members(tokens.take(here_T))
                score_TN = _scores(ledger, ledger.here(here_T))
                self._count(state.scores[shard], score_TN, member_CT, ledger.layer)
                state.seen[shard].add(tokens.document_T[here_T], member_CT.T)

    def _count(
        self, scores: Sum[NDArray[Any]], score_TN: Tensor, member_CT: Bools, layer: int
    ) -> None:
        neurons, mean = score_TN.shape[1], self.scales.layers[layer].mean
        assert mean is not None
        level_TN = score_TN.div_(mean).log2_().sub_(_LOWEST).mul_(_OCTAVE).clamp_(0, BINS - 1)
        first_N = torch.arange(neurons, device=score_TN.device) * BINS
        cell_TN = (level_TN.int() + first_N).cpu().numpy()
        everything_T = np.ones(len(cell_TN), dtype=bool)
        for concept, member_T in enumerate([*member_CT, everything_T]):
            if member_T.any():
                cells = np.bincount(cell_TN[member_T].ravel(), minlength=neurons * BINS)
                scores.total[concept] += cells.reshape(neurons, BINS).astype(self.dtype)

    def members(self, tokens: Tokens) -> Bools:
        """Which tokens `[C, T]` are of each concept."""
        domain_T = self.domain_Q[tokens.document_T]
        domains = domain_T == np.arange(self.domains)[:, None]
        return np.concatenate([domains, classes_of(tokens.ids_T, self.classes)])

    def tables(self) -> dict[str, Table]:
        """What `enrichment` finds."""
        return enrichment(self, seed=self.work.seed)


TOP = 0.01
"""Share of a layer's neurons that are called the best for a concept."""
PARTITIONS = 200
LEVEL = 0.05
LEAST_TOKENS = 50
LEAST_DOCUMENTS = 2
"""Concepts with fewer tokens or documents in `select` are left out."""


@dataclass(frozen=True)
class _Layer:
    """One layer: what was counted in each expert, and in each expert of random partitions."""

    layer: int
    concepts: Ints
    """Numbers of the concepts that have tokens enough `[C]`."""
    best: int
    """Neurons that are called the best for a concept."""
    neurons: int
    count_CE: Ints
    held_CE: Ints
    """The same with the best neurons of the held-out shard."""
    random_RCE: Ints
    auroc_CE: Floats
    """Mean AUROC of the neurons of an expert on `select`."""

    @property
    def experts(self) -> int:
        return int(self.count_CE.shape[1])

    def p(self, count: Ints) -> Floats:
        """Chance of at least this many of the best neurons in an expert."""
        size = self.neurons // self.experts
        chance = stats.hypergeom(self.neurons, size, self.best).sf(np.arange(-1, self.best + 1))
        return np.asarray(chance[count], dtype=float)


def enrichment(found: Predictivity, *, seed: int = 0) -> dict[str, Table]:
    """`enrichment`, one row for each expert and concept, and columns of `layers`."""
    layers = [_counted(found.layers[n], n, seed) for n in sorted(found.layers)]
    if not layers or not len(layers[0].concepts):
        return {}
    p = [item.p(item.count_CE) for item in layers]
    q = _split(q_values(np.concatenate([part.ravel() for part in p])), p)
    random_p = [item.p(item.random_RCE) for item in layers]
    drawn = np.concatenate([part.reshape(PARTITIONS, -1) for part in random_p], axis=1)
    random_q = stats.false_discovery_control(drawn, axis=1, method="bh")
    cells = (_cells(found, *of_layer) for of_layer in zip(layers, p, q, strict=True))
    by_layer = zip(layers, q, _split(random_q, random_p), strict=True)
    return {
        "enrichment": joined(cells),
        "layers": joined(table(_summary(*of_layer)) for of_layer in by_layer),
    }


def _split(values: Floats, like: list[Floats]) -> list[Floats]:
    """Cut what was joined along the last axis into the shapes it came from."""
    ends = np.cumsum([part.shape[-2] * part.shape[-1] for part in like])[:-1]
    parts = np.split(values, ends, axis=-1)
    return [part.reshape(given.shape) for part, given in zip(parts, like, strict=True)]


def _counted(counts: Counts, layer: int, seed: int) -> _Layer:
    auroc_CN, held_CN = counts.auroc(SELECT), counts.auroc(HELD_OUT)
    experts, neurons = counts.experts, auroc_CN.shape[1]
    # Every layer has the same tokens, so the same concepts.
    enough = counts.positives(SELECT) >= LEAST_TOKENS
    enough &= counts.seen[SELECT].count_X >= LEAST_DOCUMENTS
    enough &= np.isfinite(auroc_CN[:, 0])
    concepts = np.flatnonzero(enough)
    best = max(1, round(TOP * neurons))
    owner_N = np.repeat(np.arange(experts), neurons // experts)
    # Scores decide the order of neurons: where they are stored must not.
    order_N = np.lexsort(np.nan_to_num(np.concatenate([held_CN, auroc_CN])))
    top_CK, held_CK = (_best(values[concepts][:, order_N], best) for values in (auroc_CN, held_CN))
    random = np.random.default_rng([seed, layer])
    owners_RN = random.permuted(np.tile(owner_N, (PARTITIONS, 1)), axis=1)
    known_C1 = np.isfinite(held_CN[concepts, :1])
    return _Layer(
        layer,
        concepts,
        best,
        neurons,
        _counts(owner_N[order_N][None], top_CK, experts)[0],
        np.where(known_C1, _counts(owner_N[order_N][None], held_CK, experts)[0], -1),
        _counts(owners_RN, top_CK, experts),
        auroc_CN[concepts].reshape(len(concepts), experts, neurons // experts).mean(2),
    )


def _best(auroc_CN: Floats, count: int) -> Ints:
    return np.argsort(-np.nan_to_num(auroc_CN), axis=1, kind="stable")[:, :count]


def _counts(owner_RN: Ints, top_CK: Ints, experts: int) -> Ints:
    """How many of the best neurons each expert of each partition has `[R, C, E]`."""
    owner_RCK = owner_RN[:, top_CK]
    shape = (*owner_RCK.shape[:2], experts)
    row = np.arange(shape[0] * shape[1]).reshape(*shape[:2], 1)
    cells = np.bincount((row * experts + owner_RCK).ravel(), minlength=int(np.prod(shape)))
    return cells.reshape(shape)


def _cells(found: Predictivity, item: _Layer, p_CE: Floats, q_CE: Floats) -> Table:
    concepts, experts = item.count_CE.shape
    concept = np.repeat(item.concepts, experts)
    counts, expected = found.layers[item.layer], item.best / item.experts
    known_CE = item.held_CE >= 0
    held_p = np.where(known_CE, item.p(np.maximum(item.held_CE, 0)), np.nan)
    rejected_CE = q_CE < LEVEL
    # Whether the held-out shard says so too; None where there was nothing to confirm.
    replicated = (held_p < LEVEL).astype(object)
    replicated[~rejected_CE | np.isnan(held_p)] = None
    return table(
        {
            "layer": [item.layer] * concept.size,
            "expert": np.tile(np.arange(experts), concepts),
            "concept": [found.names[c] for c in concept],
            "kind": [found.kinds[c] for c in concept],
            "count": item.count_CE.ravel(),
            "expected": np.full(concept.size, expected),
            "extent": item.count_CE.ravel() / expected,
            "p": p_CE.ravel(),
            "q": q_CE.ravel(),
            "auroc": item.auroc_CE.ravel(),
            "held_out_count": np.where(known_CE, item.held_CE, np.nan).ravel(),
            "held_out_p": held_p.ravel(),
            "replicated": replicated.ravel(),
            "documents": counts.seen[SELECT].count_X[concept],
            "tokens": counts.positives(SELECT)[concept],
        }
    )


def _summary(item: _Layer, q_CE: Floats, random_RCE: Floats) -> dict[str, Any]:
    """How many cells are rejected, beside random partitions; and how many of them hold again."""
    rejected = q_CE < LEVEL
    random_R = (random_RCE < LEVEL).sum((1, 2))
    extent_CE = item.count_CE * item.experts / item.best
    known = rejected & (item.held_CE >= 0)
    again = item.p(np.maximum(item.held_CE, 0))[known] < LEVEL
    # The largest share of a concept's best neurons that one expert holds, with or without tests.
    peak = item.count_CE.max(1).mean() / item.best
    peak_R = item.random_RCE.max(2).mean(1) / item.best
    return {
        "layer": [item.layer],
        "enriched_cells": [int(rejected.sum())],
        "enriched_of": [rejected.size],
        "enriched_random": [float(random_R.mean())],
        "enriched_p": [float(null_p(rejected.sum(), random_R))],
        "enriched_extent": [float(extent_CE[rejected].mean()) if rejected.any() else None],
        "enriched_replicated": [float(again.mean()) if known.any() else None],
        "enrichment_peak": [float(peak)],
        "enrichment_peak_random": [float(peak_R.mean())],
        "enrichment_peak_p": [float(null_p(peak, peak_R))],
    }
