"""How often the router runs the experts that the oracle would, expert by expert, and what misses cost.

The oracle of `moefy.evaluation.router_quality`: for every token the routed experts of the largest
contribution norm, as many as the router ran. Heard from the same ledgers as everything else, on tokens
drawn evenly from all documents, because it takes two more products with the down projection.

Shapes: T tokens, E experts (the shared ones first), G blocks of documents.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moefy.evaluation.router_quality import compare_with_oracle
from moefy.inspection.account.ledger import Ledger
from moefy.inspection.part import BlockSums, Pass, PassPart, SeenDocuments, State
from moefy.inspection.texts.table import Table, of_experts, table
from moefy.inspection.texts.tokens import uniforms

TOKENS = 20_000
"""About the most tokens of each layer that are compared."""
_ENERGIES = ("energy", "model", "oracle")


@dataclass
class _RouterSums(State):
    """Of one layer: hits, what ran and what the oracle ran of every routed expert, and three energies."""

    shared: int
    routed: int
    sums: BlockSums
    seen: SeenDocuments


class RouterQualityOfExperts(PassPart[_RouterSums]):
    """Memory is `16 L G (3 E + 3)` bytes and a bit for each document and expert."""

    def __init__(self, work: Pass, *, tokens: int = TOKENS) -> None:
        super().__init__(work)
        self.documents, self.blocks, self.seed = work.reading.documents, work.blocks, work.seed
        self.share = tokens / max(1, int(work.reading.tokens_D.sum()))

    def begin(self, ledger: Ledger) -> _RouterSums:
        """No sums yet."""
        shared, routed = ledger.module.shared, ledger.experts - ledger.module.shared
        sums = BlockSums(self.blocks, 3 * routed + len(_ENERGIES))
        return _RouterSums(shared, routed, sums, SeenDocuments(len(self.documents), routed))

    def take(self, state: _RouterSums, ledger: Ledger) -> None:
        """Of drawn tokens: what ran, what the oracle would run, and the energies that either misses."""
        drawn_T = uniforms(ledger.tokens, self.seed) < self.share
        if not drawn_T.any():
            return
        module, at_T = ledger.module, ledger.here(drawn_T)
        running = module.compensation.centred(ledger.mlp)
        found = compare_with_oracle(module, running, ledger.x_TD[at_T], ledger.mask_TE[at_T])
        ran_TE, oracle_TE = found.ran_TE, found.oracle_TE
        counts = [(ran_TE & oracle_TE).double(), ran_TE.double(), oracle_TE.double()]
        energy_T3 = torch.stack([found.energy_T[name] for name in _ENERGIES], dim=1)
        tokens = ledger.tokens.take(drawn_T)
        state.sums.add(tokens, torch.cat([*counts, energy_T3], dim=1))
        state.seen.add(tokens.document_T, (ran_TE | oracle_TE).cpu().numpy())

    def rows(self, layer: int) -> dict[str, Table]:
        """Columns of `experts` and `layers`."""
        state = self.layers[layer]
        sums, none = state.sums.all_GX, np.full(state.shared, np.nan)
        hits, ran, oracle = np.split(sums[:, : 3 * state.routed], 3, axis=1)
        energy, model, best = sums[:, 3 * state.routed :].T
        figures = {"router_recall": (hits, oracle), "router_precision": (hits, ran)}
        experts: dict[str, Any] = {
            name: np.concatenate([none, values])
            for name, values in self.blocks.columns(figures).items()
        }
        experts["router_documents"] = [None] * state.shared + state.seen.count_X.tolist()
        experts["router_tokens"] = [None] * state.shared + ran.sum(0).astype(int).tolist()
        whole = {
            "recall": (hits.sum(1), ran.sum(1)),
            "missed_energy": (model, energy),
            "unavoidable": (best, energy),
            "router_added": (model - best, energy),
        }
        layers = table({"layer": [layer], **self.blocks.columns(whole)})
        return {"experts": of_experts(layer, experts), "layers": layers}
