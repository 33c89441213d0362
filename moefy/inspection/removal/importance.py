"""How much every unit matters to a domain, and what energy a set of neurons has.

Importance is that of contributions: `I = E ||y_e||^2` for an expert, `E (h_j ||d_j||)^2` for a neuron.
Units are ranked by what they do for the domain to forget over what they do for the others,

    log((I_forget + alpha) / (I_retain + alpha)),    alpha = 1 % of the layer's mean importance

(selective pruning, Pochinkov and Schoots 2024, 2403.01267, whose absolute constant changes with the scale
of a neuron; this one does not). Domains to retain are averaged, each counting alike.

Shapes: T tokens, N neurons of a layer, E units of a layer, C domains.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from moefy.data.corpus import Batch
from moefy.experts.passes import listen, walk
from moefy.inspection.causal.documents import Texts
from moefy.inspection.removal.removable import NEURON, Removable
from moefy.inspection.removal.shards import Part
from moefy.methods.tables import expert_norms
from moefy.models.locate import Place
from moefy.run.console import Reporter

ALPHA = 0.01
"""What is added to both sides, as a share of the layer's mean importance."""
_BYTES = 2**31
"""Most memory that the second moments of some layers take together."""


def importance(
    removable: Removable, part: Part, unit: str, report: Reporter
) -> tuple[list[Tensor], list[Tensor]]:
    """Importance `[E]` of the units of every layer to the domain to forget and to those to retain."""
    found = []
    for texts, what in ((part.forget, "rank: to forget"), (part.retain, "rank: to retain")):
        domains = len(texts.documents.domains)
        sums = [
            torch.zeros(domains, len(units), dtype=torch.float64) for units in removable.units(unit)
        ]

        def heard(layer: int, x_TD: Tensor, weight_TC: Tensor, sums: list[Tensor] = sums) -> None:
            sums[layer] += (weight_TC.T @ _squares(removable, layer, unit, x_TD).double()).cpu()

        _listen(removable, texts, heard, report, what)
        found.append([sum_CE.mean(0) for sum_CE in sums])
    return found[0], found[1]


def _squares(removable: Removable, layer: int, unit: str, x_TD: Tensor) -> Tensor:
    """`||y_e||^2` of every unit and token `[T, E]`."""
    mlp = removable.mlps[layer]
    h_TN = mlp.hidden(x_TD)
    if unit == NEURON:
        return h_TN.square() * mlp.down_ND.square().sum(1)
    units_EF = removable.units(unit)[layer].to(h_TN.device)
    order_N = units_EF.flatten()
    return expert_norms(h_TN[:, order_N], mlp.down_ND[order_N], len(units_EF)).square()


def relative(forget: list[Tensor], retain: list[Tensor]) -> Tensor:
    """The score of every unit, layer by layer: the higher, the more it is of the domain to forget."""
    found = []
    for forget_E, retain_E in zip(forget, retain, strict=True):
        alpha = ALPHA * float((forget_E + retain_E).mean()) / 2
        # A layer that adds nothing ranks in the middle.
        alpha = alpha or 1.0
        found.append(((forget_E + alpha) / (retain_E + alpha)).log())
    return torch.cat(found)


def ranked(score_S: Tensor) -> Tensor:
    """Numbers of the units, those to go first in front."""
    return score_S.argsort(descending=True, stable=True)


def energy_matrices(
    removable: Removable, part: Part, layers: list[int], report: Reporter
) -> dict[int, Tensor]:
    """`E[h_i h_j] <d_i, d_j>` `[N, N]` of these layers; the energy of a set is the sum over its block.

    The mean is over tokens of all domains, each domain counting alike.
    """
    found: dict[int, Tensor] = {}
    at_once = max(1, _BYTES // (4 * max(site.neurons for site in removable.sites) ** 2))
    for first in range(0, len(layers), at_once):
        group = layers[first : first + at_once]
        for texts in (part.forget, part.retain):
            domains = len(part.retain.documents.domains) + 1
            share = len(texts.documents.domains) / domains

            def heard(
                layer: int,
                x_TD: Tensor,
                weight_TC: Tensor,
                share: float = share,
                group: list[int] = group,
            ) -> None:
                if layer in group:
                    h_TN = removable.mlps[layer].hidden(x_TD)
                    weight_T1 = share * weight_TC.mean(1, keepdim=True).to(h_TN)
                    moment_NN = (h_TN * weight_T1).T @ h_TN
                    found[layer] = found[layer] + moment_NN if layer in found else moment_NN

            _listen(removable, texts, heard, report, f"energy of {len(group)} layers")
        for layer in group:
            down_ND = removable.mlps[layer].down_ND
            found[layer] = (found[layer] * (down_ND @ down_ND.T)).cpu()
    return found


@torch.no_grad()
def _listen(
    removable: Removable,
    texts: Texts,
    heard: Callable[[int, Tensor, Tensor], None],
    report: Reporter,
    what: str,
) -> None:
    """One pass; `heard` gets a layer, its inputs, and of every token its weight `[T, C]` in the mean of
    its domain."""
    domain_D, domains = texts.documents.domain_D, len(texts.documents.domains)
    lengths_D = np.concatenate([_places(batch).sum(1).numpy() for batch in texts.batches])
    tokens_C = np.bincount(domain_D, weights=lengths_D, minlength=domains)
    weight_DC = torch.from_numpy(np.eye(domains)[domain_D] / tokens_C)
    first = 0
    for batch in report.track(texts.batches, what):
        rows, width = _places(batch).shape
        keep_T = _places(batch).flatten()
        weight_TC = weight_DC[first : first + rows].repeat_interleave(width, dim=0)[keep_T]
        first += rows

        def hook(
            site: Place, x_TD: Tensor, keep_T: Tensor = keep_T, weight_TC: Tensor = weight_TC
        ) -> None:
            keep_T, weight_TC = keep_T.to(x_TD.device), weight_TC.to(x_TD.device)
            heard(site.index, x_TD[keep_T], weight_TC)

        handles = listen(removable.model, removable.sites, hook)
        try:
            walk(removable.model, batch)
        finally:
            for handle in handles:
                handle.remove()


def _places(batch: Batch) -> Tensor:
    mask_BT = batch.mask()
    assert mask_BT is not None
    return mask_BT
