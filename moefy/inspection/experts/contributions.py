"""How much every expert adds: norms, signed shares and energies, by expert, layer and domain.

    norm    c_e = ||y_e||
    share   s_e = <y_e, y> / ||y||^2, which sums to 1 over the experts of a token
    energy  ||y_e||^2

`y` is the dense output of the layer without its bias. First tokens (position 0) dwarf all others in
many models, so every mean comes with them and, as `..._later`, without.

Shapes: T tokens, E experts, G blocks of documents, C domains.
"""

from typing import Any

import numpy as np
import torch

from moefy.data.documents import Documents
from moefy.evaluation.statistics import Floats
from moefy.inspection.account.ledger import Ledger
from moefy.inspection.account.sums import Blocks, BlockSums
from moefy.inspection.texts.table import Table, joined, table

ERROR = -1
"""In the place of an expert: what the experts that did not run would have added."""
FIGURES = 6
"""Sums of each expert: norm, norm where it ran, share, share where it ran, energy, tokens run."""


class Contributions:
    """Listens to ledgers; memory is `16 L G (6 E + 4)` bytes, G at most about 512."""

    def __init__(self, documents: Documents) -> None:
        self.documents = documents
        self.blocks = Blocks(documents)
        self.experts: dict[int, int] = {}
        self.sums: dict[int, BlockSums] = {}
        self.share_error: dict[int, float] = {}

    def add(self, ledger: Ledger) -> None:
        """Take in one layer and a chunk of tokens."""
        layer, experts = ledger.layer, ledger.experts
        if layer not in self.sums:
            self.experts[layer] = experts
            self.sums[layer] = BlockSums(self.blocks, FIGURES * experts + 4)
            self.share_error[layer] = 0.0
        norm_TE, share_TE, ran_TE = ledger.norm_TE, ledger.share_TE, ledger.mask_TE.float()
        energy_TE = norm_TE.square()
        layer_T4 = torch.stack(
            [
                ledger.y_TD.square().sum(1),
                ledger.error_TD.square().sum(1),
                energy_TE.sum(1),
                torch.ones_like(energy_TE[:, 0]),
            ],
            dim=1,
        )
        parts = (norm_TE, norm_TE * ran_TE, share_TE, share_TE * ran_TE, energy_TE, ran_TE)
        self.sums[layer].add(ledger.tokens, torch.cat([*parts, layer_T4], dim=1))
        gap = float((share_TE.double().sum(1) - 1).abs().max())
        self.share_error[layer] = max(self.share_error[layer], gap)

    def part(self, layer: int) -> tuple[torch.Tensor, float] | None:
        """What was heard of a layer: what `merge` takes."""
        if layer not in self.sums:
            return None
        return self.sums[layer].part, self.share_error[layer]

    def merge(self, layer: int, part: tuple[torch.Tensor, float]) -> None:
        """Take in what was heard of other documents."""
        self.sums[layer].merge(part[0])
        self.share_error[layer] = max(self.share_error[layer], part[1])

    def tables(self) -> dict[str, Table]:
        """`experts`, `layers` and `energy`."""
        layers = sorted(self.sums)
        return {
            "experts": joined(self._experts(layer) for layer in layers),
            "layers": joined(self._layer(layer) for layer in layers),
            "energy": joined(self._energy(layer) for layer in layers),
        }

    def _split(self, sums_GC: Floats, layer: int) -> tuple[list[Floats], Floats]:
        """Six figures `[G, E]` and four of the layer `[G, 4]`."""
        cut = FIGURES * self.experts[layer]
        return np.split(sums_GC[:, :cut], FIGURES, axis=1), sums_GC[:, cut:]

    def _experts(self, layer: int) -> Table:
        experts = self.experts[layer]
        columns: dict[str, Any] = {"layer": [layer] * experts, "expert": list(range(experts))}
        sums = self.sums[layer]
        for suffix, sums_GC in (("", sums.all_GC), ("_later", sums.later_GC)):
            (norm, norm_ran, share, share_ran, energy, ran), whole = self._split(sums_GC, layer)
            tokens = np.broadcast_to(whole[:, 3:], norm.shape)
            total = np.broadcast_to(whole[:, 2:3], norm.shape)
            cells = {
                "norm": (norm, tokens),
                "norm_routed": (norm_ran, ran),
                "share": (share, tokens),
                "share_routed": (share_ran, ran),
                "energy": (energy, total),
            }
            # All in one call: cells that are zero in the same blocks share their resamples.
            found = self.blocks.interval(
                np.concatenate([top for top, _ in cells.values()], axis=1),
                np.concatenate([bottom for _, bottom in cells.values()], axis=1),
            )
            for name, values in found.columns("").items():
                for figure, part in zip(cells, np.split(values, len(cells)), strict=True):
                    columns[f"{figure}{suffix}{name}"] = part
        return table(columns)

    def _layer(self, layer: int) -> Table:
        sums = self.sums[layer]
        columns: dict[str, Any] = {"layer": [layer]}
        for suffix, sums_GC in (("", sums.all_GC), ("_later", sums.later_GC)):
            _, whole = self._split(sums_GC, layer)
            y, error, energy, tokens = whole.T
            found = self.blocks.interval(
                np.stack([y - energy, error, y], axis=1), np.stack([y, y, tokens], axis=1)
            )
            names = ("cross_term", "error_energy", "output_energy")
            for end, values in found.columns("").items():
                for name, value in zip(names, values, strict=True):
                    columns[f"{name}{suffix}{end}"] = [float(value)]
        _, first = self._split(sums.first_GC, layer)
        _, whole = self._split(sums.all_GC, layer)
        columns["first_token_energy"] = [first[:, 0].sum() / max(whole[:, 0].sum(), 1e-300)]
        columns["share_sum_error"] = [self.share_error[layer]]
        columns["contribution_documents"] = [len(self.documents)]
        columns["contribution_tokens"] = [int(whole[:, 3].sum())]
        return table({k: v if k == "layer" else np.asarray(v) for k, v in columns.items()})

    def _energy(self, layer: int) -> Table:
        experts, sums = self.experts[layer], self.sums[layer]
        parts = []
        for number, domain in enumerate(self.documents.domains):
            here_G = self.blocks.domain_G == number
            columns: dict[str, Any] = {
                "layer": [layer] * (experts + 1),
                "expert": [*range(experts), ERROR],
                "domain": [domain] * (experts + 1),
            }
            for suffix, sums_GC in (("", sums.all_GC), ("_later", sums.later_GC)):
                figures, whole = self._split(sums_GC, layer)
                top = np.concatenate([figures[4], whole[:, 1:2]], axis=1) * here_G[:, None]
                found = self.blocks.interval(top, whole[:, 3] * here_G)
                columns |= found.columns(f"energy{suffix}")
            columns["documents"] = [int((self.documents.domain_D == number).sum())] * (experts + 1)
            parts.append(table(columns))
        return joined(parts)
