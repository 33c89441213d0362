"""All statistics of routing, layer by layer, as tables.

    layers, experts      one row each: load, what explains it, lexical router, specialization
    domains, tokens      what every expert is for
    pairs, duplicates, layer_pairs    what runs together
    dead, positions      experts that never ran; load by position
    routing              one row for the model: its layers' figures together

Pure functions of a `RoutingSample`; docs/inspection.md defines every column.

`router_saturation` compares two checkpoints, token by token: the mean over tokens of the experts that both
run over those that the second runs. It is OLMoE's measure, with the two lines that it needs: what even
chance and what the loads alone give.

Shapes: T tokens, E experts.
"""

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from moefy.data.documents import HELD_OUT
from moefy.errors import MoefyError
from moefy.evaluation.statistics import q_values
from moefy.inspection.account import observe
from moefy.inspection.controls import replication
from moefy.inspection.part import Pass
from moefy.inspection.record import Table, joined, table
from moefy.inspection.routing import (
    MANY_EXPERTS,
    Columns,
    RoutedLayer,
    RoutingFrame,
    RoutingSample,
    RoutingSampler,
    Totals,
    added,
    drawn_documents,
    over_running,
    ratio_columns,
)
from moefy.inspection.routing.coactivation import (
    FAR_TOKENS,
    Pairs,
    best_phi,
    between_layers,
    pair_tables,
    within_layer,
)
from moefy.inspection.routing.explained import explained, lexical_router
from moefy.inspection.routing.specialization import (
    KINDS,
    SHOWN,
    domain_specialization,
    load,
    token_lists,
    vocabulary_specialization,
)
from moefy.inspection.texts import Reading
from moefy.run.console import Reporter

TOKEN_ROWS = 400_000
"""Most rows of the table `tokens`; with more experts fewer tokens are listed of each."""


def routing_statistics(
    sample: RoutingSample,
    vocabulary: int,
    *,
    seed: int = 0,
    report: Reporter | None = None,
) -> dict[str, Table]:
    """Every statistic of the routing of a sample; `vocabulary` is the model's number of token ids.

    Raises `CorpusError` for samples of under three documents.
    """
    report = report or Reporter(quiet=True)
    frame = RoutingFrame(sample, seed)
    assert int(frame.sample.tokens.ids_T.max()) < vocabulary
    found = _Found(frame)
    for layer in report.track(range(len(sample.packed)), "statistics of routing"):
        found.add(frame.routed(layer))
    return found.tables()


class Routing(RoutingSampler):
    """What is known of a sample of whole documents, and with `controls` whether it holds on other texts."""

    def tables(self) -> dict[str, Table]:
        """All statistics of routing, and the table `replication`."""
        sample, seed = self.sample(), self.work.seed

        def describe(some: RoutingSample, report: Reporter | None = None) -> dict[str, Table]:
            return routing_statistics(some, self.work.reading.vocabulary, seed=seed, report=report)

        found = describe(sample, self.work.report)
        return found | replication(sample, describe, seed=seed) if self.work.controls else found


class _Found:
    """Collects the parts of every layer."""

    def __init__(self, frame: RoutingFrame) -> None:
        self.frame = frame
        self.parts: dict[str, list[Columns]] = {}
        self.totals: list[Totals] = []
        self.pairs: list[Pairs] = []
        self.before: RoutedLayer | None = None
        self.layers: list[int] = []
        """Layers that have pairs."""
        self.masks: list[NDArray[np.bool_]] = []
        random = np.random.default_rng(frame.seed)
        self.drawn_T = np.sort(random.permutation(len(frame))[:FAR_TOKENS])
        experts = sum(frame.sample.experts) * len(KINDS) * 2
        self.shown = int(np.clip(TOKEN_ROWS // max(experts, 1), 1, SHOWN))

    def add(self, routed: RoutedLayer) -> None:
        """Take in one layer."""
        frame = self.frame
        parts = load(frame, routed)
        layer, experts = parts.pop("layers"), parts.pop("experts")
        bits = explained(frame, routed)
        totals = bits.totals(frame.tokens_Q.astype(np.float64)) | lexical_router(frame, routed)
        self.totals.append(totals)
        layer |= ratio_columns(frame, totals) | vocabulary_specialization(frame, routed)
        experts |= bits.experts(frame, routed)
        if routed.experts <= MANY_EXPERTS:
            parts["domains"] = domain_specialization(frame, routed)
            parts["tokens"] = token_lists(frame, routed, self.shown)
            layer |= self._together(routed)
        everyone = np.arange(routed.shared + routed.experts)
        parts["layers"] = {"layer": [routed.layer]} | layer
        parts["experts"] = {"layer": [routed.layer] * len(everyone), "expert": everyone} | experts
        for name, columns in parts.items():
            self.parts.setdefault(name, []).append(columns)

    def _together(self, routed: RoutedLayer) -> Columns:
        """Co-activation; the columns of `layers` that come of it."""
        inside = within_layer(self.frame, routed)
        self.pairs.append(inside)
        if self.before is not None and self.before.layer == routed.layer - 1:
            self.pairs.append(between_layers(self.frame, self.before, routed))
        self.before = routed
        self.layers.append(routed.layer)
        self.masks.append(routed.mask_TE[self.drawn_T] > 0)
        phi_P = np.abs(inside.figures["phi"])
        phi_P = phi_P[~np.isnan(phi_P)]
        chance = (routed.active_T.mean() - 1) / max(routed.experts - 1, 1)
        return {
            "together_chance": np.array([max(chance, 0.0)]),
            "phi_mean": np.array([phi_P.mean() if len(phi_P) else np.nan]),
            "phi_max": np.array([phi_P.max(initial=0.0)]),
        }

    def tables(self) -> dict[str, Table]:
        """All tables; a q is over the whole table that it stands in."""
        found = {name: joined([table(p) for p in parts]) for name, parts in self.parts.items()}
        if "domains" in found:
            for end in ("", "_adj"):
                p = np.concatenate([part[f"p{end}"] for part in self.parts["domains"]])
                found["domains"] |= table({f"q{end}": q_values(p)})
        if self.pairs:
            pairs, counts = pair_tables(self.pairs)
            found |= {name: table(columns) for name, columns in pairs.items()}
            found["layer_pairs"] = self._layer_pairs(counts)
        totals = {"tokens": [len(self.frame)], "documents": [len(self.frame.tokens_Q)]}
        figures = ratio_columns(self.frame, added(self.totals))
        return found | {"routing": table(totals | {"units": [self.frame.units]} | figures)}

    def _layer_pairs(self, counts: dict[tuple[int, int], dict[str, int]]) -> Table:
        """Every layer with itself and with every other; None where pairs were not tested."""
        best = best_phi(self.layers, self.masks, self.frame.seed)
        keys = [*((layer, layer) for layer in self.layers), *best]
        none = (None, None)
        return table(
            {
                "layer_a": [first for first, _ in keys],
                "layer_b": [second for _, second in keys],
                "phi_best": [best.get(key, none)[0] for key in keys],
                "phi_best_null": [best.get(key, none)[1] for key in keys],
                **{
                    name: [counts.get(key, {}).get(name) for key in keys]
                    for name in ("pairs", "pairs_found", "pairs_shown", "duplicates")
                },
            }
        )


def routing_sample(
    model: PreTrainedModel,
    reading: Reading,
    tokens: int,
    report: Reporter | None = None,
    *,
    seed: int = 0,
) -> RoutingSample:
    """How a moefied model routes about `tokens` held-out tokens, whole documents drawn evenly.

    Two models of one tokenizer and one `seed` get the same documents, as `router_saturation` needs.
    """
    held_Q = reading.documents.of_shard(HELD_OUT)
    chosen_Q = drawn_documents(reading.tokens_Q, tokens, seed, held_Q)
    sampler = RoutingSampler(Pass(model, reading, seed), chosen_Q)
    sizes = [len(batch.samples) for batch in reading.batches]
    firsts = enumerate(zip(reading.first_B, sizes, strict=True))
    batches = [number for number, (at, size) in firsts if chosen_Q[at : at + size].any()]
    observe(model, reading, [sampler], batches=batches, report=report, what="routing")
    return sampler.sample()


def router_saturation(first: RoutingSample, second: RoutingSample, *, seed: int = 0) -> Table:
    """One row per layer: `saturation`, `saturation_chance` (k / E of the first), `saturation_load`
    (routing of the first dealt anew to tokens by load alone, `sum_e f_e f'_e / k`), with intervals.

    Raises `MoefyError` where the samples are not of the same tokens or experts.
    """
    _require_the_same(first, second)
    frame = RoutingFrame(second, seed)
    if len(frame) != len(first.tokens):
        first = first.take(np.isin(first.tokens.document_T, frame.sample.tokens.document_T))
    before = RoutingFrame(first, seed)
    parts = []
    for layer in range(len(second.packed)):
        one, other = before.routed(layer), frame.routed(layer)
        shared_T = {
            "saturation": (one.mask_TE * other.mask_TE).sum(1),
            "saturation_chance": one.active_T * other.active_T / max(one.experts, 1),
            "saturation_load": other.mask_TE @ one.load_E,
        }
        totals = over_running(frame, other, shared_T)
        parts.append(table({"layer": [layer], **ratio_columns(frame, totals)}))
    return joined(parts)


def _require_the_same(first: RoutingSample, second: RoutingSample) -> None:
    one, other = first.tokens, second.tokens
    if len(one) != len(other) or not (
        np.array_equal(one.ids_T, other.ids_T) and np.array_equal(one.position_T, other.position_T)
    ):
        raise MoefyError(
            f"router saturation: the samples are of {len(one)} and {len(other)} tokens that are not "
            "the same; inspect both checkpoints on the same texts with the same seed"
        )
    if (first.experts, first.shared) != (second.experts, second.shared):
        raise MoefyError(
            f"router saturation: experts by layer {first.experts} and {second.experts}, shared "
            f"{first.shared} and {second.shared}; compare checkpoints of the same conversion"
        )
