"""How far a moefied model is from its dense self, on documents that nothing was fitted on.

    record = evaluate(model, batches)

Language models: cross-entropy (nats/token), bits/byte, KL(dense || sparse) mean and tail
(nats/token), top-1 agreement. Encoders and models without a head: cosine of the last hidden states, token
by token. Labels of tokens, documents or images, and where an answer starts and ends: KL and agreement.
Regressors: squared error. Every mean comes per domain with a 95 %
bootstrap interval over sources, or over documents where a domain has fewer than 20 sources
("single-source" then). Selection is always applied, and padding never counts.

What a mean hides comes with it: the tail of KL, the figures without first tokens and attention
sinks, the strata of a bigram, the router beside the oracle, FFN density by layer and domain.
docs/evaluation.md defines every figure.

Shapes: B documents, T tokens, V vocabulary or classes, D width.
"""

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.data.corpus import Batch
from moefy.evaluation.bigram import Bigram
from moefy.evaluation.groups import (
    AFTER_FIRST,
    ALL,
    PLAIN,
    SINKS,
    STRATA,
    TIMES_MEDIAN,
    Sinks,
    Sums,
    finding_sinks,
    group_record,
    groups,
    sums_of,
    tail,
)
from moefy.evaluation.outputs import (
    Figures,
    Judged,
    Outputs,
    compared,
    cosine,
    judged,
    predictions,
    run_outputs,
    squared_error,
    states_of,
)
from moefy.evaluation.routing import FfnLoad, HeadLoad, RouterQuality
from moefy.evaluation.statistics import ratios, unit_words, units_of
from moefy.experts.moefied import of
from moefy.experts.passes import observing
from moefy.experts.sparse_mlp import all_experts
from moefy.models.answers import answer_of
from moefy.models.locate import sites
from moefy.run.computing import machine
from moefy.run.console import Reporter


@dataclass
class DocumentSums:
    """Sums over one document's tokens, from which every mean is made."""

    domain: str
    source_id: str
    bytes: int
    sums: Sums


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    batches: list[Batch],
    *,
    against: PreTrainedModel | None = None,
    bigram: Bigram | None = None,
    report: Reporter | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare a moefied model with the dense one on these batches; returns a JSON record.

    `against` is the dense model; left out, it is the same weights with every expert on, which
    conversion has verified to be the source. `bigram`, for language models, is the baseline that
    skill and strata are taken from, fitted on other documents; left out, there are none.
    """
    report = report or Reporter(quiet=True)
    load, quality = FfnLoad(model), RouterQuality(model, batches, seed=seed)
    heads = HeadLoad(model)
    sinks_BT: list[Tensor | None] = []

    def dense(batch: Batch) -> Outputs:
        with _dense(model, against), _sinks(model, against, batch) as sinks:
            outputs = _outputs(model if against is None else against, batch)
        sinks_BT.append(None if sinks is None else sinks.marked_BT)
        return outputs

    def sparse(batch: Batch) -> Outputs:
        with observing(model, batch, load, quality, heads=heads):
            return _outputs(model, batch)

    every = judged(sparse, report.track(batches, "evaluate"), dense, figures_of(model))
    documents, kl = document_sums(every, sinks_BT, bigram)
    record = summarise(documents, kl, load, quality, heads, seed)
    if against is not None:
        record["dense"] = "another checkpoint"
    if bigram is not None:
        record["bigram"] = bigram.record()
    return record


def evaluate_dense(
    model: PreTrainedModel, batches: list[Batch], *, report: Reporter, seed: int = 0
) -> dict[str, Any]:
    """Cross-entropy and top-1 accuracy of a dense model, by domain; a JSON record."""

    def figures(want: Outputs, got: Outputs) -> dict[str, Tensor]:
        found = predictions(want, got)
        return {"ce": found["ce"], "accuracy": found["right"]}

    every = judged(partial(run_outputs, model), report.track(batches, "evaluate"), of=figures)
    documents, _ = document_sums(every, [None] * len(batches), None)
    total = _summary(documents, seed)
    return {
        "kind": "evaluation",
        "dense": "the model itself",
        "documents": len(documents),
        "tokens": total["tokens"],
        "total": total,
        "domains": _by_domain(documents, seed),
        "machine": machine(),
    }


def _by_domain(documents: list[DocumentSums], seed: int) -> dict[str, Any]:
    return {
        domain: _summary([d for d in documents if d.domain == domain], seed)
        for domain in sorted({doc.domain for doc in documents})
    }


def summarise(
    documents: list[DocumentSums],
    kl: list[Tensor],
    load: FfnLoad,
    quality: RouterQuality,
    heads: HeadLoad,
    seed: int,
) -> dict[str, Any]:
    """The record of what was compared and heard: sums of every document, KL of every token."""
    record: dict[str, Any] = {
        "kind": "evaluation",
        "dense": "the same weights, all experts on",
        "documents": len(documents),
        "tokens": int(sum(doc.sums[ALL]["tokens"] for doc in documents)),
        "first_token": "included",
        "ffn_density": load.density(),
        "bits_read": load.bits_read(),
        "active_budget": load.active_budget(),
        "active_compute": load.active_compute(),
        "active_parameters": load.active_parameters(),
        **heads.record(),
        "total": _summary(documents, seed),
        "domains": _by_domain(documents, seed),
        **_by_group(documents, seed),
        "router_quality": quality.record(),
        "ffn_density_by_layer": load.table(),
        "machine": machine(),
    }
    if kl:
        record["total"]["kl_tail"] = tail(torch.cat(kl).numpy())
        record["total"]["kl_p99"] = record["total"]["kl_tail"]["p99"]
    return record


def _dense(model: PreTrainedModel, against: PreTrainedModel | None) -> AbstractContextManager[None]:
    return nullcontext() if against is not None else all_experts(model)


def _sinks(
    model: PreTrainedModel, against: PreTrainedModel | None, batch: Batch
) -> AbstractContextManager[Sinks | None]:
    """Find sinks in the dense pass; images, and outputs of whole documents, have none to look for."""
    if batch.mask() is None or answer_of(model).pooled:
        return nullcontext()
    if against is not None:
        return finding_sinks(against, sites(against), batch)
    return finding_sinks(model, of(model).sites, batch)


def _outputs(model: PreTrainedModel, batch: Batch) -> Outputs:
    """What a batch is compared by, from one pass: whoever listens hears every token once."""
    masked = answer_of(model).form == "masked"
    return states_of(model, batch) if masked else run_outputs(model, batch)


def figures_of(model: PreTrainedModel) -> Figures:
    """What an evaluation of this model measures `[J]`."""
    answer = answer_of(model)
    if answer.classes:
        return compared
    if answer.form == "values":
        return lambda dense, sparse: {"mse": squared_error(dense, sparse)}
    return lambda dense, sparse: {"cosine": cosine(dense, sparse)}


def document_sums(
    every: Iterable[Judged], sinks_BT: Sequence[Tensor | None], bigram: Bigram | None
) -> tuple[list[DocumentSums], list[Tensor]]:
    """Sums of every figure over every group of tokens of each document, and KL of every token.

    `sinks_BT` marks the sinks of every batch; its marks may be made while the batches are judged.
    """
    documents: list[DocumentSums] = []
    kl: list[Tensor] = []
    for number, one in enumerate(every):
        values_BT, rank_BT = {name: one.placed(name) for name in one.figures_J}, None
        if "kl" in values_BT:
            kl.append(one.figures_J["kl"].cpu())
        if one.batch.targets_BT is not None and bigram is not None:
            values_BT["ce_bigram"], rank_BT = bigram.score(one.batch)
        sums = sums_of(values_BT, groups(one.keep_BT, sinks_BT[number], rank_BT))
        documents += [
            DocumentSums(sample.document.domain, sample.document.source_id, sample.bytes, found)
            for sample, found in zip(one.batch.samples, sums, strict=True)
        ]
    return documents, kl


def _summary(documents: list[DocumentSums], seed: int) -> dict[str, Any]:
    """Means over tokens with bootstrap intervals."""
    names = list(documents[0].sums[ALL])
    sums = {name: np.array([doc.sums[ALL][name] for doc in documents]) for name in names}
    bytes_ = np.array([doc.bytes for doc in documents])
    tokens = sums.pop("tokens")
    parts = {name: (values, tokens) for name, values in sums.items()}
    if "ce" in sums:
        scored = {"": sums["ce"]}
        if "ce_dense" in sums:
            scored["_dense"] = sums["ce_dense"]
            parts["ce_increase"] = sums["ce"] - sums["ce_dense"], tokens
        if bytes_.sum():
            parts |= {f"bits_per_byte{n}": (ce, bytes_ * math.log(2)) for n, ce in scored.items()}
    if "ce_bigram" in sums:
        ahead = sums["ce_bigram"] - sums["ce_dense"]
        # Of a dense model that is no better than the bigram there is no skill to lose.
        parts["bigram_skill"] = (
            sums["ce_bigram"] - sums["ce"],
            ahead if ahead.sum() > 0 else np.zeros(len(ahead)),
        )
    domains, sources = _labels(documents)
    return {
        "documents": len(documents),
        "sources": len(set(sources)),
        "bootstrap": unit_words(domains, sources),
        "tokens": int(tokens.sum()),
        **ratios(parts, units_of(domains, sources), seed=seed),
    }


def _labels(documents: list[DocumentSums]) -> tuple[list[str], list[tuple[str, str]]]:
    """Domains and sources."""
    return [doc.domain for doc in documents], [(doc.domain, doc.source_id) for doc in documents]


def _by_group(documents: list[DocumentSums], seed: int) -> dict[str, Any]:
    """The loss increase over all tokens beside that over some of them."""
    unit_Q, sums = units_of(*_labels(documents)), [doc.sums for doc in documents]

    def record(group: str) -> dict[str, Any]:
        return group_record(sums, group, unit_Q, seed)

    found: dict[str, Any] = {}
    if SINKS in sums[0]:
        found["positions"] = {name: record(name) for name in (ALL, AFTER_FIRST, PLAIN, SINKS)}
        found["positions"]["sink_is_over_median_times"] = TIMES_MEDIAN
    if next(iter(STRATA)) in sums[0]:
        found["strata"] = {name: record(name) for name in STRATA}
    return found
