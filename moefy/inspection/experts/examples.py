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
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moefy.data.shards import HELD_OUT, SELECT, Ints
from moefy.evaluation.statistics import Floats
from moefy.inspection.account import Ledger
from moefy.inspection.part import Accumulator, Largest, Pass, PassPart, State
from moefy.inspection.record import NOTHING, Table, joined, of_experts, table
from moefy.inspection.texts.tokens import Tokens, uniforms

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
QUANTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
LEAST = 20
"""Fewest tokens that quantiles are given for."""

_NEAR = ("near_routed", "near_unrouted")
SHOWN = ("document", "position", "norm", "share", "margin", "ran")
"""Figures of `Records` that the table has."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Chunk:
    """A ledger's figures `[T, E]` on the CPU."""

    tokens: Tokens
    norm_TE: Array
    share_TE: Array
    margin_TE: Array
    """NaN where nothing is scored, and where all or none of the routed experts ran."""
    ran_TE: Array

    @classmethod
    def of(cls, ledger: Ledger) -> "Chunk":
        """The figures of one layer and a chunk of tokens."""
        norm_TE = ledger.norm_TE.cpu().numpy()
        margin_TE = np.full_like(norm_TE, np.nan)
        if ledger.margin_TE is not None:
            on_TE = ledger.mask_TE[:, ledger.module.shared :]
            # A token that ran all or none of the routed experts has no threshold.
            some_T1 = on_TE.any(1, keepdim=True) & ~on_TE.all(1, keepdim=True)
            known_TE = ledger.margin_TE.masked_fill(~some_T1, torch.nan)
            margin_TE[:, ledger.module.shared :] = known_TE.cpu().numpy()
        share_TE, ran_TE = ledger.share_TE.cpu().numpy(), ledger.mask_TE.cpu().numpy()
        return cls(ledger.tokens, norm_TE, share_TE, margin_TE, ran_TE)


@dataclass
class Records:
    """What is known of the kept tokens of every expert `[E, N]`."""

    key_EN: Floats
    """Minus infinity if there is no record."""
    document_EN: Ints
    position_EN: Ints
    norm_EN: Array
    share_EN: Array
    margin_EN: Array
    ran_EN: Array
    window_ENW: Array
    """Norms of the tokens around, NaN if there are none or they were in another chunk."""


class Best(Accumulator[Records]):
    """Keeps N records of each expert: those of the largest keys, in descending order."""

    def __init__(
        self, experts: int, size: int, *, reach: int = 0, by_document: bool = False
    ) -> None:
        """`reach` tokens to either side go into the window; 0 keeps none. With `by_document` a
        document has one record at most, its best."""
        shape = (experts, size)
        self.reach, self.by_document = reach, by_document
        super().__init__(
            Records(
                np.full(shape, -np.inf),
                np.full(shape, -1),
                np.full(shape, -1),
                np.full(shape, np.nan, dtype=np.float32),
                np.full(shape, np.nan, dtype=np.float32),
                np.full(shape, np.nan, dtype=np.float32),
                np.zeros(shape, dtype=bool),
                np.full((*shape, 2 * reach + 1 if reach else 0), np.nan, dtype=np.float16),
            )
        )

    def merge(self, part: Records) -> None:
        """Equal keys stand in the order of their tokens."""
        both = _both(self.total, part)
        order_EN = np.lexsort((both["position_EN"], both["document_EN"], -both["key_EN"]), axis=1)
        order_EN = order_EN[:, : self.total.key_EN.shape[1]]
        window_ENW = np.take_along_axis(both.pop("window_ENW"), order_EN[..., None], axis=1)
        taken = {name: np.take_along_axis(value, order_EN, 1) for name, value in both.items()}
        self.total = Records(**taken, window_ENW=window_ENW)

    def add(self, key_CE: Floats, at_CE: Ints, chunk: Chunk) -> None:
        """Offer candidates: their keys, and the token of the chunk that each is."""
        kept = self.total
        size = kept.key_EN.shape[1]
        hopeful_C = (key_CE > kept.key_EN[:, -1]).any(1)
        if not hopeful_C.any():
            return
        key_EC, at_EC = key_CE[hopeful_C].T, at_CE[hopeful_C].T
        expert_E1 = np.arange(len(key_EC))[:, None]
        tokens = chunk.tokens
        new = Records(
            key_EC,
            tokens.document_T[at_EC],
            tokens.position_T[at_EC],
            chunk.norm_TE[at_EC, expert_E1],
            chunk.share_TE[at_EC, expert_E1],
            chunk.margin_TE[at_EC, expert_E1],
            chunk.ran_TE[at_EC, expert_E1],
            kept.window_ENW[:, :0],
        )
        # The norms around are looked up of those that stay.
        both = _both(kept, new, but="window_ENW")
        if self.by_document:
            _drop_repeats(both["key_EN"], both["document_EN"])
        order_EN = np.argsort(-both["key_EN"], axis=1, kind="stable")[:, :size]
        taken = {name: np.take_along_axis(value, order_EN, 1) for name, value in both.items()}
        window_ENW = kept.window_ENW
        if self.reach:
            window_ENW = np.take_along_axis(
                window_ENW, np.minimum(order_EN, size - 1)[..., None], axis=1
            )
            expert, place = np.nonzero(order_EN >= size)
            at = at_EC[expert, order_EN[expert, place] - size]
            window_ENW[expert, place] = _windows(chunk, at, expert, self.reach)
        self.total = Records(**taken, window_ENW=window_ENW)


def _both(one: Records, other: Records, but: str = "") -> dict[str, Array]:
    """The records of two, side by side, by name of their figures."""
    names = [field.name for field in fields(Records) if field.name != but]
    return {n: np.concatenate([getattr(one, n), getattr(other, n)], axis=1) for n in names}


def best_of_documents(key_CE: Floats, row_C: Ints, document_C: Ints) -> tuple[Floats, Ints]:
    """The largest key of every document `[documents, E]` and the token that has it, the first of
    equals; tokens of a document follow each other."""
    starts = np.flatnonzero(np.diff(document_C, prepend=-1))
    best = np.maximum.reduceat(key_CE, starts, axis=0)
    run_C = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(document_C))))
    first_CE = np.where(key_CE == best[run_C], np.arange(len(row_C))[:, None], len(row_C))
    return best, row_C[np.minimum.reduceat(first_CE, starts, axis=0)]


def _drop_repeats(key_EN: Floats, document_EN: Ints) -> None:
    """Leave each document its best record: the keys of the others become minus infinity."""
    order_EN = np.argsort(-key_EN, axis=1, kind="stable")
    document = np.take_along_axis(document_EN, order_EN, 1)
    by_document = np.argsort(document, axis=1, kind="stable")
    document = np.take_along_axis(document, by_document, 1)
    expert, place = np.nonzero(document[:, 1:] == document[:, :-1])
    key_EN[expert, order_EN[expert, by_document[expert, place + 1]]] = -np.inf


def _windows(chunk: Chunk, at_R: Ints, expert_R: Ints, reach: int) -> Array:
    """Norms `[R, W]` of the tokens around, NaN outside the document or the chunk."""
    at_RW = at_R[:, None] + np.arange(-reach, reach + 1)
    inside_RW = (at_RW >= 0) & (at_RW < len(chunk.tokens))
    at_RW = np.where(inside_RW, at_RW, at_R[:, None])
    document_T = chunk.tokens.document_T
    inside_RW &= document_T[at_RW] == document_T[at_R][:, None]
    return np.where(inside_RW, chunk.norm_TE[at_RW, expert_R[:, None]], np.nan)


@dataclass
class _Panels(State):
    """Of one layer."""

    panels: dict[tuple[str, str], Best]
    """By panel and shard."""
    largest: Largest
    """Norms `[E]`."""


class Examples(PassPart[_Panels]):
    """Memory is `L E (135 (2 S + 5 K) + 74 SAMPLE + 4)` bytes for K kept and S sampled, whatever is read."""

    def __init__(self, work: Pass, *, kept: int | None = None, sampled: int | None = None) -> None:
        super().__init__(work)
        usual = sizes(sum(module.experts for module in work.modules.values()))
        self.kept, self.sampled = kept or usual[0], sampled or usual[1]
        self.documents, self.seed = work.reading.documents, work.seed
        self.select_Q = self.documents.of_shard(SELECT)

    def begin(self, ledger: Ledger) -> _Panels:
        """Panels without a record."""
        zeros = np.zeros(ledger.experts, dtype=np.float32)
        return _Panels(self._empty(ledger.experts), Largest(zeros))

    def take(self, state: _Panels, ledger: Ledger) -> None:
        """Offer every token but the first of a document to the panels of its shard."""
        tokens = ledger.tokens
        later_T = tokens.position_T > 0
        if not later_T.any():
            return
        chunk = Chunk.of(ledger)
        state.largest.merge(chunk.norm_TE[later_T].max(0))
        for shard, here_Q in ((SELECT, self.select_Q), (HELD_OUT, ~self.select_Q)):
            row_C = np.flatnonzero(later_T & here_Q[tokens.document_T])
            if len(row_C):
                self._offer(state.panels, shard, chunk, row_C)

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

    def rows(self, layer: int) -> dict[str, Table]:
        """`examples`, `quantiles` and the largest norm of `experts`."""
        return {
            "examples": self._examples(layer),
            "quantiles": self._quantiles(layer),
            "experts": of_experts(layer, {"norm_max": self.layers[layer].largest.total}),
        }

    def _examples(self, layer: int) -> Table:
        parts = []
        for (panel, shard), best in self.layers[layer].panels.items():
            if panel == "routed":
                continue
            key_EN = best.total.key_EN
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
        records = best.total
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
        records, count = best.total, len(expert)
        windows = _bytes(
            records.window_ENW[expert, place], self.layers[layer].largest.total[expert]
        )
        return table(
            {
                "layer": [layer] * count,
                "expert": expert,
                "panel": [panel] * count,
                "shard": [shard] * count,
                "bin": bins,
                **{name: getattr(records, f"{name}_EN")[expert, place] for name in SHOWN},
                "window": windows,
            }
        )

    def _quantiles(self, layer: int) -> Table:
        found: list[list[Any]] = []
        domain_Q, domains = self.documents.domain_Q, self.documents.domains
        panels = self.layers[layer].panels
        for ran, panel in ((True, "routed"), (False, "spectrum")):
            shards = [panels[panel, shard].total for shard in (SELECT, HELD_OUT)]
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
                of_N = domain_Q[document[expert, at]]
                groups = [(None, at), *((d, at[of_N == i]) for i, d in enumerate(domains))]
                for domain, chosen in groups:
                    if len(chosen) >= LEAST:
                        values = np.quantile(norm[expert, chosen], np.array(QUANTILES) / 100)
                        found.append([layer, expert, ran, domain, len(chosen), *values.tolist()])
        keys = ("layer", "expert", "ran", "domain", "tokens")
        columns: dict[str, Any] = {name: [row[at] for row in found] for at, name in enumerate(keys)}
        for column, quantile in enumerate(QUANTILES, start=len(keys)):
            columns[f"p{quantile}"] = np.array([row[column] for row in found], dtype=float)
        return table(columns)


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
