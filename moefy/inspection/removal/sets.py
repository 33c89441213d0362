"""Which neurons are taken out: the units of a ranking, and sets of neurons to hold a removal against.

A ranking is a row of `RANKINGS`, from importance to a score. Importance is that of contributions:
`I = E ||y_e||^2` for an expert, `E (h_j ||d_j||)^2` for a neuron. A control is a row of `CONTROLS`. Energy is
`E ||sum_j h_j d_j||^2`: what a set costs by its size alone. Domains are averaged, each counting alike.

Shapes: T tokens, N neurons of a layer, E units of a layer, S units of all layers, Q documents.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moefy.evaluation.statistics import Floats
from moefy.inspection.causal.documents import Texts, together
from moefy.inspection.causal.engine import AblationEngine, Neurons
from moefy.inspection.causal.nulls import TOLERANCE, energies, energy_matrices, matched
from moefy.inspection.removal import EXPERT, NEURON, neurons_of_units, units_of
from moefy.inspection.removal.parts import Part
from moefy.methods.routers.baselines import expert_norms
from moefy.run.console import Reporter

ALPHA = 0.01
"""What is added to both sides, as a share of the layer's mean importance."""


@torch.no_grad()
def importance(
    engine: AblationEngine, texts: Texts, unit: str, report: Reporter, what: str
) -> list[Tensor]:
    """Importance `[E]` of the units of every layer to the domains of these texts."""
    counts = units_of(engine, unit)
    sums = {layer: torch.zeros(count, dtype=torch.float64) for layer, count in counts.items()}
    weight_Q = torch.from_numpy(texts.even_Q(texts.places_Q))
    batches = report.track(texts.batches, what)
    for layer, h_TN, down_ND, document_T in engine.changes(batches, counts):
        if unit == NEURON:
            square_TE = h_TN.square() * down_ND.square().sum(1)
        else:
            square_TE = expert_norms(h_TN, down_ND, counts[layer]).square()
        sums[layer] += weight_Q[document_T.cpu()] @ square_TE.double().cpu()
    return list(sums.values())


def relative(forget: list[Tensor], retain: list[Tensor]) -> Tensor:
    """`log((I_forget + alpha) / (I_retain + alpha))` `[S]`, alpha 1 % of the layer's mean importance.

    Selective pruning (Pochinkov and Schoots 2024, 2403.01267), whose absolute constant changes with the
    scale of a neuron; this one does not.
    """
    scores = []
    for forget_E, retain_E in zip(forget, retain, strict=True):
        alpha = ALPHA * float((forget_E + retain_E).mean()) / 2
        # A layer that adds nothing ranks in the middle.
        alpha = alpha or 1.0
        scores.append(((forget_E + alpha) / (retain_E + alpha)).log())
    return torch.cat(scores)


RANKINGS: dict[str, Callable[[list[Tensor], list[Tensor]], Tensor]] = {"relative": relative}
"""The score of every unit from its importance to the domain to forget and to those to retain, layer by
layer: the higher, the more it is of the domain to forget."""


def ranked(
    engine: AblationEngine, part: Part, unit: str, report: Reporter, ranking: str = "relative"
) -> Tensor:
    """Numbers of the units `[S]`, which count over all layers, those to go first in front."""
    forget = importance(engine, part.forget, unit, report, "rank: to forget")
    retain = importance(engine, part.retain, unit, report, "rank: to retain")
    return RANKINGS[ranking](forget, retain).argsort(descending=True, stable=True)


DRAWS = 5
_BYTES = 2**31
"""Most memory that the energies of some layers take together."""


@dataclass(frozen=True)
class Removal:
    """The removal that controls stand beside."""

    engine: AblationEngine
    unit: str
    count: int
    removed: Neurons
    part: Part
    """What it was ranked on."""
    seed: int
    report: Reporter

    @property
    def size(self) -> int:
        """How many neurons went."""
        return sum(int(chosen_N.sum()) for chosen_N in self.removed.values())


@dataclass(frozen=True)
class Drawn:
    """The sets of one control."""

    sets: list[Neurons] = field(default_factory=list)
    ratio: list[float] = field(default_factory=list)
    """Energy of every set over that of the removal, in the layer where it is furthest off."""

    @property
    def close(self) -> bool:
        """Whether all of them came as near as they should."""
        return all(abs(ratio - 1) <= TOLERANCE for ratio in self.ratio)


def random_units(removal: Removal) -> Drawn:
    """As many units, drawn at random from all layers."""
    engine, unit = removal.engine, removal.unit
    total = sum(units_of(engine, unit).values())
    sets = []
    for draw in range(DRAWS):
        random = np.random.default_rng([removal.seed, 21, draw])
        chosen = random.choice(total, removal.count, replace=False)
        sets.append(neurons_of_units(engine, unit, torch.from_numpy(chosen)))
    return Drawn(sets)


def single_neurons(removal: Removal) -> Drawn:
    """As many single neurons, ranked as the experts were; none beside a removal of neurons."""
    if removal.unit != EXPERT:
        return Drawn()
    order = ranked(removal.engine, removal.part, NEURON, removal.report)
    return Drawn([neurons_of_units(removal.engine, NEURON, order[: removal.size])])


def energy_matched(removal: Removal) -> Drawn:
    """Random neurons, layer by layer as many as are removed and of their energy to within 5 %."""
    engine, layers = removal.engine, sorted(removal.removed)
    both = together(removal.part.forget, removal.part.retain)
    weight_Q = both.even_Q(both.places_Q)
    sets: list[dict[int, Tensor]] = [{} for _ in range(DRAWS)]
    ratio = [1.0] * DRAWS
    largest = max(len(chosen_N) for chosen_N in removal.removed.values())
    at_once = max(1, _BYTES // (4 * largest**2))
    for first in range(0, len(layers), at_once):
        group = layers[first : first + at_once]
        batches = removal.report.track(both.batches, f"energy of {len(group)} layers")
        for layer, energy_NN in energy_matrices(engine, batches, group, weight_Q).items():
            for draw, (chosen_N, got) in enumerate(_matched(removal, layer, energy_NN)):
                sets[draw][layer] = chosen_N
                ratio[draw] = max(ratio[draw], got, key=lambda value: abs(value - 1))
    return Drawn(list(sets), ratio)


def _matched(removal: Removal, layer: int, energy_NN: Floats) -> list[tuple[Tensor, float]]:
    """The draws of one layer, and the energy of each over that of what is removed there."""
    # In an order that neither a permutation nor a rescale changes, so that neither decides.
    order_N = removal.engine.canonical_order(layer)
    ordered_NN = energy_NN[np.ix_(order_N, order_N)]
    inside = np.flatnonzero(removal.removed[layer].numpy()[order_N])
    target = float(energies(ordered_NN, [inside])[0])
    drawn = []
    for draw in range(DRAWS):
        random = np.random.default_rng([removal.seed, 22, layer, draw])
        chosen = matched(ordered_NN, target, len(inside), random)
        chosen_N = torch.zeros(len(order_N), dtype=torch.bool)
        chosen_N[torch.from_numpy(order_N[chosen])] = True
        drawn.append((chosen_N, float(energies(ordered_NN, [chosen])[0]) / max(target, 1e-30)))
    return drawn


@dataclass(frozen=True)
class Control:
    """One row."""

    words: str
    draw: Callable[[Removal], Drawn]


ENERGY = "energy"
CONTROLS = {
    "experts": Control("random {unit}s, as many", random_units),
    "neurons": Control("single neurons, as many, ranked alike", single_neurons),
    ENERGY: Control("random neurons, same number and energy", energy_matched),
}


def random_neurons(engine: AblationEngine, count: int, seed: int) -> Neurons:
    """The first `count` neurons of one random order of all: more hold fewer within them."""
    total = sum(units_of(engine, NEURON).values())
    chosen = np.random.default_rng([seed, 23]).permutation(total)[:count]
    return neurons_of_units(engine, NEURON, torch.from_numpy(chosen))
