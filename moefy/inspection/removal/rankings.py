"""In which order units go. A ranking is one row of `RANKINGS`: from importance to a score.

Importance is that of contributions: `I = E ||y_e||^2` for an expert, `E (h_j ||d_j||)^2` for a neuron.
Domains are averaged, each counting alike.

Shapes: T tokens, N neurons of a layer, E units of a layer, S units of all layers, Q documents.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moefy.inspection.causal.documents import Texts
from moefy.inspection.causal.engine import Engine
from moefy.inspection.removal.parts import Part
from moefy.inspection.removal.source import NEURON, units_of
from moefy.methods.tables import expert_norms
from moefy.run.console import Reporter

ALPHA = 0.01
"""What is added to both sides, as a share of the layer's mean importance."""


@torch.no_grad()
def importance(
    engine: Engine, texts: Texts, unit: str, report: Reporter, what: str
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
    engine: Engine, part: Part, unit: str, report: Reporter, ranking: str = "relative"
) -> Tensor:
    """Numbers of the units `[S]`, which count over all layers, those to go first in front."""
    forget = importance(engine, part.forget, unit, report, "rank: to forget")
    retain = importance(engine, part.retain, unit, report, "rank: to retain")
    return RANKINGS[ranking](forget, retain).argsort(descending=True, stable=True)
