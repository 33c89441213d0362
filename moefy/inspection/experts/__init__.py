"""How much every expert adds, and whether the experts that run are those that add most.

    norm    c_e = ||y_e||
    share   s_e = <y_e, y> / ||y||^2, which sums to 1 over the experts of a token
    energy  ||y_e||^2

`y` is the dense output of the layer without its bias. First tokens (position 0) dwarf all others in
many models, so every mean comes with them and, as `..._later`, without.

The router is compared with the oracle of `moefy.evaluation.router_quality`: for every token the routed
experts of the largest contribution norm, as many as the router ran, on tokens drawn evenly from all
documents, because it takes two more products with the down projection.

Shapes: T tokens, E experts (the shared ones first), G blocks of documents, X columns.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moefy.evaluation.router_quality import compare_with_oracle
from moefy.evaluation.statistics import Floats
from moefy.inspection.account import Ledger
from moefy.inspection.part import BlockSums, Largest, Pass, PassPart, SeenDocuments, State
from moefy.inspection.record import Table, joined, of_experts, table
from moefy.inspection.texts.tokens import uniforms

ERROR = -1
"""In the place of an expert: what the experts that did not run would have added."""
FIGURES = 6
"""Sums of each expert: norm, norm where it ran, share, share where it ran, energy, tokens run."""


@dataclass
class _ContributionSums(State):
    """Of one layer: six figures of every expert and four of the layer."""

    experts: int
    sums: BlockSums
    share_error: Largest
    """Most by which the shares of a token miss 1 `[1]`."""

    def ends(self) -> list[tuple[str, list[Floats], Floats]]:
        """Of all tokens and of all but the first of a document: what columns end in, six figures
        `[G, E]`, and four of the layer `[G, 4]`."""
        pairs = (("", self.sums.all_GX), ("_later", self.sums.later_GX))
        return [(end, *self.split(sums_GX)) for end, sums_GX in pairs]

    def split(self, sums_GX: Floats) -> tuple[list[Floats], Floats]:
        """The figures of experts, and those of the layer."""
        cut = FIGURES * self.experts
        return np.split(sums_GX[:, :cut], FIGURES, axis=1), sums_GX[:, cut:]


class Contributions(PassPart[_ContributionSums]):
    """Memory is `16 L G (6 E + 4)` bytes, G at most about 512."""

    def begin(self, ledger: Ledger) -> _ContributionSums:
        """No sums yet."""
        sums = BlockSums(self.work.blocks, FIGURES * ledger.experts + 4)
        return _ContributionSums(ledger.experts, sums, Largest(np.zeros(1)))

    def take(self, state: _ContributionSums, ledger: Ledger) -> None:
        """Norms, shares and energies of experts; energies of the whole."""
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
        state.sums.add(ledger.tokens, torch.cat([*parts, layer_T4], dim=1))
        state.share_error.merge(float((share_TE.double().sum(1) - 1).abs().max()))

    def rows(self, layer: int) -> dict[str, Table]:
        """`experts`, `layers` and `energy`."""
        return {
            "experts": self._experts(layer),
            "layers": self._layer(layer),
            "energy": self._energy(layer),
        }

    def _experts(self, layer: int) -> Table:
        columns: dict[str, Floats] = {}
        for suffix, figures_of, whole in self.layers[layer].ends():
            norm, norm_ran, share, share_ran, energy, ran = figures_of
            tokens, total = whole[:, 3], whole[:, 2]
            figures = {
                "norm": (norm, tokens),
                "norm_routed": (norm_ran, ran),
                "share": (share, tokens),
                "share_routed": (share_ran, ran),
                "energy": (energy, total),
            }
            columns |= self.work.blocks.columns({n + suffix: pair for n, pair in figures.items()})
        return of_experts(layer, columns)

    def _layer(self, layer: int) -> Table:
        state = self.layers[layer]
        columns: dict[str, Floats] = {"layer": np.array([layer])}
        for suffix, _, whole in state.ends():
            y, error, energy, tokens = whole.T
            figures = {
                "cross_term": (y - energy, y),
                "error_energy": (error, y),
                "output_energy": (y, tokens),
            }
            columns |= self.work.blocks.columns({n + suffix: pair for n, pair in figures.items()})
        first, whole = (state.split(s)[1] for s in (state.sums.first_GX, state.sums.all_GX))
        rest = {
            "first_token_energy": first[:, 0].sum() / max(whole[:, 0].sum(), 1e-300),
            "share_sum_error": state.share_error.total[0],
            "contribution_documents": len(self.work.reading.documents),
            "contribution_tokens": int(whole[:, 3].sum()),
        }
        return table(columns | {name: np.array([value]) for name, value in rest.items()})

    def _energy(self, layer: int) -> Table:
        state, parts = self.layers[layer], []
        for number, domain in enumerate(self.work.reading.documents.domains):
            here_G = self.work.blocks.domain_G == number
            columns: dict[str, Floats] = {}
            for suffix, figures, whole in state.ends():
                top = np.concatenate([figures[4], whole[:, 1:2]], axis=1) * here_G[:, None]
                columns |= self.work.blocks.columns(
                    {f"energy{suffix}": (top, whole[:, 3] * here_G)}
                )
            count = state.experts + 1
            keys = {
                "layer": [layer] * count,
                "expert": [*range(state.experts), ERROR],
                "domain": [domain] * count,
            }
            documents = int((self.work.reading.documents.domain_Q == number).sum())
            parts.append(table({**keys, **columns, "documents": [documents] * count}))
        return joined(parts)


ORACLE_TOKENS = 20_000
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

    def __init__(self, work: Pass, *, tokens: int = ORACLE_TOKENS) -> None:
        super().__init__(work)
        self.share = tokens / max(1, int(work.reading.tokens_Q.sum()))

    def begin(self, ledger: Ledger) -> _RouterSums:
        """No sums yet."""
        shared, routed = ledger.module.shared, ledger.experts - ledger.module.shared
        sums = BlockSums(self.work.blocks, 3 * routed + len(_ENERGIES))
        return _RouterSums(
            shared, routed, sums, SeenDocuments(len(self.work.reading.documents), routed)
        )

    def take(self, state: _RouterSums, ledger: Ledger) -> None:
        """Of drawn tokens: what ran, what the oracle would run, and the energies that either misses."""
        drawn_T = uniforms(ledger.tokens, self.work.seed) < self.share
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
            for name, values in self.work.blocks.columns(figures).items()
        }
        experts["router_documents"] = [None] * state.shared + state.seen.count_X.tolist()
        experts["router_tokens"] = [None] * state.shared + ran.sum(0).astype(int).tolist()
        whole = {
            "recall": (hits.sum(1), ran.sum(1)),
            "missed_energy": (model, energy),
            "unavoidable": (best, energy),
            "router_added": (model - best, energy),
        }
        layers = table({"layer": [layer], **self.work.blocks.columns(whole)})
        return {"experts": of_experts(layer, experts), "layers": layers}
