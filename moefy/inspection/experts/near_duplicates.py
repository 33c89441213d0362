"""Neurons that are alike: within an expert, within a layer, and copies of each other in other layers.

A neuron is its rows of all matrices, each of unit length in the gauge of `interpretability` (an output of
length 1, and for gated neurons cos(gate, up) >= 0), side by side: the cosine of two neurons is the mean of
the cosines of their rows. Input biases count as one more input. Nothing depends on scale, sign or order.

Whether an expert's neurons are more alike than those of a random set of as many is told exactly: mean and
variance of the mean over pairs of a random set follow from three sums over all pairs of the layer.

Shapes: N neurons, E experts, F neurons per expert, P features, K kept.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from moefy.evaluation.statistics import Floats
from moefy.experts.sparse_mlp import SparseMlp
from moefy.inspection.account import bare
from moefy.inspection.part import PassPart, State
from moefy.inspection.record import Table, joined, of_experts, table
from moefy.models.mlp import DenseMlp

KEPT = 50
"""Pairs of a layer, and of every pair of layers, that the table holds."""
DUPLICATE = 0.9
WORK = 2e13
"""Multiplications between layers: those further apart are not compared where all would take more."""
_ROWS = 1024

Strongest = tuple[Tensor, Tensor, Tensor]
"""Values, rows and columns, by falling value."""


@dataclass(frozen=True)
class _Within:
    """One layer beside itself."""

    mean_E: Floats
    """Mean |cos| of the pairs of neurons of an expert."""
    z_E: Floats
    nearest_same: float
    """Share of neurons whose nearest neighbour is in their own expert."""
    duplicates: int
    pairs: Strongest


@torch.no_grad()
def neuron_rows(mlp: DenseMlp) -> Tensor:
    """Features `[N, P]` of unit length in the fixed gauge, in fp32."""

    def unit(weight_ND: Tensor, bias_N: Tensor | None) -> Tensor:
        rows_ND = weight_ND.float()
        if bias_N is not None:
            rows_ND = torch.cat([rows_ND, bias_N.float()[:, None]], dim=1)
        unit_ND: Tensor = normalize(rows_ND, dim=1)
        return unit_ND

    down_ND, up_ND = unit(mlp.down_ND, None), unit(mlp.up_ND, mlp.up_bias_N)
    parts = [up_ND, down_ND]
    if mlp.gate_ND is not None:
        width = mlp.width
        gate_ND = unit(mlp.gate_ND, mlp.gate_bias_N)
        along_N = (gate_ND[:, :width] * up_ND[:, :width]).sum(1, keepdim=True)
        sign_N1 = torch.where(along_N < 0, -1.0, 1.0)
        parts = [up_ND * sign_N1, down_ND * sign_N1, gate_ND]
    rows_NP: Tensor = torch.cat(parts, dim=1) / len(parts) ** 0.5
    return rows_NP


class NearDuplicates(PassPart[State]):
    """Of the weights alone: it hears nothing."""

    def tables(self) -> dict[str, Table]:
        """What `neuron_families` finds."""
        return neuron_families(self.work.modules)


@torch.no_grad()
def neuron_families(modules: dict[int, SparseMlp]) -> dict[str, Table]:
    """`families`, and columns of `experts` and `layers`; memory is `4 L N P` bytes and `4 K N` of a block.

    Layers whose neurons have other features (another width) are compared only with layers like them.
    """
    rows = {layer: neuron_rows(bare(module)) for layer, module in modules.items()}
    experts = {layer: module.experts for layer, module in modules.items()}
    reach = _reach(rows)
    families, of_all, layers = [], [], []
    for layer, rows_NP in rows.items():
        found = _within(rows_NP, experts[layer])
        families.append(_pairs(layer, layer, found.pairs, rows, experts))
        columns = {"within_cosine": found.mean_E, "within_cosine_z": found.z_E}
        of_all.append(of_experts(layer, columns))
        across = 0
        for other in range(layer + 1, layer + reach + 1):
            if other in rows and rows[other].shape[1] == rows_NP.shape[1]:
                pairs, copies = _between(rows_NP, rows[other])
                families.append(_pairs(layer, other, pairs, rows, experts))
                across += copies
        layers.append(_summary(layer, found, len(rows_NP), experts[layer], across, reach))
    return {"families": joined(families), "experts": joined(of_all), "layers": joined(layers)}


def _summary(
    layer: int, found: _Within, neurons: int, experts: int, across: int, reach: int
) -> Table:
    return table(
        {
            "layer": [layer],
            "nearest_same_expert": np.array([found.nearest_same]),
            "nearest_same_chance": np.array([(neurons / experts - 1) / max(1, neurons - 1)]),
            "duplicate_neurons": [found.duplicates],
            "duplicates_in_later_layers": [across],
            "layers_compared": [reach],
        }
    )


def _reach(rows: dict[int, Tensor]) -> int:
    """How many layers further on a layer is compared with: all, or what `WORK` allows, at least one."""
    most = max(rows_NP.shape[0] ** 2 * rows_NP.shape[1] for rows_NP in rows.values())
    return min(len(rows) - 1, max(1, int(WORK / (most * len(rows))))) if len(rows) > 1 else 0


def _within(rows_NP: Tensor, experts: int) -> _Within:
    neurons = len(rows_NP)
    size = neurons // experts
    owner_N = torch.arange(neurons, device=rows_NP.device) // size
    sum_N = torch.zeros(neurons, dtype=torch.float64, device=rows_NP.device)
    square_N, inside_N = torch.zeros_like(sum_N), torch.zeros_like(sum_N)
    same = duplicates = 0
    best = _Strongest()
    for first in range(0, neurons, _ROWS):
        at_R = torch.arange(first, min(first + _ROWS, neurons), device=rows_NP.device)
        cosine_RN = (rows_NP[at_R] @ rows_NP.T).abs_()
        cosine_RN[torch.arange(len(at_R)), at_R] = 0
        own_RN = owner_N[at_R][:, None] == owner_N
        sum_N[at_R] = cosine_RN.sum(1, dtype=torch.float64)
        square_N[at_R] = cosine_RN.square().sum(1, dtype=torch.float64)
        inside_N[at_R] = (cosine_RN * own_RN).sum(1, dtype=torch.float64)
        same += int((owner_N[cosine_RN.argmax(1)] == owner_N[at_R]).sum()) if neurons > 1 else 0
        later_RN = torch.where(
            torch.arange(neurons, device=rows_NP.device) > at_R[:, None], cosine_RN, 0
        )
        duplicates += int((later_RN > DUPLICATE).sum())
        best.add(later_RN, first)
    mean_E, z_E = _against_random(
        sum_N.cpu().numpy(), square_N.cpu().numpy(), inside_N.cpu(), experts
    )
    return _Within(mean_E, z_E, same / neurons, duplicates, best.pairs())


def _against_random(
    sum_N: Floats, square_N: Floats, inside_N: Tensor, experts: int
) -> tuple[Floats, Floats]:
    """Mean |cos| within every expert, and its z among random sets of as many neurons.

    For a random set A of F of N, the sum Z over its pairs has E Z = p2 S and
    E Z^2 = p2 Q + p3 (sum_i R_i^2 - 2 Q) + p4 (S^2 - Q - (sum_i R_i^2 - 2 Q)), with S and Q the sums of s
    and s^2 over pairs, R_i the sum of row i and p_k the chance that k given neurons are in A.
    """
    neurons = len(sum_N)
    size = neurons // experts
    pairs = size * (size - 1) / 2
    if pairs == 0:
        return np.full(experts, np.nan), np.full(experts, np.nan)
    within_E = inside_N.view(experts, size).sum(1).numpy() / 2
    total, squares = sum_N.sum() / 2, square_N.sum() / 2
    touching = (sum_N**2).sum() - 2 * squares
    p2, p3, p4 = (
        float(np.prod([(size - i) / max(neurons - i, 1) for i in range(k)])) for k in (2, 3, 4)
    )
    mean = p2 * total
    variance = p2 * squares + p3 * touching + p4 * (total**2 - squares - touching) - mean**2
    with np.errstate(invalid="ignore", divide="ignore"):
        # Rounding leaves a trace where the only set is the whole layer.
        spread = np.sqrt(variance) if variance > 1e-9 * mean**2 else np.nan
        return within_E / pairs, (within_E - mean) / spread


def _between(rows_NP: Tensor, other_NP: Tensor) -> tuple[Strongest, int]:
    """The strongest pairs of two layers, and how many are duplicates."""
    best, duplicates = _Strongest(), 0
    for first in range(0, len(rows_NP), _ROWS):
        cosine_RN = (rows_NP[first : first + _ROWS] @ other_NP.T.to(rows_NP.device)).abs_()
        duplicates += int((cosine_RN > DUPLICATE).sum())
        best.add(cosine_RN, first)
    return best.pairs(), duplicates


class _Strongest:
    """The K largest entries of a matrix that comes in blocks of rows."""

    def __init__(self) -> None:
        self.value = torch.zeros(0)
        self.row, self.column = (torch.zeros(0, dtype=torch.long) for _ in range(2))

    def add(self, values_RN: Tensor, first: int) -> None:
        flat = values_RN.flatten()
        value, at = flat.topk(min(KEPT, len(flat)))
        value, at = value.cpu(), at.cpu()
        row, column = at // values_RN.shape[1] + first, at % values_RN.shape[1]
        value = torch.cat([self.value, value])
        order = value.argsort(descending=True, stable=True)[:KEPT]
        self.value = value[order]
        self.row = torch.cat([self.row, row])[order]
        self.column = torch.cat([self.column, column])[order]

    def pairs(self) -> Strongest:
        """Values, rows and columns, by falling value; entries of zero are none."""
        there = self.value > 0
        return self.value[there], self.row[there], self.column[there]


def _pairs(
    layer: int,
    other: int,
    pairs: Strongest,
    rows: dict[int, Tensor],
    experts: Any,
) -> Table:
    value, neuron, neighbour = (part.numpy() for part in pairs)
    expert = neuron // (len(rows[layer]) // experts[layer])
    other_expert = neighbour // (len(rows[other]) // experts[other])
    same = [bool(s) for s in expert == other_expert] if layer == other else [None] * len(value)
    return table(
        {
            "layer": [layer] * len(value),
            "expert": expert,
            "neuron": neuron,
            "neighbour_layer": [other] * len(value),
            "neighbour_expert": other_expert,
            "neighbour": neighbour,
            "cosine": value,
            "same_expert": same,
        }
    )
