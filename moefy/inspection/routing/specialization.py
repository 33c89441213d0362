"""What every expert is for: how often it runs, for which tokens, in which domains.

    load         share of tokens; its evenness over a layer, dead experts, load by position
    domains      how often it runs in a domain, beyond what the tokens of the domain alone tell
    tokens       recall P(v|e), precision P(e|v), lift log2 P(e|v) / P(e), and the weighted log-odds z of
                 Monroe, Colaresi and Quinn 2008 ("Fightin' Words", eq. 22), whose Dirichlet prior is
                 the tokens' own frequencies with the weight of one token per type: it keeps rare tokens
                 from leading every list. z orders tokens; it counts tokens as if they were
                 independent, so it is no test
    vocabulary   how much a layer sorts tokens by their id

Shapes: T tokens, Q documents, V token types, E routed experts, G units, C domains, or pairs of type and
document, R permutations, K jackknife groups.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moefy.data.documents import Ints
from moefy.evaluation.statistics import LEVEL, ratio_interval
from moefy.inspection.routing import (
    MIN_COUNT,
    Bools,
    Columns,
    Doubles,
    Groups,
    RoutedLayer,
    RoutingFrame,
    Singles,
    bin_edges,
    stacked,
)
from moefy.inspection.routing.explained import cross_fitted
from moefy.inspection.texts.tokens import NONE

SHOWN = 20
"""Tokens listed at each end for every expert and kind."""
KINDS = {
    "current": "ids_T",
    "previous": "previous_T",
    "target": "target_T",
    "predicted": "predicted_T",
}
"""Which token of a place is listed, and where `Tokens` holds it."""
SHUFFLES = 10
JACKKNIFE = 20
"""Groups of units that are left out in turn for the interval of vocabulary specialization."""
PERMUTATIONS = 4999
_AT_ONCE = 200


def load(frame: RoutingFrame, routed: RoutedLayer) -> dict[str, Columns]:
    """Columns of `experts` and `layers`, and the tables `dead` and `positions` of one layer."""
    ran_QE = frame.by_document(routed.mask_TE)
    interval = frame.interval(ran_QE, frame.tokens_Q)
    documents_E, tokens_E = (ran_QE > 0).sum(0), ran_QE.sum(0)
    whole = len(frame), len(frame.tokens_Q)
    experts: Columns = {
        name: routed.column(values, shared=1.0) for name, values in interval.columns("load").items()
    }
    experts["documents"] = routed.column(documents_E, whole[1]).astype(int).tolist()
    experts["tokens"] = routed.column(tokens_E, whole[0]).astype(int).tolist()
    dead_E = np.flatnonzero(tokens_E == 0)
    layers = {
        "tokens": [whole[0]],
        "documents": [whole[1]],
        "units": [frame.units],
        "routed_experts": [routed.experts],
        "active": np.array([routed.active_T.mean()]),
        "load_entropy": np.array([evenness(routed.load_E)]),
        "load_gini": np.array([gini(routed.load_E)]),
        "dead": [len(dead_E)],
    }
    dead = {
        "layer": [routed.layer] * len(dead_E),
        "expert": dead_E + routed.shared,
        "tokens": [whole[0]] * len(dead_E),
        "documents": [whole[1]] * len(dead_E),
    }
    positions = _positions(frame, routed)
    return {"experts": experts, "layers": layers, "dead": dead, "positions": positions}


def evenness(load_E: Doubles) -> float:
    """Entropy of the loads as shares, over that of even loads: 1 is even, 0 is one expert alone."""
    if len(load_E) < 2 or not load_E.sum():
        return float("nan")
    share_E = load_E[load_E > 0] / load_E.sum()
    return float(-(share_E * np.log2(share_E)).sum() / np.log2(len(load_E)))


def gini(load_E: Doubles) -> float:
    """Gini coefficient: 0 is even, `1 - 1 / E` is one expert alone."""
    if not load_E.sum():
        return float("nan")
    size = len(load_E)
    rank_E = 2 * np.arange(1, size + 1) - size - 1
    return float((rank_E * np.sort(load_E)).sum() / (size * load_E.sum()))


def _positions(frame: RoutingFrame, routed: RoutedLayer) -> Columns:
    bins, experts = frame.bin.size, routed.experts
    count_B = frame.bin.count_C
    load_BE = frame.bin.sums(routed.mask_TE).astype(np.float64) / np.maximum(count_B, 1)[:, None]
    load_BE[count_B == 0] = np.nan
    first, last = bin_edges(bins)
    return {
        "layer": [routed.layer] * (bins * experts),
        "expert": np.repeat(np.arange(experts), bins) + routed.shared,
        "position": np.tile(first, experts),
        "position_last": np.tile(last, experts),
        "tokens": np.tile(count_B, experts),
        "load": load_BE.T.ravel(),
    }


def domain_specialization(frame: RoutingFrame, routed: RoutedLayer) -> Columns:
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
    ran_QE, lex_QE = frame.by_document(routed.mask_TE), frame.by_document(lex_TE)
    unseen_Q = frame.by_document(unseen_T[:, None].astype(np.float64))[:, 0]
    p_CX = _permuted(frame, np.concatenate([ran_QE, ran_QE - lex_QE], axis=1))
    parts = [
        _of_domain(frame, routed, number, (ran_QE, lex_QE, unseen_Q), p_X)
        for number, p_X in enumerate(p_CX)
    ]
    return stacked(parts)


def _of_domain(
    frame: RoutingFrame,
    routed: RoutedLayer,
    number: int,
    sums: tuple[Doubles, Doubles, Doubles],
    p_X: Doubles,
) -> Columns:
    here_Q = frame.domain_Q == number
    ran_QE, lex_QE, unseen_Q = (values[here_Q] for values in sums)
    tokens_Q, unit_Q = frame.tokens_Q[here_Q], frame.unit_Q[here_Q]
    pieces = {"ds": ran_QE, "ds_lex": lex_QE, "ds_adj": ran_QE - lex_QE}
    figures: Columns = {}
    for name, top_QE in pieces.items():
        figures |= ratio_interval(top_QE, tokens_Q, unit_Q, seed=frame.seed).columns(name)
    with np.errstate(divide="ignore", invalid="ignore"):
        for end in ("", "_low", "_high"):
            figures["lift" + end] = np.log2(figures["ds" + end] / routed.load_E)
    experts = routed.experts
    return {
        "layer": [routed.layer] * experts,
        "expert": np.arange(experts) + routed.shared,
        "domain": [frame.domains[number]] * experts,
        **figures,
        "p": p_X[:experts],
        "p_adj": p_X[experts:],
        "documents": (ran_QE > 0).sum(0),
        "tokens": ran_QE.sum(0).astype(np.int64),
        "domain_documents": [int(here_Q.sum())] * experts,
        "domain_tokens": [int(tokens_Q.sum())] * experts,
        "unseen": [float(unseen_Q.sum() / tokens_Q.sum())] * experts,
    }


def _permuted(frame: RoutingFrame, sums_QX: Doubles) -> Doubles:
    """Two-sided p `[C, X]` of each domain's rate against domains permuted between units."""
    unit = Groups(frame.unit_Q, frame.units)
    size_G1 = unit.sums(frame.tokens_Q[:, None].astype(np.float64))
    sums_GX = unit.sums(sums_QX)
    # What is left after the rate of all documents: a domain's mean of it is 0 where it is like all.
    away_GX = sums_GX - sums_GX.sum(0) / size_G1.sum() * size_G1
    values_GX = np.concatenate([away_GX, size_G1], axis=1).astype(np.float32)
    domains = len(frame.domains)
    random = np.random.default_rng(frame.seed)
    more_CX = np.zeros((domains, sums_GX.shape[1]))

    def rates(domain_RG: Ints) -> Singles:
        of_RCG = domain_RG[:, None, :] == np.arange(domains)[None, :, None]
        sums = of_RCG.reshape(-1, frame.units).astype(np.float32) @ values_GX
        rate = np.abs(sums[:, :-1] / np.maximum(sums[:, -1:], 1))
        return np.asarray(rate.reshape(len(domain_RG), domains, -1), dtype=np.float32)

    observed_CX = rates(frame.domain_G[None])[0]
    # Sums in another order differ in the last bits; an equal rate must count as no less.
    least_CX = observed_CX * (1 - 1e-4) - 1e-7
    for first in range(0, PERMUTATIONS, _AT_ONCE):
        count = min(_AT_ONCE, PERMUTATIONS - first)
        drawn_RG = random.permuted(np.tile(frame.domain_G, (count, 1)), axis=1)
        more_CX += (rates(drawn_RG) >= least_CX).sum(0)
    return np.asarray((1 + more_CX) / (1 + PERMUTATIONS))


def log_odds(ran_VE: Doubles, all_V1: Doubles) -> Doubles:
    """Weighted log-odds z `[V, E]` of every type, in the tokens that an expert ran against those that
    it did not, from counts; 0 where an expert ran for all tokens or none."""
    off_VE = all_V1 - ran_VE
    prior_V1 = all_V1 / all_V1.sum() * len(all_V1)
    total = prior_V1.sum()

    def log_odd(count_VE: Doubles) -> Doubles:
        smooth_VE = count_VE + prior_V1
        return np.asarray(np.log(smooth_VE / (count_VE.sum(0) + total - smooth_VE)))

    with np.errstate(divide="ignore", invalid="ignore"):
        away_VE = log_odd(ran_VE) - log_odd(off_VE)
        z_VE = away_VE / np.sqrt(1 / (ran_VE + prior_V1) + 1 / (off_VE + prior_V1))
    idle_E = (ran_VE.sum(0) == 0) | (off_VE.sum(0) == 0)
    return np.where(idle_E | ~np.isfinite(z_VE), 0.0, z_VE)


def token_lists(frame: RoutingFrame, routed: RoutedLayer, shown: int = SHOWN) -> Columns:
    """Table `tokens`: for every expert and kind the types of highest and lowest z.

    Types with fewer than 10 occurrences are left out; so are experts that always or never run.
    """
    parts = [_of_kind(frame, routed, kind, shown) for kind in KINDS]
    return stacked(parts)


def _of_kind(frame: RoutingFrame, routed: RoutedLayer, kind: str, shown: int) -> Columns:
    ids_T = getattr(frame.sample.tokens, KINDS[kind])
    known_T = ids_T != NONE
    types, index_T = np.unique(ids_T[known_T], return_inverse=True)
    # Counts by type and document first: what is listed says in how many documents it was seen.
    pairs = Groups.of(index_T, frame.document.index_T[known_T])
    ran_CE = pairs.sums(routed.mask_TE[known_T])
    by_type = Groups(pairs.first(index_T), len(types))
    ran_VE = by_type.sums(ran_CE).astype(np.float64)
    documents_VE = by_type.sums((ran_CE > 0).astype(np.float32))
    all_V1 = np.bincount(index_T, minlength=len(types)).astype(np.float64)[:, None]
    often_V = np.flatnonzero(all_V1[:, 0] >= MIN_COUNT)
    z_VE = log_odds(ran_VE, all_V1)[often_V]
    moves_E = np.flatnonzero((routed.load_E > 0) & (routed.load_E < 1))
    at_NE, end_N = _ends(z_VE[:, moves_E], shown)
    v, e = often_V[at_NE].T.ravel(), np.repeat(moves_E, len(end_N))
    ran, precision = ran_VE[v, e], ran_VE[v, e] / all_V1[v, 0]
    load_E = ran_VE.sum(0) / max(all_V1.sum(), 1)
    with np.errstate(divide="ignore"):
        lift = np.log2(precision / load_E[e])
    return {
        "layer": np.full(len(v), routed.layer),
        "expert": e + routed.shared,
        "kind": np.full(len(v), kind),
        "end": np.tile(end_N, len(moves_E)),
        "token": types[v],
        "count": ran.astype(np.int64),
        "total": all_V1[v, 0].astype(np.int64),
        "documents": documents_VE[v, e].astype(np.int64),
        "recall": ran / ran_VE.sum(0)[e],
        "precision": precision,
        "lift": lift,
        "z": z_VE[at_NE, moves_E].T.ravel(),
    }


def _ends(z_VE: Doubles, shown: int) -> tuple[Ints, NDArray[np.str_]]:
    """Rows of the highest, then of the lowest z of every column, and which end each is."""
    top = min(shown, (len(z_VE) + 1) // 2)
    bottom = min(shown, len(z_VE) - top)
    order_VE = np.argsort(-z_VE, axis=0, kind="stable")
    at_NE = np.concatenate([order_VE[:top], order_VE[len(order_VE) - bottom :][::-1]])
    return at_NE, np.array(["top"] * top + ["bottom"] * bottom)


def vocabulary_specialization(frame: RoutingFrame, routed: RoutedLayer) -> Columns:
    """Columns `vs`, `vs_null`, `vs_adj` of one layer.

    VS is the mean over token types of the largest share that an expert takes (OLMoE), over types that
    occur 10 times or more. Small counts alone raise it, so it is set against the mean over shuffles of
    routing among tokens within (document, position bin): `(VS - null) / (1 - null)`. The interval is
    a delete-one-group jackknife over 20 groups of units, shuffles included.
    """
    random = np.random.default_rng([frame.seed, routed.layer])
    cells = _Cells.of(frame, random)
    if not cells.types or not routed.experts:
        names = ("vs", "vs_null", "vs_adj", "vs_adj_low", "vs_adj_high")
        return {name: np.array([np.nan]) for name in names} | {"vs_types": [0]}
    vs_K = cells.largest(routed.mask_TE)
    shuffles = (frame.shuffled(frame.stratum, random) for _ in range(SHUFFLES))
    null_K = np.mean([cells.largest(routed.mask_TE[places_T]) for places_T in shuffles], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        adj_K = (vs_K - null_K) / (1 - null_K)
    left_K, whole, groups = adj_K[:-1], adj_K[-1], cells.groups
    error = np.sqrt((groups - 1) / groups * ((left_K - left_K.mean()) ** 2).sum())
    reach = stats.t.ppf((1 + LEVEL) / 2, groups - 1) * error
    return {
        "vs": vs_K[-1:],
        "vs_null": null_K[-1:],
        "vs_adj": np.array([whole]),
        "vs_adj_low": np.array([whole - reach]),
        "vs_adj_high": np.array([whole + reach]),
        "vs_types": [cells.types],
    }


@dataclass(frozen=True)
class _Cells:
    """Tokens of frequent types, by type and group of the jackknife."""

    often_T: Bools
    cell: Groups
    type_C: Ints
    group_C: Ints
    types: int
    groups: int

    @classmethod
    def of(cls, frame: RoutingFrame, random: np.random.Generator) -> "_Cells":
        """The groups are dealt at random."""
        often_T = frame.token.count_C[frame.token.index_T] >= MIN_COUNT
        groups = min(JACKKNIFE, frame.units)
        group_G = random.permutation(frame.units) % groups
        group_T = group_G[frame.unit.index_T][often_T]
        id_T = frame.token.index_T[often_T]
        cell = Groups.of(id_T, group_T)
        types, type_C = np.unique(cell.first(id_T), return_inverse=True)
        return cls(often_T, cell, type_C, cell.first(group_T), len(types), groups)

    def largest(self, mask_TE: Singles) -> Doubles:
        """VS of a mask without each group `[K]`, then with all."""
        ran_CE, size_C = self.cell.sums(mask_TE[self.often_T]), self.cell.count_C
        all_VE = Groups(self.type_C, self.types).sums(ran_CE)
        all_V = np.bincount(self.type_C, size_C)
        found = []
        for group in range(self.groups + 1):
            here_C = self.group_C == group
            left_VE, left_V = all_VE.copy(), all_V.copy()
            left_VE[self.type_C[here_C]] -= ran_CE[here_C]
            left_V[self.type_C[here_C]] -= size_C[here_C]
            has_V = left_V > 0
            found.append(float((left_VE[has_V].max(1) / left_V[has_V]).mean(dtype=np.float64)))
        return np.array(found)
