"""Which experts hold more than their share of the neurons that tell a concept apart.

Zhang et al. 2023: of the N neurons of a layer take the 1 % that predict a concept best. If the partition
knew nothing of it, the number in an expert of F neurons would be hypergeometric. p is the chance of at
least as many, q is over all cells of the table. The best neurons are chosen on the shard `select`; cells
that are rejected there are looked at again with the best neurons of `held_out`.

The same is counted for random partitions of the same sizes. Neurons are drawn in an order that their
scores decide, so that renumbering them changes nothing.

Shapes: N neurons, E experts, C concepts, R random partitions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from moefy.interpret.predictivity import Predictivity
from moefy.interpret.statistics import Floats, null_p, q_values
from moefy.interpret.table import Table, table
from moefy.interpret.tokens import HELD_OUT, SELECT, Ints

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
