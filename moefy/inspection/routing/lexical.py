"""What the token id alone says about routing: a lexical router, and domains beyond tokens.

P(e|v), how often an expert runs for a token id, is always fitted on other documents (five folds of
whole documents or sources), so that a rare token is not explained by itself.

Shapes: T tokens, D documents, G units, E routed experts, F folds, C pairs of fold and token id,
P permutations, M domains.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moefy.data.documents import Ints
from moefy.evaluation.statistics import ratio_interval
from moefy.inspection.routing.frame import Doubles, Groups, Routed, RoutingFrame, Singles, Totals

Columns = dict[str, Any]
PERMUTATIONS = 4999
_AT_ONCE = 200


@dataclass(frozen=True)
class CrossFitted:
    """P(e|v) from the other folds."""

    cell: Groups
    """Tokens by fold and id."""
    seen_C: Doubles
    """Occurrences of the id in the other folds."""
    ran_CE: Singles
    """How many of these ran each expert."""
    load_CE: Doubles
    """Load of each expert in the other folds."""

    @property
    def mean_CE(self) -> Doubles:
        """P(e|v); NaN for ids that the other folds do not have."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.ran_CE / self.seen_C[:, None]


def cross_fitted(frame: RoutingFrame, mask_TE: Singles) -> CrossFitted:
    """P(e|v) of every token id for every fold, from the tokens of the other folds."""
    fold = Groups(frame.fold_T, frame.folds)
    cell = Groups.of(frame.fold_T, frame.token.index_T)
    fold_C, id_C = cell.first(frame.fold_T), cell.first(frame.token.index_T)
    ran_CE = frame.token.sums(mask_TE)[id_C] - cell.sums(mask_TE)
    seen_C = (frame.token.count_C[id_C] - cell.count_C).astype(np.float64)
    by_fold = fold.sums(mask_TE).astype(np.float64)
    others = (len(frame) - fold.count_C)[:, None]
    load_FE = (by_fold.sum(0) - by_fold) / np.maximum(others, 1)
    return CrossFitted(cell, seen_C, np.asarray(ran_CE, dtype=np.float32), load_FE[fold_C])


def lexical_router(frame: RoutingFrame, routed: Routed) -> Totals:
    """Share of the true experts that are right, averaged over tokens, by router of the same k:

    `lexical_recall` the k experts that other documents run most for the token id (by
    `(n_ve + load_e) / (n_v + 1)`, so that the load breaks ties and stands in for unseen ids);
    `lexical_recall_random` the same for a random router of the model's loads; `constant_recall` the k
    busiest experts for all tokens; `load_recall` experts drawn by load; `chance_recall` drawn evenly.
    """
    runs_T = routed.active_T > 0
    k_T = np.maximum(routed.active_T, 1)
    dealt_T = frame.shuffled(Groups.of(routed.active_T), np.random.default_rng(frame.seed))
    by_k = Groups.of(routed.active_T)
    load_KE = by_k.sums(routed.mask_TE) / by_k.count_C[:, None]
    fitted = cross_fitted(frame, routed.mask_TE)
    busiest_CE = _rank(fitted.load_CE)
    found_T = {
        "lexical_recall": _hits(routed.mask_TE, _lexical_rank(fitted)[fitted.cell.index_T], k_T),
        "lexical_recall_random": _random_hits(frame, routed, dealt_T, k_T),
        "constant_recall": _hits(routed.mask_TE, busiest_CE[fitted.cell.index_T], k_T),
        "load_recall": (routed.mask_TE * load_KE[by_k.index_T]).sum(1),
        "chance_recall": routed.active_T**2 / max(routed.experts, 1),
    }
    recall_TX = np.stack([hits_T / k_T for hits_T in found_T.values()], axis=1)
    top_DX = frame.by_document(recall_TX * runs_T[:, None])
    bottom_D = frame.by_document(runs_T[:, None].astype(np.float64))[:, 0]
    return {name: (top_DX[:, index], bottom_D) for index, name in enumerate(found_T)}


def _rank(score_CE: Doubles) -> Ints:
    order_CE = np.argsort(-score_CE, axis=1, kind="stable")
    rank_CE = np.empty_like(order_CE)
    np.put_along_axis(rank_CE, order_CE, np.arange(order_CE.shape[1])[None], axis=1)
    return rank_CE


def _lexical_rank(fitted: CrossFitted) -> Ints:
    return _rank((fitted.ran_CE + fitted.load_CE) / (fitted.seen_C[:, None] + 1))


def _hits(mask_TE: Singles, rank_TE: Ints, k_T: Ints) -> Singles:
    return np.asarray((mask_TE * (rank_TE < k_T[:, None])).sum(1))


def _random_hits(frame: RoutingFrame, routed: Routed, dealt_T: Ints, k_T: Ints) -> Singles:
    mask_TE = routed.mask_TE[dealt_T]
    fitted = cross_fitted(frame, mask_TE)
    return _hits(mask_TE, _lexical_rank(fitted)[fitted.cell.index_T], k_T)


def domain_specialization(frame: RoutingFrame, routed: Routed) -> Columns:
    """Table `domains` of one layer, without its q:

    `ds` P(e runs | domain); `lift` log2 of it over the load; `ds_lex` the mean over the domain's
    tokens of P(e|v) from other documents, what a router that sees the token alone would do; `ds_adj` =
    `ds` - `ds_lex`. Ids that no other document has say nothing about what lies beyond the token: they
    count in `ds_lex` as what they did, so they add 0 to `ds_adj`; `unseen` is their share. The
    intervals are over documents of the domain, with P(e|v) and the load as given. `p` and `p_adj` come from
    4999 permutations of domains between documents (or sources), two-sided.
    """
    fitted = cross_fitted(frame, routed.mask_TE)
    unseen_T = fitted.seen_C[fitted.cell.index_T] == 0
    mean_TE = fitted.mean_CE.astype(np.float32)[fitted.cell.index_T]
    lex_TE = np.where(unseen_T[:, None], routed.mask_TE, mean_TE)
    ran_DE, lex_DE = frame.by_document(routed.mask_TE), frame.by_document(lex_TE)
    unseen_D = frame.by_document(unseen_T[:, None].astype(np.float64))[:, 0]
    p_MX = _permuted(frame, np.concatenate([ran_DE, ran_DE - lex_DE], axis=1))
    experts = routed.experts
    parts = []
    for number, domain in enumerate(frame.domains):
        here_D = frame.domain_D == number
        figures: Columns = {}
        pieces = {"ds": ran_DE, "ds_lex": lex_DE, "ds_adj": ran_DE - lex_DE}
        tokens_D = frame.tokens_D[here_D]
        for name, top_DE in pieces.items():
            interval = ratio_interval(
                top_DE[here_D], tokens_D, frame.unit_D[here_D], seed=frame.seed
            )
            figures |= interval.columns(name)
        with np.errstate(divide="ignore", invalid="ignore"):
            for end in ("", "_low", "_high"):
                figures["lift" + end] = np.log2(figures["ds" + end] / routed.load_E)
        parts.append(
            {
                "layer": [routed.layer] * experts,
                "expert": np.arange(experts) + routed.shared,
                "domain": [domain] * experts,
                **figures,
                "p": p_MX[number, :experts],
                "p_adj": p_MX[number, experts:],
                "documents": (ran_DE[here_D] > 0).sum(0),
                "tokens": ran_DE[here_D].sum(0).astype(np.int64),
                "domain_documents": [int(here_D.sum())] * experts,
                "domain_tokens": [int(tokens_D.sum())] * experts,
                "unseen": [float(unseen_D[here_D].sum() / tokens_D.sum())] * experts,
            }
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _permuted(frame: RoutingFrame, sums_DX: Doubles) -> Doubles:
    """Two-sided p `[M, X]` of each domain's rate against domains permuted between units."""
    unit = Groups(frame.unit_D, frame.units)
    size_G1 = unit.sums(frame.tokens_D[:, None].astype(np.float64))
    sums_GX = unit.sums(sums_DX)
    # What is left after the rate of all documents: a domain's mean of it is 0 where it is like all.
    away_GX = sums_GX - sums_GX.sum(0) / size_G1.sum() * size_G1
    values_GX = np.concatenate([away_GX, size_G1], axis=1).astype(np.float32)
    domains = len(frame.domains)
    random = np.random.default_rng(frame.seed)
    more_MX = np.zeros((domains, sums_GX.shape[1]))

    def rates(domain_PG: Ints) -> Singles:
        of_PMG = domain_PG[:, None, :] == np.arange(domains)[None, :, None]
        sums = of_PMG.reshape(-1, frame.units).astype(np.float32) @ values_GX
        rate = np.abs(sums[:, :-1] / np.maximum(sums[:, -1:], 1))
        return np.asarray(rate.reshape(len(domain_PG), domains, -1), dtype=np.float32)

    observed_MX = rates(frame.domain_G[None])[0]
    # Sums in another order differ in the last bits; an equal rate must count as no less.
    least_MX = observed_MX * (1 - 1e-4) - 1e-7
    for first in range(0, PERMUTATIONS, _AT_ONCE):
        count = min(_AT_ONCE, PERMUTATIONS - first)
        drawn_PG = random.permuted(np.tile(frame.domain_G, (count, 1)), axis=1)
        more_MX += (rates(drawn_PG) >= least_MX).sum(0)
    return np.asarray((1 + more_MX) / (1 + PERMUTATIONS))
