"""Random sets of neurons to compare experts with: of the same size and of the same energy.

The energy of a set is that of what its replacement takes away, `E ||sum_{j in S} (c_j - v_j) d_j||^2`:
a big expert raises the loss more than a small one, whatever it does. Experts of a layer are cut into `BINS`
bins at equal widths of log energy, `WIDTH` from end to end, counted down from the strongest; the last
holds all that are weaker. Each bin has its own random sets, matched to its experts, weakest to
strongest, to within `TOLERANCE`: neurons are drawn at random, then swapped for others until the energy
fits. For the difference that is left inside a bin the loss increase of a set is corrected:

    M_r (E_e / E_r)^s

where s is how the increase grows with energy among the layer's own random sets.

All draws are made in the canonical order of neurons (`moefy.methods.partition.canonical`), so that neither their
order nor a rescale decides them.

Shapes: N neurons, E experts, S random sets, C domains.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moefy.data.corpus import Batch
from moefy.data.documents import Ints
from moefy.evaluation.statistics import Floats, ends, null_z, resamples
from moefy.inspection.causal.engine import AblationEngine

BINS, WIDTH = 4, 2.0
"""Bins of a layer at most, and the energy at the upper end of a bin over that at its lower end."""
TOLERANCE = 0.05
_SWAPS, _TRIED = 5000, 64
_LEAST = 1e-9
"""Energies below this share of the largest count as it: experts that add nothing."""


@torch.no_grad()
def energy_matrices(
    engine: AblationEngine,
    batches: Iterable[Batch],
    layers: list[int],
    weight_Q: Floats | None = None,
) -> dict[int, Floats]:
    """`E[change_i change_j] <d_i, d_j>` `[N, N]` of these layers in fp32, over all tokens, which weigh
    what their documents do: 4 N^2 bytes a layer, twice meanwhile."""
    total: dict[int, Any] = dict.fromkeys(layers, 0.0)
    weight, down = dict.fromkeys(layers, 0.0), {}
    for layer, change_TN, down_ND, document_T in engine.changes(batches, layers):
        weighted_TN, tokens = change_TN, float(len(change_TN))
        if weight_Q is not None:
            weight_T = torch.from_numpy(weight_Q).to(document_T.device)[document_T]
            weighted_TN, tokens = change_TN * weight_T[:, None].to(change_TN), float(weight_T.sum())
        total[layer] = total[layer] + weighted_TN.T @ change_TN
        weight[layer] += tokens
        down[layer] = down_ND
    for layer, down_ND in down.items():
        total[layer] /= weight[layer]
        for first in range(0, len(down_ND), 1024):
            total[layer][first : first + 1024] *= down_ND[first : first + 1024] @ down_ND.T
    return {layer: np.asarray(total_NN.float().cpu().numpy()) for layer, total_NN in total.items()}


def energies(energy_NN: Floats, sets: list[NDArray[np.int64]]) -> Floats:
    """Energy of every set of neurons."""
    return np.array([energy_NN[np.ix_(s, s)].sum(dtype=float) for s in sets])


@dataclass(frozen=True)
class RandomSets:
    """The random sets of one layer."""

    sets: list[Ints]
    bin_S: Ints
    """The bin of every set."""
    energy_S: Floats
    bin_E: Ints
    """The bin of every expert."""
    energy_E: Floats


def random_sets(
    engine: AblationEngine,
    energy_NN: Floats,
    layer: int,
    experts: list[Ints],
    count: int,
    seed: int,
) -> RandomSets:
    """`count` random sets for each bin of these experts, given as the numbers of their neurons."""
    energy_E = energies(energy_NN, experts)
    bin_E, model_S = matches(energy_E, count)
    order_N = engine.canonical_order(layer)
    ordered_NN = energy_NN[np.ix_(order_N, order_N)]
    random = np.random.default_rng([seed, 13, layer])
    sets = [
        np.sort(order_N[matched(ordered_NN, energy_E[e], len(experts[e]), random)]) for e in model_S
    ]
    return RandomSets(sets, bin_E[model_S], energies(energy_NN, sets), bin_E, energy_E)


def matches(energy_E: Floats, count: int) -> tuple[Ints, Ints]:
    """The bin of every expert, and the expert that each of `count` random sets a bin is matched to."""
    log_E = np.log(np.maximum(energy_E, 1e-300))
    below_E = (log_E.max() - log_E) / np.log(WIDTH)
    bin_E = np.unique(np.minimum(below_E.astype(np.int64), BINS - 1), return_inverse=True)[1]
    chosen = []
    for number in range(int(bin_E.max()) + 1):
        members = np.flatnonzero(bin_E == number)
        members = members[np.argsort(energy_E[members], kind="stable")]
        chosen.append(members[np.linspace(0, len(members) - 1, count).round().astype(np.int64)])
    return bin_E, np.concatenate(chosen)


def matched(
    energy_NN: Floats, target: float, size: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """A random set of `size` neurons whose energy is near the target, or as near as swaps come."""
    neurons = len(energy_NN)
    chosen = random.choice(neurons, size, replace=False)
    if size == neurons:
        return chosen
    inside_N = np.zeros(neurons, dtype=bool)
    inside_N[chosen] = True
    reach_N = energy_NN[:, chosen].sum(1, dtype=float)
    diagonal_N = energy_NN.diagonal().astype(float)
    total = float(reach_N[chosen].sum())
    for _ in range(_SWAPS):
        if abs(total - target) <= TOLERANCE * target:
            break
        place, into = random.integers(size, size=_TRIED), random.integers(neurons, size=_TRIED)
        place, into = place[~inside_N[into]], into[~inside_N[into]]
        if not len(into):
            continue
        out = chosen[place]
        change = diagonal_N[into] + diagonal_N[out] - 2 * energy_NN[into, out]
        change = change + 2 * (reach_N[into] - reach_N[out])
        best = int(np.argmin(np.abs(total + change - target)))
        if abs(total + change[best] - target) < abs(total - target):
            i, j = out[best], into[best]
            inside_N[[i, j]] = False, True
            chosen[place[best]] = j
            reach_N += energy_NN[:, j].astype(float) - energy_NN[:, i]
            total += float(change[best])
    return np.asarray(chosen)


def energy_slope(increase_S: Floats, energy_S: Floats) -> tuple[float, float]:
    """How the loss increase grows with energy, `increase ~ energy^s`: s between 0 and 1, and its standard error.

    The median of the slopes of log increase between all pairs of sets, weighted by how far their log
    energies lie apart (Jaeckel 1972; Sievers 1978): what a few sets do does not move it. A set that
    raises no loss counts as less than any other: the slope to it has no end, which a median bears.
    The error is half of what the middle 68 % of the resamples of sets span: NaN where that has no end,
    since too many sets raise no loss. Without two sets to compare s is 1, and the error NaN.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        x_S, y_S = np.log(energy_S), np.log(np.maximum(increase_S, 0.0))
        i, j = np.triu_indices(len(x_S), 1)
        wide, slope = np.abs(x_S[i] - x_S[j]), (y_S[i] - y_S[j]) / (x_S[i] - x_S[j])
    known = np.isfinite(wide) & (wide > 0) & ~np.isnan(slope)
    if not known.any():
        return 1.0, np.nan
    i, j, wide, slope = (v[known] for v in (i, j, wide, slope))
    order = np.argsort(slope, kind="stable")
    i, j, wide, slope = (v[order] for v in (i, j, wide, slope))

    def median(times_S: Floats) -> float:
        reached_P = (wide * times_S[i] * times_S[j]).cumsum()
        return float(slope[np.searchsorted(reached_P, reached_P[-1] / 2).clip(max=len(slope) - 1)])

    estimate = median(np.ones(len(x_S)))
    drawn_R = np.array([median(times_S) for times_S in resamples(len(x_S), 16)])
    with np.errstate(invalid="ignore"):
        low, high = ends(estimate, drawn_R, level=0.68)
        error = float((high - low) / 2)
    return min(max(estimate, 0.0), 1.0), error if np.isfinite(error) else np.nan


@dataclass(frozen=True)
class AgainstNull:
    """How experts stand among the random sets of their bins `[E, C]`."""

    z_EC: Floats
    percentile_EC: Floats
    null_z_SC: Floats
    """Every random set against the others of its bin: what z is where there is nothing to find."""
    slope: tuple[float, float]
    """How the loss increase grows with energy, and the standard error of that."""


def against_null(increase_EC: Floats, null_SC: Floats, sets: RandomSets) -> AgainstNull:
    """`z = (M - mean of the random sets) / their standard deviation`, and the share of them below,
    the sets of a bin corrected to the energy of what they are compared with."""
    z_EC, percentile_EC = np.full(increase_EC.shape, np.nan), np.full(increase_EC.shape, np.nan)
    null_z_SC = np.full(null_SC.shape, np.nan)
    slope = energy_slope(null_SC.mean(1), sets.energy_S)
    least = max(_LEAST * float(sets.energy_S.max()), 1e-300)
    energy_S, energy_E = (np.maximum(v, least) for v in (sets.energy_S, sets.energy_E))

    def corrected(at_S: Ints, energy: float) -> Floats:
        return np.asarray(null_SC[at_S] * ((energy / energy_S[at_S]) ** slope[0])[:, None])

    for e, (number, energy) in enumerate(zip(sets.bin_E, energy_E, strict=True)):
        null = corrected(np.flatnonzero(sets.bin_S == number), energy)
        z_EC[e] = null_z(increase_EC[e], null)
        percentile_EC[e] = 50 * ((null < increase_EC[e]).mean(0) + (null <= increase_EC[e]).mean(0))
    for s, (number, energy) in enumerate(zip(sets.bin_S, energy_S, strict=True)):
        others = np.flatnonzero((sets.bin_S == number) & (np.arange(len(null_SC)) != s))
        null_z_SC[s] = null_z(null_SC[s], corrected(others, energy))
    return AgainstNull(z_EC, percentile_EC, null_z_SC, slope)
