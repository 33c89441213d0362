"""How often the router runs the experts that the oracle would, expert by expert, and what misses cost.

The oracle of `moefy.evaluation.router_quality`: for every token the routed experts of the largest
contribution norm, as many as the router ran. Heard from the same ledgers as everything else, on tokens
drawn evenly from all documents, because it takes two more products with the down projection.

Shapes: T tokens, E experts (the shared ones first), G blocks of documents.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moefy.evaluation.router_quality import compare_with_oracle
from moefy.inspection.account.ledger import Ledger
from moefy.inspection.account.sums import Blocks, BlockSums, SeenDocuments
from moefy.inspection.texts.reading import Reading
from moefy.inspection.texts.table import Table, joined, table
from moefy.inspection.texts.tokens import uniforms

TOKENS = 20_000
"""About the most tokens of each layer that are compared."""
_ENERGIES = ("energy", "model", "oracle")

Part = tuple[torch.Tensor, NDArray[np.uint8]]


class RouterQualityOfExperts:
    """Listens to ledgers; memory is `16 L G (3 E + 3)` bytes and a bit for each document and expert."""

    def __init__(self, reading: Reading, *, tokens: int = TOKENS, seed: int = 0) -> None:
        self.documents, self.seed = reading.documents, seed
        self.share = tokens / max(1, int(reading.tokens_D.sum()))
        self.blocks = Blocks(reading.documents)
        self.sums: dict[int, BlockSums] = {}
        self.seen: dict[int, SeenDocuments] = {}
        self.experts: dict[int, tuple[int, int]] = {}

    def add(self, ledger: Ledger) -> None:
        """Take in one layer and a chunk of tokens."""
        layer, module = ledger.layer, ledger.module
        routed = ledger.experts - module.shared
        if layer not in self.sums:
            self.experts[layer] = (module.shared, routed)
            self.sums[layer] = BlockSums(self.blocks, 3 * routed + len(_ENERGIES))
            self.seen[layer] = SeenDocuments(len(self.documents), routed)
        drawn_T = uniforms(ledger.tokens, self.seed) < self.share
        if not drawn_T.any():
            return
        at_T = torch.from_numpy(drawn_T).to(ledger.x_TD.device)
        running = module.compensation.centred(ledger.mlp)
        found = compare_with_oracle(module, running, ledger.x_TD[at_T], ledger.mask_TE[at_T])
        ran_TE, oracle_TE = found.ran_TE, found.oracle_TE
        counts = [(ran_TE & oracle_TE).double(), ran_TE.double(), oracle_TE.double()]
        energy_T3 = torch.stack([found.energy_T[name] for name in _ENERGIES], dim=1)
        tokens = ledger.tokens.take(drawn_T)
        self.sums[layer].add(tokens, torch.cat([*counts, energy_T3], dim=1))
        self.seen[layer].add(tokens.document_T, ran_TE | oracle_TE)

    def part(self, layer: int) -> Part | None:
        """What was heard of a layer: what `merge` takes."""
        if layer not in self.sums:
            return None
        return self.sums[layer].part, self.seen[layer].part

    def merge(self, layer: int, part: Part) -> None:
        """Take in what was heard of other documents."""
        self.sums[layer].merge(part[0])
        self.seen[layer].merge(part[1])

    def tables(self) -> dict[str, Table]:
        """Columns of `experts` and `layers`."""
        layers = sorted(self.sums)
        return {
            "experts": joined(self._experts(layer) for layer in layers),
            "layers": joined(self._layer(layer) for layer in layers),
        }

    def _experts(self, layer: int) -> Table:
        shared, routed = self.experts[layer]
        hits, ran, oracle = np.split(self.sums[layer].all_GC[:, : 3 * routed], 3, axis=1)
        found = self.blocks.interval(
            np.concatenate([hits, hits], axis=1), np.concatenate([oracle, ran], axis=1)
        )
        none = np.full(shared, np.nan)
        count = shared + routed
        columns: dict[str, Any] = {"layer": [layer] * count, "expert": list(range(count))}
        for end, values in found.columns("").items():
            columns[f"router_recall{end}"] = np.concatenate([none, values[:routed]])
            columns[f"router_precision{end}"] = np.concatenate([none, values[routed:]])
        columns["router_documents"] = [None] * shared + self.seen[layer].count_E.tolist()
        columns["router_tokens"] = [None] * shared + ran.sum(0).astype(int).tolist()
        return table(columns)

    def _layer(self, layer: int) -> Table:
        routed = self.experts[layer][1]
        sums = self.sums[layer].all_GC
        hits_G, ran_G = sums[:, :routed].sum(1), sums[:, routed : 2 * routed].sum(1)
        energy_G, model_G, oracle_G = sums[:, 3 * routed :].T
        tops = (hits_G, model_G, oracle_G, model_G - oracle_G)
        found = self.blocks.interval(
            np.stack(tops, axis=1), np.stack([ran_G, energy_G, energy_G, energy_G], axis=1)
        )
        names = ("recall", "missed_energy", "unavoidable", "router_added")
        columns: dict[str, Any] = {"layer": [layer]}
        for end, values in found.columns("").items():
            columns |= {f"{n}{end}": values[i : i + 1] for i, n in enumerate(names)}
        return table(columns)
