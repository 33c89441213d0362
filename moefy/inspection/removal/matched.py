"""What removing something else does: sets of neurons to hold a removal against.

    experts   as many experts, drawn at random
    neurons   as many single neurons, ranked as the experts were
    energy    random neurons, in every layer as many as were removed there and of the same energy

Energy is `E ||sum_j h_j d_j||^2` over tokens of all domains: what damage a set does by its size alone.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moefy.inspection.causal.nulls import TOLERANCE, matched, on_cpu
from moefy.inspection.removal.importance import energy_matrices, importance, ranked, relative
from moefy.inspection.removal.removable import NEURON, Gone, Removable, gone_of
from moefy.inspection.removal.shards import Part
from moefy.methods.partition.canonical import canonical_order
from moefy.run.console import Reporter

DRAWS = 5


def random_experts(
    removable: Removable, unit: str, count: int, seed: int, draws: int = DRAWS
) -> list[list[Tensor]]:
    """As many units, drawn at random from all layers."""
    units = removable.units(unit)
    total = sum(map(len, units))
    found = []
    for draw in range(draws):
        chosen = np.random.default_rng([seed, 21, draw]).choice(total, count, replace=False)
        found.append(gone_of(units, torch.from_numpy(chosen), _neurons(removable)))
    return found


def single_neurons(removable: Removable, part: Part, count: int, report: Reporter) -> list[Tensor]:
    """The `count` single neurons that are most of the domain to forget."""
    order = ranked(relative(*importance(removable, part, NEURON, report)))
    return gone_of(removable.units(NEURON), order[:count], _neurons(removable))


@dataclass(frozen=True)
class Matched:
    """Random sets of the energy of a removal."""

    sets: list[list[Tensor]]
    ratio: list[float]
    """Energy of every set over that of the removal, in the layer where it is furthest off."""

    @property
    def close(self) -> bool:
        """Whether all of them came as near as they should."""
        return all(abs(ratio - 1) <= TOLERANCE for ratio in self.ratio)


def energy_matched(
    removable: Removable, part: Part, gone: Gone, seed: int, report: Reporter, draws: int = DRAWS
) -> Matched:
    """Random neurons, layer by layer as many as are removed and of their energy to within 5 %."""
    layers = [layer for layer, gone_N in enumerate(gone) if gone_N.any()]
    matrices = energy_matrices(removable, part, layers, report)
    sets = [removable.nothing() for _ in range(draws)]
    ratio = [1.0] * draws
    for layer in layers:
        # In an order that neither a permutation nor a rescale changes, so that neither decides.
        order_N = canonical_order(on_cpu(removable.mlps[layer])).numpy()
        energy_NN = matrices.pop(layer).numpy()[np.ix_(order_N, order_N)]
        inside = gone[layer].numpy()[order_N]
        target = float(energy_NN[np.ix_(inside, inside)].sum(dtype=float))
        for draw in range(draws):
            random = np.random.default_rng([seed, 22, layer, draw])
            chosen = matched(energy_NN, target, int(inside.sum()), random)
            sets[draw][layer][torch.from_numpy(order_N[chosen])] = True
            got = float(energy_NN[np.ix_(chosen, chosen)].sum(dtype=float)) / max(target, 1e-30)
            ratio[draw] = max(ratio[draw], got, key=lambda value: abs(value - 1))
    return Matched(sets, ratio)


def random_neurons(removable: Removable, count: int, seed: int) -> list[Tensor]:
    """The first `count` neurons of one random order of all: more hold fewer within them."""
    total = sum(_neurons(removable))
    chosen = np.random.default_rng([seed, 23]).permutation(total)[:count]
    return gone_of(removable.units(NEURON), torch.from_numpy(chosen), _neurons(removable))


def _neurons(removable: Removable) -> list[int]:
    return [site.neurons for site in removable.sites]
