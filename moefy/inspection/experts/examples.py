"""Tokens that show what an expert does, over the whole spectrum of its contribution norm.

    top        the largest norms, one per document
    spectrum   ten bins of equally many tokens by norm, some of each drawn at random
    random     tokens that were routed to it, drawn at random
    near       in one document the routed and the unrouted token nearest to the threshold, paired
    negative   the most negative shares, one per document

All come from the shard `select`; top and spectrum from `held_out` too. First tokens are in no panel:
where their norms dwarf all others, every document would show the same. Tokens that were not routed to an
expert are in `top`, `spectrum` and `negative` as well; `ran` tells them apart.

The norms around an example are kept while its document is in memory, so no second pass is needed.

Shapes: T tokens, E experts, N records, W tokens of a window.
"""

import base64
from typing import Any

import numpy as np

from moefy.data.documents import HELD_OUT, SELECT, Documents
from moefy.evaluation.statistics import Floats
from moefy.inspection.account.ledger import Ledger
from moefy.inspection.experts.best import Array, Best, Chunk, Records, best_of_documents
from moefy.inspection.texts.table import Table, joined, table
from moefy.inspection.texts.tokens import uniforms

KEPT = 50
"""Records of a panel."""
SAMPLE = 500
"""Tokens of each shard drawn for `spectrum` and for quantiles."""
MANY = 4096
"""With more experts in all than this, fewer are kept of each: memory then grows no further."""
LEAST_KEPT, LEAST_SAMPLE = 10, 100
BINS = 10
REACH = 24
"""Tokens to either side of an example whose norms are kept."""
NOTHING = 255
"""In a window: no such token. Others are 0 (nothing) to 254 (`norm_max` of the expert, or more)."""
QUANTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
LEAST = 20
"""Fewest tokens that quantiles are given for."""

_NEAR = ("near_routed", "near_unrouted")

Part = tuple[dict[tuple[str, str], Records], Array]


class Examples:
    """Listens to ledgers; memory is `L E (135 (2 S + 5 K) + 74 SAMPLE + 4)` bytes for K kept and S
    sampled, whatever is read."""

    def __init__(
        self, documents: Documents, *, kept: int = KEPT, sampled: int = SAMPLE, seed: int = 0
    ) -> None:
        self.documents, self.kept, self.sampled, self.seed = documents, kept, sampled, seed
        self.panels: dict[int, dict[tuple[str, str], Best]] = {}
        self.largest: dict[int, Array] = {}

    def add(self, ledger: Ledger) -> None:
        """Take in one layer and a chunk of tokens."""
        layer, experts = ledger.layer, ledger.experts
        if layer not in self.panels:
            self.panels[layer] = self._empty(experts)
            self.largest[layer] = np.zeros(experts, dtype=np.float32)
        tokens = ledger.tokens
        later_T = tokens.position_T > 0
        if not later_T.any():
            return
        chunk = Chunk.of(ledger)
        self.largest[layer] = np.maximum(self.largest[layer], chunk.norm_TE[later_T].max(0))
        shard_D = self.documents.of_shard(SELECT)
        for shard, here_D in ((SELECT, shard_D), (HELD_OUT, ~shard_D)):
            row_C = np.flatnonzero(later_T & here_D[tokens.document_T])
            if len(row_C):
                self._offer(self.panels[layer], shard, chunk, row_C)

    def part(self, layer: int) -> Part | None:
        """What was heard of a layer: what `merge` takes."""
        if layer not in self.panels:
            return None
        return {k: best.records for k, best in self.panels[layer].items()}, self.largest[layer]

    def merge(self, layer: int, part: Part) -> None:
        """Take in what was heard of other documents."""
        panels, largest = part
        self.largest[layer] = np.maximum(self.largest[layer], largest)
        for key, records in panels.items():
            self.panels[layer][key].merge(records)

    def _empty(self, experts: int) -> dict[tuple[str, str], Best]:
        def one(size: int, *, by_document: bool = False, reach: int = REACH) -> Best:
            return Best(experts, size, reach=reach, by_document=by_document)

        found = {}
        for shard in (SELECT, HELD_OUT):
            found["top", shard] = one(self.kept, by_document=True)
            found["spectrum", shard] = one(self.sampled)
            found["routed", shard] = one(SAMPLE, reach=0)
        found["random", SELECT] = one(self.kept)
        found["negative", SELECT] = one(self.kept, by_document=True)
        for panel in _NEAR:
            found[panel, SELECT] = one(self.kept // 2, by_document=True)
        return found

    def _offer(
        self, panels: dict[tuple[str, str], Best], shard: str, chunk: Chunk, row_C: Array
    ) -> None:
        tokens = chunk.tokens.take(row_C)
        norm_CE, ran_CE = chunk.norm_TE[row_C].astype(float), chunk.ran_TE[row_C]
        document_C = tokens.document_T
        at_CE = np.broadcast_to(row_C[:, None], norm_CE.shape)
        drawn_CE = np.broadcast_to(uniforms(tokens, self.seed)[:, None], norm_CE.shape)
        routed_CE = np.where(ran_CE, drawn_CE, -np.inf)
        panels["top", shard].add(*best_of_documents(norm_CE, row_C, document_C), chunk)
        panels["spectrum", shard].add(drawn_CE, at_CE, chunk)
        panels["routed", shard].add(routed_CE, at_CE, chunk)
        if shard != SELECT:
            return
        panels["random", shard].add(routed_CE, at_CE, chunk)
        negative_CE = -chunk.share_TE[row_C].astype(float)
        negative_CE = np.where(negative_CE > 0, negative_CE, -np.inf)
        panels["negative", shard].add(*best_of_documents(negative_CE, row_C, document_C), chunk)
        away_CE = np.abs(chunk.margin_TE[row_C].astype(float))
        away_CE = np.where(np.isfinite(away_CE), away_CE, np.inf)
        sides = [
            best_of_documents(np.where(on_CE, -away_CE, -np.inf), row_C, document_C)
            for on_CE in (ran_CE, ~ran_CE)
        ]
        # The same keys on both sides, so that both keep the same pairs in the same order.
        key = sides[0][0] + sides[1][0]
        for panel, (_, at) in zip(_NEAR, sides, strict=True):
            panels[panel, shard].add(key, at, chunk)

    def tables(self) -> dict[str, Table]:
        """`examples`, `quantiles` and the largest norm of `experts`."""
        layers = sorted(self.panels)
        return {
            "examples": joined(self._examples(layer) for layer in layers),
            "quantiles": joined(self._quantiles(layer) for layer in layers),
            "experts": joined(
                table(
                    {
                        "layer": [layer] * len(self.largest[layer]),
                        "expert": list(range(len(self.largest[layer]))),
                        "norm_max": self.largest[layer],
                    }
                )
                for layer in layers
            ),
        }

    def _examples(self, layer: int) -> Table:
        parts = []
        for (panel, shard), best in self.panels[layer].items():
            if panel == "routed":
                continue
            key_EN = best.records.key_EN
            expert, place = np.nonzero(np.isfinite(key_EN))
            bins: list[int | None] = [None] * len(expert)
            if panel == "spectrum":
                expert, place, bins = self._spectrum(best)
            elif panel in _NEAR:
                bins = list(place.tolist())
            parts.append(self._rows(layer, panel.split("_")[0], shard, best, expert, place, bins))
        whole = joined(parts)
        order = np.argsort(whole["expert"], kind="stable").tolist()
        return {name: [column[i] for i in order] for name, column in whole.items()}

    def _spectrum(self, best: Best) -> tuple[Array, Array, list[int | None]]:
        """The first of each bin by random key: expert, place and bin of every row."""
        records = best.records
        valid = int(np.isfinite(records.key_EN[0]).sum())
        each = max(1, self.kept // BINS)
        rank_EN = records.norm_EN[:, :valid].argsort(1, kind="stable").argsort(1, kind="stable")
        bin_EN = rank_EN * BINS // max(1, valid)
        order_EN = bin_EN.argsort(1, kind="stable")
        bin_EN = np.take_along_axis(bin_EN, order_EN, 1)
        start_EN = np.array([np.searchsorted(row, row) for row in bin_EN])
        keep = np.arange(valid) - start_EN < each if valid else np.zeros_like(bin_EN, dtype=bool)
        expert, at = np.nonzero(keep)
        return expert, order_EN[expert, at], list(bin_EN[expert, at].tolist())

    def _rows(
        self, layer: int, panel: str, shard: str, best: Best, expert: Array, place: Array, bins: Any
    ) -> Table:
        records, count = best.records, len(expert)
        windows = _bytes(records.window_ENW[expert, place], self.largest[layer][expert])
        return table(
            {
                "layer": [layer] * count,
                "expert": expert,
                "panel": [panel] * count,
                "shard": [shard] * count,
                "bin": bins,
                "document": records.document_EN[expert, place],
                "position": records.position_EN[expert, place],
                "norm": records.norm_EN[expert, place],
                "share": records.share_EN[expert, place],
                "margin": records.margin_EN[expert, place],
                "ran": records.ran_EN[expert, place],
                "window": windows,
            }
        )

    def _quantiles(self, layer: int) -> Table:
        found: list[list[Any]] = []
        domain_D, domains = self.documents.domain_D, self.documents.domains
        panels = self.panels[layer]
        for ran, panel in ((True, "routed"), (False, "spectrum")):
            shards = [panels[panel, shard].records for shard in (SELECT, HELD_OUT)]
            key, document, norm, on = (
                np.concatenate([getattr(r, name) for r in shards], axis=1)
                for name in ("key_EN", "document_EN", "norm_EN", "ran_EN")
            )
            # Tokens with the largest random numbers of a shard are an even sample of all of both down
            # to the larger of the two lowest numbers kept.
            full = [np.where(np.isfinite(r.key_EN[:, -1]), r.key_EN[:, -1], 0.0) for r in shards]
            keep = (key >= np.maximum(*full)[:, None]) & (on == ran)
            for expert in range(len(key)):
                at = np.flatnonzero(keep[expert])
                of_N = domain_D[document[expert, at]]
                groups = [(None, at), *((d, at[of_N == i]) for i, d in enumerate(domains))]
                for domain, chosen in groups:
                    if len(chosen) >= LEAST:
                        values = np.quantile(norm[expert, chosen], np.array(QUANTILES) / 100)
                        found.append([layer, expert, ran, domain, len(chosen), *values.tolist()])
        names = ["layer", "expert", "ran", "domain", "tokens", *(f"p{q}" for q in QUANTILES)]
        columns = list(map(list, zip(*found, strict=True))) or [[] for _ in names]
        return table(
            {
                name: np.array(column, dtype=float) if name[0] == "p" else column
                for name, column in zip(names, columns, strict=True)
            }
        )


def sizes(experts: int) -> tuple[int, int]:
    """How many records a panel keeps and how many tokens `spectrum` draws, with so many experts in
    all layers together."""
    share = min(1.0, MANY / max(1, experts))
    return max(LEAST_KEPT, round(KEPT * share)), max(LEAST_SAMPLE, round(SAMPLE * share))


def _bytes(window_RW: Array, largest_R: Array) -> list[str | None]:
    """Windows in base64, a byte a token; None where none was kept."""
    if window_RW.shape[1] == 0:
        return [None] * len(window_RW)
    with np.errstate(invalid="ignore", divide="ignore"):
        level: Floats = window_RW.astype(float) / largest_R[:, None] * (NOTHING - 1)
    level = np.where(np.isnan(window_RW), NOTHING, np.clip(np.nan_to_num(level), 0, NOTHING - 1))
    return [base64.b64encode(row.tobytes()).decode() for row in level.round().astype(np.uint8)]
