"""The directions in which an expert writes: right-singular vectors of its contributions.

From the second moment `[F, F]` of its activations over the tokens that were routed to it: with the rows
`d_j` of the expert as `D_e [F, D]` and `M = sum_t h h^T`, the contributions have the Gram matrix
`D_e^T M D_e`, whose eigenvectors are found in the span of `D_e`. The contributions themselves
`[T, E, D]` are never formed. The moment is not centred: an expert that always writes one vector has
one direction of share 1.

First tokens are left out: in many models their norms would decide everything.

Shapes: T tokens, D width, N neurons, E experts, F neurons per expert, K directions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moefy.experts.sparse_mlp import SparseMlp
from moefy.inspection.account.ledger import Ledger, bare
from moefy.inspection.texts.table import Table, joined, table

DIRECTIONS = 3


@dataclass(frozen=True)
class Directions:
    """The first K directions of every expert of a layer, by falling share."""

    axis_EKD: Tensor
    """Unit vectors, each turned so that the mean contribution lies on its positive side."""
    share_EK: Tensor
    """Share of the energy of the expert's contributions."""
    size_EK: Tensor
    """Root mean square of the contributions along the direction."""
    dimension_E: Tensor
    """Participation ratio of all directions: 1 for a single one, F for F of the same energy."""


class Spectrum:
    """Listens to ledgers; memory is `8 L (N F + N + E)` bytes."""

    def __init__(self) -> None:
        self.modules: dict[int, SparseMlp] = {}
        self.moment: dict[int, Tensor] = {}
        self.mean: dict[int, Tensor] = {}
        self.tokens: dict[int, Tensor] = {}

    def add(self, ledger: Ledger) -> None:
        """Take in one layer and a chunk of tokens."""
        layer, experts = ledger.layer, ledger.experts
        size = ledger.mlp.neurons // experts
        if layer not in self.modules:
            self.modules[layer] = ledger.module
            self.moment[layer] = torch.zeros(experts, size, size, dtype=torch.float64)
            self.mean[layer] = torch.zeros(experts, size, dtype=torch.float64)
            self.tokens[layer] = torch.zeros(experts, dtype=torch.float64)
        later_T = torch.from_numpy(ledger.tokens.position_T > 0).to(ledger.x_TD.device)
        on_TE = (ledger.mask_TE & later_T[:, None]).float()
        h_TEF = ledger.h_TN.view(len(on_TE), experts, size) * on_TE[:, :, None]
        h_ETF = h_TEF.transpose(0, 1)
        self.moment[layer] += (h_ETF.mT @ h_ETF).cpu()
        self.mean[layer] += h_TEF.sum(0).cpu()
        self.tokens[layer] += on_TE.sum(0).cpu()

    def part(self, layer: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """What was heard of a layer: what `merge` takes."""
        if layer not in self.modules:
            return None
        return self.moment[layer], self.mean[layer], self.tokens[layer]

    def merge(self, layer: int, part: tuple[Tensor, Tensor, Tensor]) -> None:
        """Take in what was heard of other documents."""
        for own, other in zip((self.moment, self.mean, self.tokens), part, strict=True):
            own[layer] += other

    @torch.no_grad()
    def directions(self, layer: int, count: int = DIRECTIONS) -> Directions:
        """The first directions of every expert, at most F of them; zeros where none was routed."""
        moment_EFF = self.moment[layer]
        experts, size = moment_EFF.shape[:2]
        tokens_E = self.tokens[layer].clamp_min(1)
        down_EFD = bare(self.modules[layer]).down_ND.cpu().double().view(experts, size, -1)
        basis_EDF, triangle_EFF = torch.linalg.qr(down_EFD.mT)
        gram = triangle_EFF @ (moment_EFF / tokens_E[:, None, None]) @ triangle_EFF.mT
        power_EF, vector_EFF = torch.linalg.eigh((gram + gram.mT) / 2)
        power_EF, vector_EFF = power_EF.clamp_min(0).flip(1), vector_EFF.flip(2)
        axis_EKD = (basis_EDF @ vector_EFF[:, :, :count]).mT
        mean_ED = (self.mean[layer][:, None] @ down_EFD)[:, 0]
        along_EK = (axis_EKD @ mean_ED[:, :, None])[:, :, 0]
        axis_EKD = axis_EKD * torch.where(along_EK < 0, -1.0, 1.0)[:, :, None]
        total_E1 = power_EF.sum(1, keepdim=True)
        share_EF = power_EF / total_E1.clamp_min(1e-300)
        return Directions(
            axis_EKD.float(),
            share_EF[:, :count],
            power_EF[:, :count].sqrt(),
            total_E1[:, 0].square() / power_EF.square().sum(1).clamp_min(1e-300),
        )

    def tables(self) -> dict[str, Table]:
        """Columns of `experts`: the share of each of the first directions, and how many there are."""
        return {"experts": joined(self._experts(layer) for layer in sorted(self.modules))}

    def _experts(self, layer: int) -> Table:
        found, tokens_E = self.directions(layer), self.tokens[layer].numpy()
        count = len(tokens_E)
        columns: dict[str, Any] = {"layer": [layer] * count, "expert": list(range(count))}
        for index in range(DIRECTIONS):
            share = np.zeros(count)
            if index < found.share_EK.shape[1]:
                share = found.share_EK[:, index].numpy()
            columns[f"direction_{index + 1}_share"] = np.where(tokens_E > 0, share, np.nan)
        dimension = np.where(tokens_E > 0, found.dimension_E.numpy(), np.nan)
        return table(columns | {"dimension": dimension})
