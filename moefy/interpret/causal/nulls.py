"""Random sets of neurons to compare experts with: of the same size and of the same energy.

The energy of a set is that of what its replacement takes away, `E ||sum_{j in S} (c_j - v_j) d_j||^2`:
a big expert does more damage than a small one whatever it does. Experts of a layer are sorted by energy
into bins of about `BIN` experts, and each bin has its own random sets. Each set is matched to one of the
bin's experts, in turn, to within `TOLERANCE`: neurons are drawn at random, then swapped for others
until the energy fits.

All draws are made in the canonical order of neurons (`moefy.partition.canonical`), so that neither their
order nor a rescale decides them.

Shapes: N neurons, E experts, S random sets, C domains.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moefy.interpret.causal.ablation import Engine
from moefy.interpret.causal.texts import Texts
from moefy.interpret.statistics import Floats, null_z
from moefy.interpret.tokens import Ints
from moefy.mlp import DenseMlp
from moefy.partition.canonical import canonical_order

BIN = 10
"""Experts of a bin, about."""
TOLERANCE = 0.05
_SWAPS, _TRIED = 5000, 64


@torch.no_grad()
def energy_matrix(engine: Engine, texts: Texts, layer: int) -> Floats:
    """`E[change_i change_j] <d_i, d_j>` `[N, N]` in fp32, over all tokens: 4 N^2 bytes, twice meanwhile."""
    total: Any = 0.0
    tokens = 0
    down_ND = None
    for batch in texts.batches:
        base = engine.base(batch)
        change_TN, down_ND = base.change(layer)
        mask = batch.mask()
        assert mask is not None
        change_TN = change_TN[mask.flatten().to(change_TN.device)]
        total = total + change_TN.T @ change_TN
        tokens += len(change_TN)
    assert down_ND is not None
    total /= tokens
    for first in range(0, len(down_ND), 1024):
        total[first : first + 1024] *= down_ND[first : first + 1024] @ down_ND.T
    return np.asarray(total.float().cpu().numpy())


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
    """The bin of every expert that was given."""
    energy_E: Floats


def random_sets(
    engine: Engine, energy_NN: Floats, layer: int, experts: list[Ints], count: int, seed: int
) -> RandomSets:
    """`count` random sets for each bin of these experts, given as the numbers of their neurons."""
    energy_E = energies(energy_NN, experts)
    bins = max(1, round(len(experts) / BIN))
    bin_E = np.empty(len(experts), dtype=np.int64)
    bin_E[np.argsort(energy_E, kind="stable")] = np.arange(len(experts)) * bins // len(experts)
    order_N = canonical_order(on_cpu(engine.modules[layer].weights)).numpy()
    ordered_NN = energy_NN[np.ix_(order_N, order_N)]
    random = np.random.default_rng([seed, 13, layer])
    sets, bin_S = [], []
    for number in range(bins):
        members = np.flatnonzero(bin_E == number)
        members = members[np.argsort(energy_E[members], kind="stable")]
        for turn in range(count):
            expert = members[turn % len(members)]
            size = len(experts[expert])
            sets.append(np.sort(order_N[matched(ordered_NN, energy_E[expert], size, random)]))
            bin_S.append(number)
    return RandomSets(sets, np.array(bin_S), energies(energy_NN, sets), bin_E, energy_E)


def on_cpu(mlp: DenseMlp) -> DenseMlp:
    """The same MLP in main memory."""
    held: dict[str, Any] = {
        name: v.detach().cpu() for name, v in vars(mlp).items() if isinstance(v, Tensor)
    }
    return replace(mlp, **held)


def matched(
    energy_NN: Floats, target: float, size: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """A random set of so many neurons whose energy is near the target, or as near as swaps come."""
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


@dataclass(frozen=True)
class AgainstNull:
    """How experts stand among the random sets of their bins `[E, C]`."""

    z_EC: Floats
    percentile_EC: Floats
    null_z_SC: Floats
    """Every random set against the others of its bin: what z is where there is nothing to find."""


def against_null(damage_EC: Floats, null_SC: Floats, sets: RandomSets) -> AgainstNull:
    """`z = (M - mean of the random sets) / their standard deviation`, and the share of them below."""
    z_EC, percentile_EC = np.full(damage_EC.shape, np.nan), np.full(damage_EC.shape, np.nan)
    null_z_SC = np.full(null_SC.shape, np.nan)
    for number in range(int(sets.bin_S.max()) + 1):
        here_E, here_S = sets.bin_E == number, np.flatnonzero(sets.bin_S == number)
        null = null_SC[here_S]
        z_EC[here_E] = null_z(damage_EC[here_E], null[:, None])
        below = (null[:, None] < damage_EC[here_E]).mean(0)
        same = (null[:, None] == damage_EC[here_E]).mean(0)
        percentile_EC[here_E] = 100 * (below + same / 2)
        for place, s in enumerate(here_S):
            null_z_SC[s] = null_z(null_SC[s], np.delete(null, place, axis=0))
    return AgainstNull(z_EC, percentile_EC, null_z_SC)
