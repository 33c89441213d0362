"""Do two experts stand in for each other? M of both together minus the sum of each alone.

Positive: each hides what the other does (redundancy, self-repair). Negative: the damage overlaps.

Shapes: P pairs, C domains, D documents.
"""

import itertools

import numpy as np

from moefy.evaluation.statistics import ratio_interval, units
from moefy.inspection.causal.documents import Texts
from moefy.inspection.causal.effects import Effects, gone, neurons_of, of_sets
from moefy.inspection.causal.engine import Engine, Gone
from moefy.inspection.causal.matrix import Pair
from moefy.inspection.texts.table import Table, table
from moefy.run.console import Reporter

PAIRS = 10


def non_additivity(
    engine: Engine,
    texts: Texts,
    experts: list[Pair],
    alone: Effects,
    report: Reporter,
    *,
    count: int = PAIRS,
) -> Table:
    """Table `non_additivity`: the pairs of the strongest experts, half of them of one layer where there
    are so many. `experts` come strongest first, `alone` holds their effects in the same order.
    Means are over all documents, domains counting by theirs."""
    chosen = _chosen(experts, count)
    sets = [_both(engine, experts[a], experts[b]) for a, b in chosen]
    if not chosen:
        return {}
    both = of_sets(engine, texts, sets, report, "pairs of experts").ce_SD
    one, two = (alone.ce_SD[[pair[i] for pair in chosen]] for i in (0, 1))
    unit_D, every_D = units(texts.documents), np.ones(len(texts.documents))
    columns = {
        name: ratio_interval(values.T, every_D, unit_D)
        for name, values in (("excess", both - one - two), ("ce_both", both))
    }
    sums = one.mean(1) + two.mean(1)
    return table(
        {
            "layer_a": [experts[a][0] for a, _ in chosen],
            "expert_a": [experts[a][1] for a, _ in chosen],
            "layer_b": [experts[b][0] for _, b in chosen],
            "expert_b": [experts[b][1] for _, b in chosen],
            "ce_a": one.mean(1),
            "ce_b": two.mean(1),
            **columns["ce_both"].columns("ce_both"),
            **columns["excess"].columns("excess"),
            "excess_share": np.where(sums != 0, columns["excess"].mean_C / sums, np.nan),
            "documents": [len(every_D)] * len(chosen),
            "tokens": [int(texts.tokens_D.sum())] * len(chosen),
        }
    )


def _chosen(experts: list[Pair], count: int) -> list[tuple[int, int]]:
    """Pairs by the strength of both, half of one layer, half of two."""
    every = sorted(itertools.combinations(range(len(experts)), 2), key=lambda p: (sum(p), p))
    same = [(a, b) for a, b in every if experts[a][0] == experts[b][0]]
    apart = [(a, b) for a, b in every if experts[a][0] != experts[b][0]]
    of_same = min(len(same), max(count - len(apart), count // 2))
    return same[:of_same] + apart[: count - of_same]


def _both(engine: Engine, a: Pair, b: Pair) -> Gone:
    first, second = (dict(gone(engine, layer, neurons_of(engine, layer, e))) for layer, e in (a, b))
    for layer, gone_N in second.items():
        first[layer] = first[layer] | gone_N if layer in first else gone_N
    return first
