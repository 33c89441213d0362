"""Which experts run together, within a layer and between layers.

    P(b|a) = n_ab / n_a, lift = log2 n_ab N / (n_a n_b), Jaccard = n_ab / (n_a + n_b - n_ab),
    phi = the correlation of the two

Independence is the wrong null: where exactly k run, one expert pushes out another.

Within a layer the null keeps both margins, how many experts a token runs and how many tokens an
expert: tokens are paired at random and trade the experts that only one of them ran (curveball,
Strona et al. 2014, all pairs at once) on a subsample of tokens. `z` is phi minus its mean under the
null, over the larger of two errors: that between documents (tokens of one document are alike) and
that of the null.

Between layers routing is permuted among tokens within (document, position bin); mean and variance of
n_ab are then known exactly (Mantel and Haenszel), and the error between documents is again used where
it is the larger one.

Shapes: T tokens, G units, E and F experts of two layers, R draws, S strata, P pairs of tokens.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moefy.data.documents import Ints
from moefy.evaluation.statistics import q_values
from moefy.inspection.routing import (
    Columns,
    Doubles,
    Groups,
    RoutedLayer,
    RoutingFrame,
    Singles,
    stacked,
)

Layers = tuple[int, int]

DRAWS = 50
SUBSAMPLE = 8192
"""Tokens on which experts are traded."""
BURN_IN, BETWEEN_DRAWS = 20, 4
"""Rounds of trades, in each of which every token takes part."""
FAR_TOKENS = 32768
"""Tokens for layers that are not adjacent."""
PAIRS = 200
"""Pairs kept for every pair of layers."""
DUPLICATE = 0.9
LEVEL = 0.05


@dataclass(frozen=True)
class Pairs:
    """All pairs of experts of one layer (a < b), or of two adjacent ones."""

    layers: Layers
    a_P: Ints
    b_P: Ints
    """Numbers of experts, the shared ones counted."""
    figures: dict[str, NDArray[Any]]
    """`together`, `p_given`, `p_given_back`, `lift`, `phi`, `phi_null`, `jaccard`, `z`, `p`."""

    @property
    def size(self) -> int:
        """Number of pairs."""
        return len(self.a_P)


def within_layer(frame: RoutingFrame, routed: RoutedLayer) -> Pairs:
    """All pairs of one layer."""
    mask_TE = routed.mask_TE
    together_EE = (mask_TE.T @ mask_TE).astype(np.float64)
    load_E = routed.load_E
    away_TE = mask_TE - load_E.astype(np.float32)
    error_EE = _error_by_unit(away_TE, frame.unit) / _spread(load_E, load_E)
    null_EE, null_error_EE = traded_phi(frame, mask_TE)
    phi_EE = phi(together_EE, load_E, load_E, len(frame))
    error_EE = np.maximum(error_EE, null_error_EE * np.sqrt(min(SUBSAMPLE / len(frame), 1)))
    # The mean of the null is itself known only as well as its draws tell.
    error_EE = np.hypot(error_EE, null_error_EE / np.sqrt(DRAWS))
    at = np.triu_indices(routed.experts, 1)
    return _pairs((routed, routed), at, together_EE, phi_EE, null_EE, error_EE, frame)


def between_layers(frame: RoutingFrame, first: RoutedLayer, second: RoutedLayer) -> Pairs:
    """All pairs of an expert of one layer and one of another."""
    together_EF = (first.mask_TE.T @ second.mask_TE).astype(np.float64)
    scale_EF = _spread(first.load_E, second.load_E) * len(frame)
    mean_EF, error_EF = _permuted(frame, first.mask_TE, second.mask_TE)
    phi_EF = phi(together_EF, first.load_E, second.load_E, len(frame))
    null_EF = phi(mean_EF, first.load_E, second.load_E, len(frame))
    at = np.indices(phi_EF.shape).reshape(2, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        error_EF = error_EF / scale_EF
    return _pairs((first, second), (at[0], at[1]), together_EF, phi_EF, null_EF, error_EF, frame)


def phi(together_EF: Doubles, load_E: Doubles, load_F: Doubles, tokens: int) -> Doubles:
    """Correlation of running `[E, F]` from counts; NaN where an expert always or never runs."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(
            (together_EF / tokens - np.outer(load_E, load_F)) / _spread(load_E, load_F)
        )


def _spread(load_E: Doubles, load_F: Doubles) -> Doubles:
    spread_EF = np.sqrt(np.outer(load_E * (1 - load_E), load_F * (1 - load_F)))
    return np.where(spread_EF > 0, spread_EF, np.nan)


def _error_by_unit(away_TE: Singles, unit: Groups) -> Doubles:
    """Standard error of every covariance, from its sums over units."""
    size = float(len(away_TE))
    squares, crossed, total = (np.zeros((away_TE.shape[1],) * 2) for _ in range(3))
    for at in unit.members():
        here_TE = away_TE[at]
        product_EE = (here_TE.T @ here_TE).astype(np.float64)
        squares += product_EE**2
        crossed += len(at) * product_EE
        total += product_EE
    mean_EE = total / size
    away_EE = squares - 2 * mean_EE * crossed + mean_EE**2 * float((unit.count_C**2.0).sum())
    return np.sqrt(np.maximum(away_EE, 0) * unit.size / max(unit.size - 1, 1)) / size


def traded_phi(frame: RoutingFrame, mask_TE: Singles) -> tuple[Doubles, Doubles]:
    """Mean and standard deviation of phi `[E, E]` under trades that keep both margins."""
    random = np.random.default_rng(frame.seed)
    chosen_T = random.permutation(len(mask_TE))[: SUBSAMPLE & ~1]
    state_TE = mask_TE[chosen_T] > 0
    load_E = state_TE.mean(0)
    found = np.zeros((2, *(state_TE.shape[1],) * 2))
    for draw in range(DRAWS):
        for _ in range(BURN_IN if draw == 0 else BETWEEN_DRAWS):
            trade(state_TE, random)
        values = state_TE.astype(np.float32)
        phi_EE = phi((values.T @ values).astype(np.float64), load_E, load_E, len(values))
        found += np.stack([phi_EE, phi_EE**2])
    mean_EE, square_EE = found / DRAWS
    return mean_EE, np.sqrt(np.maximum(square_EE - mean_EE**2, 0) * DRAWS / (DRAWS - 1))


def trade(state_TE: NDArray[np.bool_], random: np.random.Generator) -> None:
    """One round in place: tokens in random pairs deal anew the experts that one of both ran alone."""
    half = len(state_TE) // 2
    order_T = random.permutation(len(state_TE))
    one_P, other_P = order_T[:half], order_T[half : 2 * half]
    one_PE, other_PE = state_TE[one_P], state_TE[other_P]
    apart_PE = one_PE ^ other_PE
    row, expert = np.nonzero(apart_PE)
    key = np.argsort(row + random.random(len(row)))
    row, expert = row[key], expert[key]
    # The first of each pair's shuffled experts go to the one, as many as it gave.
    given_P = (one_PE & apart_PE).sum(1)
    begin_P = np.concatenate([[0], np.cumsum(apart_PE.sum(1))[:-1]])
    to_one = np.arange(len(row)) - begin_P[row] < given_P[row]
    state_TE[one_P[row], expert] = to_one
    state_TE[other_P[row], expert] = ~to_one


def _permuted(frame: RoutingFrame, one_TE: Singles, other_TF: Singles) -> tuple[Doubles, Doubles]:
    """Mean of n_ab under permutations within strata, and the error of n_ab around it `[E, F]`."""
    size_S = frame.stratum.count_C.astype(np.float64)
    one_SE = frame.stratum.sums(one_TE).astype(np.float64)
    other_SF = frame.stratum.sums(other_TF).astype(np.float64)
    mean_EF = one_SE.T @ (other_SF / size_S[:, None])
    vary_SE = one_SE * (1 - one_SE / size_S[:, None])
    vary_SF = other_SF * (1 - other_SF / size_S[:, None])
    variance_EF = vary_SE.T @ (vary_SF / np.maximum(size_S - 1, 1)[:, None])
    # Sums over units of what goes beyond the strata.
    one_TE = one_TE - (one_SE / size_S[:, None]).astype(np.float32)[frame.stratum.index_T]
    squares_EF, total_EF = np.zeros_like(mean_EF), np.zeros_like(mean_EF)
    for at in frame.unit.members():
        beyond_EF = (one_TE[at].T @ other_TF[at]).astype(np.float64)
        squares_EF += beyond_EF**2
        total_EF += beyond_EF
    away_EF = np.maximum(squares_EF - total_EF**2 / frame.units, 0)
    away_EF = away_EF * frame.units / max(frame.units - 1, 1)
    return mean_EF, np.sqrt(np.maximum(away_EF, variance_EF))


def _pairs(
    routed: tuple[RoutedLayer, RoutedLayer],
    at: tuple[Ints, Ints],
    together_EF: Doubles,
    phi_EF: Doubles,
    null_EF: Doubles,
    error_EF: Doubles,
    frame: RoutingFrame,
) -> Pairs:
    first, second = routed
    n_a, n_b = first.load_E[at[0]] * len(frame), second.load_E[at[1]] * len(frame)
    together = together_EF[at]
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (phi_EF - null_EF)[at] / error_EF[at]
        z[~np.isfinite(z)] = np.nan
        figures = {
            "together": together.round().astype(np.int64),
            "p_given": together / n_a,
            "p_given_back": together / n_b,
            "lift": np.log2(together * len(frame) / (n_a * n_b)),
            "phi": phi_EF[at],
            "phi_null": null_EF[at],
            "jaccard": together / (n_a + n_b - together),
            "z": z,
            "p": 2 * stats.t.sf(np.abs(z), max(frame.units - 1, 1)),
        }
    return Pairs((first.layer, second.layer), at[0] + first.shared, at[1] + second.shared, figures)


def best_phi(
    layers: list[int], masks: list[NDArray[np.bool_]], seed: int = 0
) -> dict[Layers, tuple[float, float]]:
    """For all pairs of layers, from masks `[T, E]` of the same drawn tokens, the mean over the experts
    of the first of the largest |phi| with any of the second, and the same after a shuffle of the
    second's tokens."""
    dealt_T = np.random.default_rng(seed).permutation(len(masks[0]))
    found = {}
    for first, second in combinations(range(len(masks)), 2):
        one_TE, other_TF = (masks[at].astype(np.float32) for at in (first, second))
        pair = _best(one_TE, other_TF), _best(one_TE, other_TF[dealt_T])
        found[layers[first], layers[second]] = pair
    return found


def _best(one_TE: Singles, other_TF: Singles) -> float:
    load_E, load_F = (ran.mean(0, dtype=np.float64) for ran in (one_TE, other_TF))
    together_EF = (one_TE.T @ other_TF).astype(np.float64)
    phi_EF = np.nan_to_num(np.abs(phi(together_EF, load_E, load_F, len(one_TE))))
    moves_E = (load_E > 0) & (load_E < 1)
    return float(phi_EF[moves_E].max(1).mean()) if moves_E.any() else float("nan")


def pair_tables(found: list[Pairs]) -> tuple[dict[str, Columns], dict[Layers, dict[str, int]]]:
    """Tables `pairs` (q < .05 over all pairs that were tested, the 200 of largest |phi| of every pair
    of layers) and `duplicates` (phi over .9), and how many there were for every pair of layers."""
    q = np.split(
        q_values(np.concatenate([pairs.figures["p"] for pairs in found])),
        np.cumsum([pairs.size for pairs in found])[:-1],
    )
    kept, same, counts = [], [], {}
    for pairs, q_P in zip(found, q, strict=True):
        size_P = np.nan_to_num(np.abs(pairs.figures["phi"]))
        with np.errstate(invalid="ignore"):
            sure = np.flatnonzero(q_P < LEVEL)
            twins = np.flatnonzero(pairs.figures["phi"] > DUPLICATE)
        best = sure[np.argsort(-size_P[sure], kind="stable")][:PAIRS]
        kept.append(_rows(pairs, q_P, best))
        same.append(_rows(pairs, q_P, twins))
        counts[pairs.layers] = {
            "pairs": pairs.size,
            "pairs_found": len(sure),
            "pairs_shown": len(best),
            "duplicates": len(twins),
        }
    return {"pairs": stacked(kept), "duplicates": stacked(same)}, counts


def _rows(pairs: Pairs, q_P: Doubles, at: Ints) -> Columns:
    return {
        "layer_a": np.full(len(at), pairs.layers[0]),
        "expert_a": pairs.a_P[at],
        "layer_b": np.full(len(at), pairs.layers[1]),
        "expert_b": pairs.b_P[at],
        **{name: values[at] for name, values in pairs.figures.items()},
        "q": q_P[at],
    }
