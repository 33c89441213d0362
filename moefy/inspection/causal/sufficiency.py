"""Does a domain need only its own experts? Keep a share of every layer's, replace all others, and look.

Experts are ranked for a domain by the screen on the `select` shard, layer by layer, and judged on
`held_out`: against as many experts drawn at random, and against those of the other domains.

Shapes: S all experts, layer by layer, E experts of one layer, K documents of the select texts,
C domains, R random draws, D documents.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from moefy.evaluation.statistics import Floats, null_p, q_values
from moefy.inspection.causal.documents import MIN_DOCUMENTS, Texts
from moefy.inspection.causal.effects import means, of_sets
from moefy.inspection.causal.engine import Engine, Gone
from moefy.inspection.causal.matrix import intervals
from moefy.inspection.texts.table import Table, joined, table
from moefy.run.console import Reporter

SHARES = (0.125, 0.25, 0.5)
DRAWS = 20


def keep_only(
    engine: Engine,
    screen_SK: Floats,
    select: Texts,
    texts: Texts,
    report: Reporter,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Table:
    """Table `keep_only`: for every domain and share the damage with its own experts kept, with those
    of the other domains, and with random ones."""
    domains = texts.documents.domains
    known = select.documents.domains
    rank_SC = means(screen_SK, select.documents.domain_D, len(known))
    counts = [module.experts for module in engine.modules.values()]
    random = np.random.default_rng([seed, 14])
    parts = []
    for share in SHARES:
        own = [
            _best(rank_SC[:, known.index(d)] if d in known else rank_SC.mean(1), counts, share)
            for d in domains
        ]
        drawn = [_best(random.random(sum(counts)), counts, share) for _ in range(draws)]
        sets = [_all_but(engine, kept_S) for kept_S in (*own, *drawn)]
        effects = of_sets(engine, texts, sets, report, f"keep {share:.1%} of experts")
        parts.append(_rows(effects.ce_SD, texts, share, own, draws))
    found = joined(parts)
    found["q"] = table({"q": q_values([np.nan if p is None else p for p in found["p"]])})["q"]
    return found


def _best(score_S: Floats, counts: list[int], share: float) -> NDArray[np.bool_]:
    """The best experts of every layer, this share of them, rounded up."""
    kept = []
    for score_E in np.split(score_S, np.cumsum(counts)[:-1]):
        kept_E = np.zeros(len(score_E), dtype=bool)
        kept_E[np.argsort(-score_E, kind="stable")[: math.ceil(share * len(score_E))]] = True
        kept.append(kept_E)
    return np.concatenate(kept)


def _all_but(engine: Engine, kept_S: NDArray[np.bool_]) -> Gone:
    gone, first = {}, 0
    for layer, module in engine.modules.items():
        off_E = torch.from_numpy(~kept_S[first : first + module.experts])
        gone[layer] = off_E.repeat_interleave(module.expert_size)
        first += module.experts
    return gone


def _rows(
    ce_XD: Floats, texts: Texts, share: float, own: list[NDArray[np.bool_]], draws: int
) -> Table:
    """Rows of one share: the first sets are those of the domains, the rest are random."""
    domains, domain_D = texts.documents.domains, texts.documents.domain_D
    count = len(domains)
    found = intervals(ce_XD, texts)
    mean_XC, low_XC, high_XC = (
        v.reshape(-1, count) for v in (found.mean_C, found.low_C, found.high_C)
    )
    # Paired: the same documents with other experts kept.
    saved_XD = ce_XD[count:].mean(0) - ce_XD[:count]
    saved = intervals(saved_XD, texts)
    saved_CC = [
        v.reshape(count, count).diagonal() for v in (saved.mean_C, saved.low_C, saved.high_C)
    ]
    other_CC = np.where(np.eye(count, dtype=bool), np.nan, mean_XC[:count])
    documents_C = np.bincount(domain_D, minlength=count)
    return table(
        {
            "domain": domains,
            "share": [share] * count,
            "experts": [int(kept_S.sum()) for kept_S in own],
            "ce": mean_XC[:count].diagonal(),
            "ce_low": low_XC[:count].diagonal(),
            "ce_high": high_XC[:count].diagonal(),
            "ce_random": mean_XC[count:].mean(0),
            "ce_random_least": mean_XC[count:].min(0),
            "ce_random_most": mean_XC[count:].max(0),
            "ce_other": np.nanmean(other_CC, 0) if count > 1 else np.full(count, np.nan),
            "ce_other_least": np.nanmin(other_CC, 0) if count > 1 else np.full(count, np.nan),
            "saved": saved_CC[0],
            "saved_low": saved_CC[1],
            "saved_high": saved_CC[2],
            # Less damage than random experts leave.
            "p": null_p(-mean_XC[:count].diagonal(), -mean_XC[count:]),
            "draws": [draws] * count,
            "documents": documents_C,
            "tokens": np.bincount(domain_D, weights=texts.tokens_D, minlength=count).astype(int),
            "few": documents_C < MIN_DOCUMENTS,
        }
    )
