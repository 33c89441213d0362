"""What explains routing, in bits that hold on documents that were not seen.

Every expert of a layer is a yes or no, r_e. Its bits are what it costs to tell r_e when only the load
is known; a share of them is explained by whatever makes r_e cheaper to tell:

    bits        H(e), summed over the experts of the layer
    token       I(e; V) / H                  the token that is read
    domain      I(e; D | V) / H              beyond the token
    previous    I(e; V' | V, D) / H          the token before it, beyond token and domain
    position    I(e; P | V, D, V') / H       beyond all of these
    rest        1 - all of these             context that none of them tells, and chance

They add up to 1. Domain and previous token tell in part the same, so both are also given the other
way round: `previous_first` = I(e; V' | V) and `domain_last` = I(e; D | V, V').

Counting bits in the sample that the counts come from is inflated by every rare token. Here each share
is a gain in log-likelihood on documents that the model was not fitted on: in expectation at most
what is there, 0 where nothing is, a little below 0 at times. The model is one of means:

    P(e|v)      (n_ve + a load_e) / (n_v + a)
    + factor    delta_g - E[delta|v]         main effects of the factor within token ids
    + factor    mean rest of (v, g) n / (n + b)

so that a factor gets only what differs between its values at the same token: where a token has a
single domain, the domain gets nothing. `a`, `b` and whether a factor is used at all are chosen on a
third set of documents. The main effects solve the normal equations of within-token fixed effects by
conjugate gradients.

A simpler question is what a router that sees the token alone would get right (`lexical_router`). P(e|v), how
often an expert runs for a token id, is then fitted on other documents (five folds of whole documents or
sources), so that a rare token is not explained by itself.

Shapes: T tokens (of one set), Q documents, E routed experts, V token ids, G values of a factor, F folds,
C pairs of token and value, or of fold and token id.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from moefy.data.documents import Ints
from moefy.inspection.routing import (
    Bools,
    Doubles,
    Groups,
    RoutedLayer,
    RoutingFrame,
    Singles,
    Totals,
    over_running,
)

SHARES = ("token", "domain", "previous", "position")
PATHS = (
    {"domain": "domain", "previous": "previous", "position": "position"},
    {"previous": "previous_first", "domain": "domain_last"},
)
"""Factors in the order in which they are added to the token, and what each gain is called."""
TOKEN_WEIGHTS = (0.1, 0.5, 2.0, 8.0, 32.0, 1e9)
"""Choices of `a`; the last is the load alone."""
OFF, MAIN = -1.0, np.inf
FACTOR_WEIGHTS = (OFF, MAIN, 100.0, 30.0, 10.0)
"""Choices of `b`: not at all, main effects alone, and main effects with rests."""
RIDGE = 10.0
"""Tokens of no effect added to every main effect."""
CHOOSING = 8192
"""Most tokens by which weights are chosen, drawn evenly from their documents."""
STEPS = 10
"""Conjugate gradient steps."""
FLOOR = 2e-3
"""Least probability, as a share of the load's."""


@dataclass(frozen=True)
class Explained:
    """Bits of every document and expert `[Q, E]`, and by name the bits that are saved."""

    bits_QE: Doubles
    saved_QE: dict[str, Doubles]

    def totals(self, tokens_Q: Doubles) -> Totals:
        """`bits_entropy` per token, and every share of it, over the experts together."""
        bits_Q = self.bits_QE.sum(1)
        found = {f"share_{name}": (s_QE.sum(1), bits_Q) for name, s_QE in self.saved_QE.items()}
        saved_Q = np.sum([self.saved_QE[name].sum(1) for name in SHARES], axis=0)
        return {
            "bits_entropy": (bits_Q, tokens_Q),
            **found,
            "share_rest": (bits_Q - saved_Q, bits_Q),
        }

    def experts(self, frame: RoutingFrame, routed: RoutedLayer) -> dict[str, Doubles]:
        """The same of single experts; None for those that always or never run."""
        moves_E = (routed.load_E > 0) & (routed.load_E < 1)
        pieces = {"bits_entropy": (self.bits_QE, frame.tokens_Q.astype(np.float64))}
        pieces |= {f"share_{name}": (self.saved_QE[name], self.bits_QE) for name in SHARES}
        return {
            key: routed.column(np.where(moves_E, values_E, np.nan))
            for name, (top_QE, bottom_Q) in pieces.items()
            for key, values_E in frame.interval(top_QE, bottom_Q).columns(name).items()
        }


def explained(frame: RoutingFrame, routed: RoutedLayer) -> Explained:
    """Bits on held-out documents of one layer: every fold is judged once."""
    names = ["token", *(name for path in PATHS for name in path.values())]
    bits_QE = np.zeros((len(frame.tokens_Q), routed.experts))
    saved_QE = {name: np.zeros_like(bits_QE) for name in names}
    for fold in range(frame.folds):
        judge_T, choose_T = frame.fold_T == fold, frame.fold_T == (fold + 1) % frame.folds
        document = frame.document.take(judge_T)
        every = -(-int(choose_T.sum()) // CHOOSING)
        trial = _Chain(frame, routed, ~(judge_T | choose_T), np.flatnonzero(choose_T)[::every])
        final = _Chain(frame, routed, ~judge_T, judge_T)
        bits_QE += document.sums(final.bits_TE.astype(np.float64))
        before_TE = final.bits_TE
        final.add_token((trial.add_token(TOKEN_WEIGHTS),))
        saved_QE["token"] += document.sums((before_TE - final.bits_TE).astype(np.float64))
        for path in PATHS:
            trying, judged = copy.copy(trial), copy.copy(final)
            for factor, name in path.items():
                before_TE = judged.bits_TE
                judged.add(factor, (trying.add(factor, FACTOR_WEIGHTS),))
                saved_TE = (before_TE - judged.bits_TE).astype(np.float64)
                saved_QE[name] += document.sums(saved_TE)
    return Explained(bits_QE, saved_QE)


class _Chain:
    """Means fitted on some tokens and judged on others, one factor after the other."""

    def __init__(
        self, frame: RoutingFrame, routed: RoutedLayer, learn_T: Bools, judge_T: Bools | Ints
    ) -> None:
        self.frame, self.learn_T, self.judge_T = frame, learn_T, judge_T
        learnt_TE = routed.mask_TE[learn_T]
        self.idle_TE = routed.mask_TE[judge_T] == 0
        self.load_E = (learnt_TE.sum(0) + np.float32(0.5)) / np.float32(len(learnt_TE) + 1)
        self.token, self.judged_token_T = frame.token.take(learn_T), frame.token.index_T[judge_T]
        self.size_V1 = self.token.count_C[:, None].astype(np.float32)
        self.ran_VE = self.token.sums(learnt_TE)
        self.weight = TOKEN_WEIGHTS[-1]
        """`a` of the tokens."""
        self.mean_TE = np.broadcast_to(self.load_E, self.idle_TE.shape)
        """P(e runs) of the judged tokens, which may lie outside of 0 to 1."""
        mean_VE = self.ran_VE / np.maximum(self.size_V1, 1)
        self.rest_TE = np.asarray(learnt_TE - mean_VE[self.token.index_T], dtype=np.float32)
        """What the learnt tokens did beyond the means of what was added."""
        self.bits_TE = self._bits(self.mean_TE)

    def _bits(self, mean_TE: Singles) -> Singles:
        low_E, high_E = FLOOR * self.load_E, 1 - FLOOR * (1 - self.load_E)
        clipped_TE = np.clip(mean_TE, low_E, high_E)
        np.subtract(1, clipped_TE, out=clipped_TE, where=self.idle_TE)
        return np.negative(np.log2(clipped_TE, out=clipped_TE), out=clipped_TE)

    def add_token(self, weights: Sequence[float]) -> float:
        """Add the token id with the best of these weights `a`; returns it."""
        trials = []
        for weight in weights:
            mean_VE = (self.ran_VE + weight * self.load_E) / (self.size_V1 + weight)
            mean_TE = mean_VE.astype(np.float32)[self.judged_token_T]
            trials.append((self._bits(mean_TE), mean_TE))
        best = _least([bits for bits, _ in trials])
        self.weight = weights[best]
        self.bits_TE, self.mean_TE = trials[best]
        return self.weight

    def add(self, factor: str, weights: Sequence[float]) -> float:
        """Add a factor with the best of these weights `b`; returns it."""
        group, pair = self.frame.factors[factor]
        learnt, learnt_pair = group.take(self.learn_T), pair.take(self.learn_T)
        main_TE, rest_TE = self._main(group, learnt)
        sum_CE = learnt_pair.sums(rest_TE)
        size_C1 = learnt_pair.count_C[:, None].astype(np.float32)
        judged_pair_T = pair.index_T[self.judge_T]

        def mean_of(weight: float) -> Singles:
            if weight == OFF:
                return self.mean_TE
            mean_TE = self.mean_TE + main_TE
            if weight != MAIN:
                mean_TE += (sum_CE / (size_C1 + np.float32(weight)))[judged_pair_T]
            return np.asarray(mean_TE, dtype=np.float32)

        trials = [self.bits_TE if b == OFF else self._bits(mean_of(b)) for b in weights]
        best = _least(trials)
        self.bits_TE, weight = trials[best], weights[best]
        if weight != OFF:
            self.mean_TE = mean_of(weight)
            self.rest_TE = rest_TE
        if weight not in (OFF, MAIN):
            rested_CE = sum_CE / (size_C1 + np.float32(weight))
            self.rest_TE = rest_TE - rested_CE[learnt_pair.index_T]
        return weight

    def _main(self, group: Groups, learnt: Groups) -> tuple[Singles, Singles]:
        """Main effects of a factor on the judged tokens, and what the learnt tokens did beyond them."""
        ones_T = np.ones(len(learnt.index_T), dtype=np.float32)
        size_VG = sparse.csr_array(
            (ones_T, (self.token.index_T, learnt.index_T)), shape=(self.token.size, group.size)
        )
        effect_GE = _main_effects(size_VG, learnt.sums(self.rest_TE))
        of_token_VE = size_VG @ effect_GE
        rest_TE = self.rest_TE - effect_GE[learnt.index_T]
        rest_TE += (of_token_VE / np.maximum(self.size_V1, 1))[self.token.index_T]
        # What stands in for E[delta|v] is smoothed as P(e|v) is, so that rare ids fit together.
        mean_E = (learnt.count_C @ effect_GE) / max(len(learnt.index_T), 1)
        smooth_VE = (of_token_VE + self.weight * mean_E) / (self.size_V1 + self.weight)
        main_TE = effect_GE[group.index_T[self.judge_T]] - smooth_VE[self.judged_token_T]
        return main_TE.astype(np.float32), np.asarray(rest_TE, dtype=np.float32)


def _least(trials: list[Singles]) -> int:
    return int(np.argmin([bits_TE.sum(dtype=np.float64) for bits_TE in trials]))


def _main_effects(size_VG: sparse.csr_array, sum_GE: Singles) -> Singles:
    """Effects `delta` `[G, E]` of a factor's values within token ids, by conjugate gradients:

    (diag(n_g) - N^T diag(1 / n_v) N + ridge) delta = sums of what is left over
    """
    size_G1 = np.asarray(size_VG.sum(0)).reshape(-1, 1)
    size_V1 = np.maximum(np.asarray(size_VG.sum(1)).reshape(-1, 1), 1)
    across_GV = size_VG.T.tocsr()
    scale_G1 = size_G1 + RIDGE
    found_GE = np.zeros_like(sum_GE)
    left_GE = sum_GE.copy()
    scaled_GE = left_GE / scale_G1
    along_GE = scaled_GE.copy()
    power_E = (left_GE * scaled_GE).sum(0)
    for _ in range(STEPS):
        image_GE = scale_G1 * along_GE - across_GV @ ((size_VG @ along_GE) / size_V1)
        curve_E = (along_GE * image_GE).sum(0)
        step_E = np.where(curve_E > 0, power_E / np.where(curve_E > 0, curve_E, 1), 0)
        found_GE += step_E * along_GE
        left_GE -= step_E * image_GE
        scaled_GE = left_GE / scale_G1
        before_E, power_E = power_E, (left_GE * scaled_GE).sum(0)
        ratio_E = np.where(before_E > 0, power_E / np.where(before_E > 0, before_E, 1), 0)
        along_GE = scaled_GE + ratio_E * along_GE
    return np.asarray(found_GE, dtype=np.float32)


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


def lexical_router(frame: RoutingFrame, routed: RoutedLayer) -> Totals:
    """Share of the true experts that are right, averaged over tokens, by router of the same k:

    `lexical_recall` the k experts that other documents run most for the token id (by
    `(n_ve + load_e) / (n_v + 1)`, so that the load breaks ties and stands in for unseen ids);
    `lexical_recall_random` the same for a random router of the model's loads; `constant_recall` the k
    busiest experts for all tokens; `load_recall` experts drawn by load; `chance_recall` drawn evenly.
    """
    k_T = np.maximum(routed.active_T, 1)
    by_k = Groups.of(routed.active_T)
    dealt_TE = routed.mask_TE[frame.shuffled(by_k, np.random.default_rng(frame.seed))]
    load_KE = by_k.sums(routed.mask_TE) / by_k.count_C[:, None]
    fitted, dealt = cross_fitted(frame, routed.mask_TE), cross_fitted(frame, dealt_TE)
    busiest_CE = _rank(fitted.load_CE)
    found_T = {
        "lexical_recall": _hits(routed.mask_TE, _lexical_rank(fitted)[fitted.cell.index_T], k_T),
        "lexical_recall_random": _hits(dealt_TE, _lexical_rank(dealt)[dealt.cell.index_T], k_T),
        "constant_recall": _hits(routed.mask_TE, busiest_CE[fitted.cell.index_T], k_T),
        "load_recall": (routed.mask_TE * load_KE[by_k.index_T]).sum(1),
        "chance_recall": routed.active_T**2 / max(routed.experts, 1),
    }
    return over_running(frame, routed, found_T)


def _rank(score_CE: Doubles) -> Ints:
    order_CE = np.argsort(-score_CE, axis=1, kind="stable")
    rank_CE = np.empty_like(order_CE)
    np.put_along_axis(rank_CE, order_CE, np.arange(order_CE.shape[1])[None], axis=1)
    return rank_CE


def _lexical_rank(fitted: CrossFitted) -> Ints:
    return _rank((fitted.ran_CE + fitted.load_CE) / (fitted.seen_C[:, None] + 1))


def _hits(mask_TE: Singles, rank_TE: Ints, k_T: Ints) -> Singles:
    return np.asarray((mask_TE * (rank_TE < k_T[:, None])).sum(1))
