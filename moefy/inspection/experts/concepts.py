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

from moefy.data.documents import HELD_OUT, SELECT, Ints
from moefy.evaluation.statistics import Floats, null_p, q_values
from moefy.inspection.account.ledger import Ledger
from moefy.inspection.texts.reading import Reading
from moefy.inspection.texts.table import Table, table
from moefy.inspection.texts.tokens import Tokens, classes_of, token_classes, uniforms

TOKENS = 20_000
"""About the most tokens of each layer and shard."""
BINS = 48
_OCTAVE = 4
_LOWEST = -8
"""Bin 0 holds all below about 2^-8 of the layer's mean score; the last begins at 2^3.75 of it."""


Part = tuple[tuple[int, int] | None, dict[str, NDArray[Any]], dict[str, NDArray[np.bool_]]]


class Scales:
    """Mean score of every layer over the first tokens that are heard: what bins are set around.

    Where several processes listen, all are to have heard the same batch first.
    """

    def __init__(self) -> None:
        self.mean: dict[int, float] = {}

    def add(self, ledger: Ledger) -> None:
        """Take in one layer and a chunk of tokens."""
        later_T = torch.from_numpy(ledger.tokens.position_T > 0).to(ledger.x_TD.device)
        if ledger.layer not in self.mean and bool(later_T.any()):
            score_TN = ledger.h_TN[later_T].abs() * ledger.mlp.down_ND.norm(dim=1)
            self.mean[ledger.layer] = float(score_TN.mean()) or 1.0


class Predictivity:
    """Listens to ledgers; memory is `2 L 2 (C + 1) N B` bytes."""

    def __init__(self, reading: Reading, *, tokens: int = TOKENS, seed: int = 0) -> None:
        documents = reading.documents
        self.classes = token_classes(reading.tokenizer, reading.vocabulary)
        self.domain_D, self.seed = documents.domain_D, seed
        self.names = [*documents.domains, *self.classes]
        self.kinds = ["domain"] * len(documents.domains) + ["class"] * len(self.classes)
        self.domains = len(documents.domains)
        self.shard_D = {SELECT: documents.of_shard(SELECT), HELD_OUT: documents.of_shard(HELD_OUT)}
        self.share = {
            shard: tokens / max(1, int(reading.tokens_D[here].sum()))
            for shard, here in self.shard_D.items()
        }
        # The draw may give some tokens more than was asked for, never twice as many.
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if 2 * tokens < 2**16 else np.uint32)
        self.counts: dict[tuple[int, str], NDArray[Any]] = {}
        """By layer and shard `[C + 1, N, B]`; the last row counts all tokens."""
        self.scales = Scales()
        self.neurons: dict[int, tuple[int, int]] = {}
        self.seen = {
            shard: np.zeros((len(self.names), len(documents)), dtype=bool) for shard in self.share
        }

    def add(self, ledger: Ledger) -> None:
        """Take in one layer and a chunk of tokens."""
        tokens, layer = ledger.tokens, ledger.layer
        self.scales.add(ledger)
        drawn_T, later_T = uniforms(tokens, self.seed), tokens.position_T > 0
        for shard, here_D in self.shard_D.items():
            here_T = here_D[tokens.document_T] & later_T & (drawn_T < self.share[shard])
            if here_T.any():
                at_T = torch.from_numpy(here_T).to(ledger.x_TD.device)
                self._count(ledger, layer, shard, ledger.h_TN[at_T], tokens.take(here_T))

    def _count(
        self, ledger: Ledger, layer: int, shard: str, h_TN: torch.Tensor, tokens: Tokens
    ) -> None:
        score_TN = h_TN.abs() * ledger.mlp.down_ND.norm(dim=1)
        neurons = score_TN.shape[1]
        self.neurons[layer] = (neurons, ledger.experts)
        if (layer, shard) not in self.counts:
            shape = (len(self.names) + 1, neurons, BINS)
            self.counts[layer, shard] = np.zeros(shape, dtype=self.dtype)
        level_TN = score_TN.div_(self.scales.mean[layer]).log2_().sub_(_LOWEST).mul_(_OCTAVE)
        level_TN.clamp_(0, BINS - 1)
        cell_TN = (level_TN.int() + torch.arange(neurons, device=h_TN.device) * BINS).cpu().numpy()
        member_CT = self.members(tokens)
        counts = self.counts[layer, shard]
        for concept, member_T in enumerate(member_CT):
            if member_T.any():
                cells = np.bincount(cell_TN[member_T].ravel(), minlength=neurons * BINS)
                counts[concept] += cells.reshape(neurons, BINS).astype(self.dtype)
                self.seen[shard][concept, tokens.document_T[member_T]] = True
        cells = np.bincount(cell_TN.ravel(), minlength=neurons * BINS)
        counts[-1] += cells.reshape(neurons, BINS).astype(self.dtype)

    def part(self, layer: int) -> Part | None:
        """What was heard of a layer, and which documents: what `merge` takes."""
        counts = {shard: self.counts[at, shard] for at, shard in self.counts if at == layer}
        return self.neurons.get(layer), counts, self.seen

    def merge(self, layer: int, part: Part) -> None:
        """Take in what was heard of other documents, with the same `scales`."""
        neurons, counts, seen = part
        if neurons is not None:
            self.neurons[layer] = neurons
        for shard, counts_CNB in counts.items():
            if (layer, shard) in self.counts:
                self.counts[layer, shard] += counts_CNB
            else:
                self.counts[layer, shard] = counts_CNB
        for shard, seen_CD in seen.items():
            self.seen[shard] |= seen_CD

    def members(self, tokens: Tokens) -> NDArray[np.bool_]:
        """Which tokens `[C, T]` are of each concept."""
        domain_T = self.domain_D[tokens.document_T]
        domains = domain_T == np.arange(self.domains)[:, None]
        return np.concatenate([domains, classes_of(tokens.ids_T, self.classes)])

    def positives(self, layer: int, shard: str) -> Ints:
        """Tokens of each concept `[C]` that were counted."""
        return np.asarray(self.counts[layer, shard][:-1, 0].sum(1, dtype=np.int64))

    def auroc(self, layer: int, shard: str) -> Floats:
        """AUROC `[C, N]` of every neuron for every concept against all other tokens; NaN where a concept
        has no tokens, or all."""
        counts = self.counts[layer, shard]
        found = np.full((len(self.names), counts.shape[1]), np.nan)
        for concept, inside_NB in enumerate(counts[:-1].astype(float)):
            outside_NB = counts[-1] - inside_NB
            below_NB = outside_NB.cumsum(1) - outside_NB / 2
            pairs = inside_NB[0].sum() * outside_NB[0].sum()
            if pairs:
                found[concept] = (inside_NB * below_NB).sum(1) / pairs
        return found


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


def enrichment(
    found: Predictivity, *, partitions: int = PARTITIONS, seed: int = 0
) -> dict[str, Table]:
    """`enrichment`, one row for each expert and concept, and columns of `layers`."""
    numbers = sorted({layer for layer, _ in found.counts})
    layers = [_counted(found, layer, partitions, seed) for layer in numbers]
    if not layers or not len(layers[0].concepts):
        return {}
    p = [item.p(item.count_CE) for item in layers]
    q = _split(q_values(np.concatenate([part.ravel() for part in p])), p)
    random_p = [item.p(item.random_RCE) for item in layers]
    drawn = np.concatenate([part.reshape(partitions, -1) for part in random_p], axis=1)
    random_q = stats.false_discovery_control(drawn, axis=1, method="bh")
    return {
        "enrichment": _cells(found, layers, p, q),
        "layers": _summary(layers, q, _split(random_q, random_p)),
    }


def _split(values: Floats, like: list[Floats]) -> list[Floats]:
    """Cut what was joined along the last axis into the shapes it came from."""
    ends = np.cumsum([part.shape[-2] * part.shape[-1] for part in like])[:-1]
    parts = np.split(values, ends, axis=-1)
    return [part.reshape(given.shape) for part, given in zip(parts, like, strict=True)]


def _counted(found: Predictivity, layer: int, partitions: int, seed: int) -> _Layer:
    neurons, experts = found.neurons[layer]
    # Every layer has the same tokens, so the same concepts.
    enough = found.positives(layer, SELECT) >= LEAST_TOKENS
    enough &= found.seen[SELECT].sum(1) >= LEAST_DOCUMENTS
    auroc_CN = found.auroc(layer, SELECT)
    enough &= np.isfinite(auroc_CN[:, 0])
    concepts = np.flatnonzero(enough)
    best = max(1, round(TOP * neurons))
    owner_N = np.repeat(np.arange(experts), neurons // experts)
    held_CN = np.full_like(auroc_CN, np.nan)
    if (layer, HELD_OUT) in found.counts:
        held_CN = found.auroc(layer, HELD_OUT)
    # Scores decide the order of neurons: where they are stored must not.
    order_N = np.lexsort(np.nan_to_num(np.concatenate([held_CN, auroc_CN])))
    top_CK, held_CK = (_best(values[concepts][:, order_N], best) for values in (auroc_CN, held_CN))
    random = np.random.default_rng([seed, layer])
    owners_RN = random.permuted(np.tile(owner_N, (partitions, 1)), axis=1)
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


def _cells(found: Predictivity, layers: list[_Layer], p: list[Floats], q: list[Floats]) -> Table:
    columns: dict[str, list[Any]] = {}
    for item, p_CE, q_CE in zip(layers, p, q, strict=True):
        shape = item.count_CE.shape
        concept = np.repeat(item.concepts, shape[1])
        expected = item.best / item.experts
        held_CE = np.where(item.held_CE < 0, np.nan, item.held_CE.astype(float))
        held_p = np.where(item.held_CE < 0, np.nan, item.p(np.maximum(item.held_CE, 0)))
        again = (q_CE < LEVEL) & (held_p < LEVEL)
        part = table(
            {
                "layer": [item.layer] * concept.size,
                "expert": np.tile(np.arange(shape[1]), shape[0]),
                "concept": [found.names[c] for c in concept],
                "kind": [found.kinds[c] for c in concept],
                "count": item.count_CE.ravel(),
                "expected": np.full(concept.size, expected),
                "extent": item.count_CE.ravel() / expected,
                "p": p_CE.ravel(),
                "q": q_CE.ravel(),
                "auroc": item.auroc_CE.ravel(),
                "held_out_count": held_CE.ravel(),
                "held_out_p": held_p.ravel(),
                # Whether the held-out shard says so too; None where there was nothing to confirm.
                "replicated": [
                    bool(a) if r and np.isfinite(h) else None
                    for a, r, h in zip(
                        again.ravel(), (q_CE < LEVEL).ravel(), held_p.ravel(), strict=True
                    )
                ],
                "documents": found.seen[SELECT].sum(1)[concept],
                "tokens": found.positives(item.layer, SELECT)[concept],
            }
        )
        for name, values in part.items():
            columns.setdefault(name, []).extend(values)
    return columns


def _summary(layers: list[_Layer], q: list[Floats], random_q: list[Floats]) -> Table:
    """How many cells are rejected, beside random partitions; and how many of them hold again."""
    columns: dict[str, list[Any]] = {}
    for item, q_CE, random_RCE in zip(layers, q, random_q, strict=True):
        rejected = q_CE < LEVEL
        random_R = (random_RCE < LEVEL).sum((1, 2))
        extent_CE = item.count_CE * item.experts / item.best
        known = rejected & (item.held_CE >= 0)
        again = item.p(np.maximum(item.held_CE, 0))[known] < LEVEL
        # The largest share of a concept's best neurons that one expert holds, with or without tests.
        peak = item.count_CE.max(1).mean() / item.best
        peak_R = item.random_RCE.max(2).mean(1) / item.best
        row = {
            "layer": item.layer,
            "enriched_cells": int(rejected.sum()),
            "enriched_of": rejected.size,
            "enriched_random": float(random_R.mean()),
            "enriched_p": float(null_p(rejected.sum(), random_R)),
            "enriched_extent": float(extent_CE[rejected].mean()) if rejected.any() else None,
            "enriched_replicated": float(again.mean()) if known.any() else None,
            "enrichment_peak": float(peak),
            "enrichment_peak_random": float(peak_R.mean()),
            "enrichment_peak_p": float(null_p(peak, peak_R)),
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns
