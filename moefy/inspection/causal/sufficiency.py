"""What many experts do together: are a domain's own enough, and do two stand in for each other?

`sufficiency`: a share of every layer's experts is kept and all others are replaced. They are ranked for a
domain by attribution on the `select` shard, layer by layer, and judged on `held_out`: against as many
experts drawn at random, and against those of the other domains.

`interactions`: M of two experts together minus the sum of each alone. Positive: each hides what the other
does (redundancy, self-repair). Negative: their effects overlap.

Shapes: S all experts, layer by layer, X sets of experts, Q documents, C domains.
"""

import itertools
import math

import numpy as np
from numpy.typing import NDArray

from moefy.evaluation.statistics import Floats, Interval, null_p, q_values, ratio_interval, units
from moefy.inspection.causal.documents import Texts
from moefy.inspection.causal.engine import AblationEngine, Effects, Pair, means, of_experts, of_sets
from moefy.inspection.causal.matrix import intervals
from moefy.inspection.record import Table, joined, table
from moefy.run.console import Reporter

SHARES = (0.125, 0.25, 0.5)
DRAWS = 20


def sufficiency(
    engine: AblationEngine,
    attribution_SQ: Floats,
    select: Texts,
    texts: Texts,
    report: Reporter,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Table:
    """Table `keep_only`: for every domain and share the loss increase with its own experts kept, with
    those of the other domains, and with random ones."""
    domains, known = texts.documents.domains, select.documents.domains
    rank_SC = means(attribution_SQ, select.documents.domain_Q, len(known))
    counts = [module.experts for module in engine.modules.values()]
    random = np.random.default_rng([seed, 14])
    parts = []
    for share in SHARES:
        own = [
            _best(rank_SC[:, known.index(d)] if d in known else rank_SC.mean(1), counts, share)
            for d in domains
        ]
        drawn = [_best(random.random(sum(counts)), counts, share) for _ in range(draws)]
        sets = [
            of_experts(engine, itertools.compress(engine.experts, ~kept_S))
            for kept_S in (*own, *drawn)
        ]
        effects = of_sets(engine, texts, sets, report, f"keep {share:.1%} of experts")
        parts.append(_rows(effects.ce_SQ, texts, share, own, draws))
    rows = joined(parts)
    return rows | table({"q": q_values([np.nan if p is None else p for p in rows["p"]])})


def _best(score_S: Floats, counts: list[int], share: float) -> NDArray[np.bool_]:
    """The best experts of every layer, this share of them, rounded up."""
    by_layer = []
    for score_E in np.split(score_S, np.cumsum(counts)[:-1]):
        best_E = np.zeros(len(score_E), dtype=bool)
        best_E[np.argsort(-score_E, kind="stable")[: math.ceil(share * len(score_E))]] = True
        by_layer.append(best_E)
    return np.concatenate(by_layer)


def _rows(
    ce_XQ: Floats, texts: Texts, share: float, own: list[NDArray[np.bool_]], draws: int
) -> Table:
    """Rows of one share: the first sets are those of the domains, the rest are random."""
    domains = texts.documents.domains
    count = len(domains)
    ce = intervals(ce_XQ, texts)
    mean_XC = ce.mean_C.reshape(-1, count)
    own_C, random_XC = mean_XC[:count].diagonal(), mean_XC[count:]
    other_CC = np.where(np.eye(count, dtype=bool), np.nan, mean_XC[:count])
    # Paired: the same documents with other experts kept.
    saved = intervals(ce_XQ[count:].mean(0) - ce_XQ[:count], texts)
    return table(
        {
            "domain": domains,
            "share": [share] * count,
            "experts": [int(kept_S.sum()) for kept_S in own],
            **_of_own(ce, "ce", count),
            "ce_random": random_XC.mean(0),
            "ce_random_least": random_XC.min(0),
            "ce_random_most": random_XC.max(0),
            **_over_others(other_CC),
            **_of_own(saved, "saved", count),
            # A smaller loss than random experts leave.
            "p": null_p(-own_C, -random_XC),
            "draws": [draws] * count,
            **texts.counts(),
        }
    )


def _of_own(all_: Interval, name: str, count: int) -> dict[str, Floats]:
    """Columns of every domain's own experts on that domain."""
    columns = all_.columns(name)
    return {key: v.reshape(-1, count)[:count].diagonal() for key, v in columns.items()}


def _over_others(other_CC: Floats) -> dict[str, Floats]:
    """Columns of what the experts of the other domains leave; NaN for a single domain."""
    if len(other_CC) == 1:
        return dict.fromkeys(("ce_other", "ce_other_least"), np.full(1, np.nan))
    return {"ce_other": np.nanmean(other_CC, 0), "ce_other_least": np.nanmin(other_CC, 0)}


PAIRS = 10


def interactions(
    engine: AblationEngine,
    texts: Texts,
    experts: list[Pair],
    alone: Effects,
    report: Reporter,
    *,
    count: int = PAIRS,
) -> Table:
    """Table `non_additivity`: the pairs of the strongest experts, half of them of one layer if there are
    enough. `experts` come strongest first, `alone` holds their effects in the same order.
    Means are over all documents, domains counting by theirs."""
    chosen = _chosen(experts, count)
    sets = [of_experts(engine, (experts[a], experts[b])) for a, b in chosen]
    if not chosen:
        return {}
    both = of_sets(engine, texts, sets, report, "pairs of experts").ce_SQ
    one, two = (alone.ce_SQ[[pair[i] for pair in chosen]] for i in (0, 1))
    unit_Q, every_Q = units(texts.documents), np.ones(len(texts.documents))
    columns = {
        name: ratio_interval(values.T, every_Q, unit_Q)
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
            "documents": [len(every_Q)] * len(chosen),
            "tokens": [int(texts.tokens_Q.sum())] * len(chosen),
        }
    )


def _chosen(experts: list[Pair], count: int) -> list[tuple[int, int]]:
    """Pairs by the strength of both, half of one layer, half of two."""
    every = sorted(itertools.combinations(range(len(experts)), 2), key=lambda p: (sum(p), p))
    same = [(a, b) for a, b in every if experts[a][0] == experts[b][0]]
    apart = [(a, b) for a, b in every if experts[a][0] != experts[b][0]]
    of_same = min(len(same), max(count - len(apart), count // 2))
    return same[:of_same] + apart[: count - of_same]
