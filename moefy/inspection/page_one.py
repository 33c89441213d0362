"""Page one: how good the moefied model is, and how much of what is said of its experts is trivial.

Every entry is `value`, `low`, `high` (95 %, over documents or sources unless it says otherwise) and
`what` it is in words; some have a `verdict`. A value is None where it cannot be had, and `what` then
says why. docs/inspection.md defines each.

Shapes: B documents, T tokens.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from moefy.conversion.convert import TOLERANCE
from moefy.data.corpus import Batch, Corpus, load_corpus, make_batches
from moefy.data.documents import HELD_OUT, SELECT
from moefy.data.inputs import read_batches
from moefy.data.shards import BIGRAM_TOKENS, of_conversion
from moefy.errors import CorpusError
from moefy.evaluation.bigram import Bigram
from moefy.evaluation.evaluate import evaluate
from moefy.evaluation.outputs import difference, run_outputs
from moefy.evaluation.statistics import Interval
from moefy.experts.loading import load_dense
from moefy.experts.moefied import of
from moefy.experts.offload import device_of
from moefy.experts.placement import memory_of
from moefy.experts.sparse_mlp import all_experts
from moefy.inspection.in_context import LATE, MODELS, induction, late_tokens
from moefy.inspection.routing.sample import drawn_documents
from moefy.inspection.texts.reading import Reading
from moefy.inspection.texts.table import Table
from moefy.recipe import from_dict
from moefy.run.console import Reporter
from moefy.run.memory import free_memory

_ROUTING = {
    "share_token": "share of the bits of routing that the token alone explains",
    "share_domain": "share of the bits of routing that the domain explains beyond the token",
    "share_rest": "share of the bits of routing that neither token, domain, the token before nor "
    "position explain",
    "lexical_recall": "share of the experts that ran which a table by token id would have run",
}
_STABLE = {
    0.5: "the partition is much the same every time",
    0.1: "partly the same every time",
    -1.0: "the partition is arbitrary: another seed or text gives another one",
}
"""By the least ARI."""

Entries = dict[str, dict[str, Any]]

TOKENS = 60_000
"""Most held-out tokens that quality is measured on."""

_FIGURES = {
    "ce_dense": "cross-entropy of the dense model, nats a token",
    "ce": "cross-entropy of the moefied model, nats a token",
    "ce_increase": "cross-entropy of the moefied model less the dense one's, nats a token",
    "bits_per_byte_dense": "bits of the dense model for a byte of text",
    "bits_per_byte": "bits of the moefied model for a byte of text",
    "cosine": "cosine of the last hidden states, dense and moefied",
    "kl": "KL(dense || moefied), mean over tokens, nats",
    "ce_bigram": "cross-entropy of a bigram fitted on other documents, nats a token",
    "bigram_skill": "bigram skill: 1 is the dense model, 0 knows pairs of tokens alone",
    "agreement": "tokens whose first choice is the dense model's; read it beside the bigram skill only",
}
_TAIL = {
    "p99": "KL that 1 token in 100 exceeds, nats",
    "p99.9": "KL that 1 token in 1000 exceeds, nats",
    "max": "largest KL of a token, nats",
    "top_1_percent_share": "share of all KL in the worst 1 % of tokens",
}
_STRATA = {
    "rank_1": "tokens that the bigram puts first",
    "rank_2_to_10": "tokens that the bigram ranks 2 to 10",
    "rank_over_10": "tokens below the bigram's first 10",
}


def honesty(
    model: PreTrainedModel,
    reading: Reading,
    tables: Mapping[str, Table],
    *,
    bigram: Bigram | None = None,
    tokens: int = TOKENS,
    seed: int = 0,
    report: Reporter | None = None,
) -> Entries:
    """The record of page one, as JSON values.

    Quality is measured on about `tokens` tokens of the held-out shard of the reading, whole documents
    drawn evenly. `bigram` is the baseline of language
    models, fitted on none of its documents; left out, it is fitted on `other_text`. `tables` are those
    of the inspection: what is missing there is None here.
    """
    held_out = _drawn(reading, tokens, seed)
    if bigram is None and held_out[0].targets_BT is not None:
        bigram = fit_bigram(model, reading)
    record = evaluate(model, held_out, bigram=bigram, report=report, seed=seed)
    found = {**_quality(record), **_context(model, reading, seed)}
    found["perfect"] = perfect(model, held_out[0])
    return found | _from_tables(tables)


def _drawn(reading: Reading, tokens: int, seed: int) -> list[Batch]:
    samples = [sample for batch in reading.of_shard(HELD_OUT) for sample in batch.samples]
    size_D = reading.tokens_D[reading.documents.of_shard(HELD_OUT)]
    chosen_D = drawn_documents(size_D, tokens, seed)
    return make_batches([s for s, chosen in zip(samples, chosen_D, strict=True) if chosen])


def fit_bigram(model: PreTrainedModel, reading: Reading) -> Bigram | None:
    """A bigram fitted on `other_text`; None where the model cannot read that."""
    checkpoint = of(model).checkpoint
    context = from_dict(of(model).artefact.recipe).context
    text = other_text(model, reading)
    try:
        batches = read_batches(checkpoint, reading.kind, text, context, BIGRAM_TOKENS)
    except CorpusError:
        return None
    return Bigram(batches, reading.vocabulary)


def other_text(model: PreTrainedModel, reading: Reading) -> Corpus:
    """What a bigram may be fitted on: the shard `select` and the bundled corpus.

    Of the bundled corpus the evaluation shard is left out where the model was converted with it, since
    the held-out documents and their sources are in there.
    """
    artefact = of(model).artefact
    bundled = load_corpus()
    texts = of_conversion(bundled, artefact)
    known = bundled.documents if texts is None else texts["fitted"].documents
    documents = reading.documents
    shard = dict.fromkeys((SELECT, HELD_OUT), documents.documents)
    for name in shard:
        chosen = documents.of_shard(name)
        shard[name] = [d for d, c in zip(documents.documents, chosen, strict=True) if c]
    if any(doc.ids for doc in shard[HELD_OUT]):
        # Documents of token ids come with no tokenizer that could read others.
        known = []
    text = Corpus("other documents", [*known, *shard[SELECT]])
    return text.without(Corpus("held out", shard[HELD_OUT]))


def _quality(record: dict[str, Any]) -> Entries:
    total = record["total"]
    found = {name: _entry(total[name], what) for name, what in _FIGURES.items() if name in total}
    for name, what in _TAIL.items():
        if "kl_tail" in total:
            found[f"kl_{name.replace('.', '_')}"] = _value(total["kl_tail"][name], what)
    if total.get("bigram_skill") is not None:
        found["bigram_skill"]["verdict"] = _skill(found["bigram_skill"])
    for name, what in _STRATA.items():
        row = record.get("strata", {}).get(name)
        if row is None or not row["tokens"]:
            continue
        found[f"{name}_share"] = _entry(row["share"], f"share of the {what}")
        found[f"{name}_kl"] = _entry(row["kl"], f"KL of the {what}, nats")
        found[f"{name}_ce_increase"] = _entry(
            row["ce_increase"], f"CE increase of the {what}, nats"
        )
        found[f"{name}_share_of_kl"] = _entry(row["share_of_kl"], f"share of all KL in the {what}")
    hard = found.get("rank_over_10_share_of_kl")
    if hard is not None and hard["low"] is not None:
        share = found["rank_over_10_share"]["value"]
        more = "yes" if hard["low"] > share else "no" if hard["high"] < share else "not shown"
        hard["verdict"] = f"damage falls on hard tokens more than their share: {more}"
    found["documents"] = _value(record["documents"], "held-out documents behind these figures")
    found["tokens"] = _value(record["tokens"], "tokens of them")
    found["ffn_density"] = _value(record["ffn_density"], "share of MLP neurons that ran")
    found["active_budget"] = _value(
        record["active_budget"], "MLP weights read per token, router included, over the dense MLPs'"
    )
    return found


def _skill(entry: dict[str, Any]) -> str:
    low, high = entry["low"], entry["high"]
    if low is None:
        return "one document alone: no interval, no verdict"
    if low > 1:
        return "better than the dense model on these documents"
    if high < 0:
        return "worse than a bigram"
    kept = f"{max(0.0, low):.0%} to {min(1.0, high):.0%}"
    return f"keeps {kept} of what the dense model knows beyond pairs of tokens"


def _context(model: PreTrainedModel, reading: Reading, seed: int) -> Entries:
    """Induction and late tokens of both models."""
    if reading.kind != "decoder":
        return {}
    found: Entries = {}
    repeated = induction(model, reading, seed=seed)
    for name in MODELS:
        what = (
            f"induction, {name}: cross-entropy of random tokens seen a second time less the first, "
            "nats a token; the interval is over sequences"
        )
        if repeated is None:
            found[f"induction_{name}"] = _value(None, f"{what}; the model's context is too short")
            continue
        entry = found[f"induction_{name}"] = _interval(repeated[name], what)
        entry["verdict"] = "repeats are used" if entry["high"] < 0 else "no use of repeats is shown"
    late = late_tokens(model, reading, seed=seed)
    for name in MODELS:
        what = f"late tokens, {name}: cross-entropy at positions over {LATE} less below 32, nats"
        if late is None:
            found[f"late_{name}"] = _value(None, f"{what}; under two documents are so long")
        else:
            intervals, documents = late
            found[f"late_{name}"] = _interval(intervals[name], f"{what}; {documents} documents")
    return found


@torch.no_grad()
def perfect(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """Largest difference of an output to the stock dense model's, every expert on, on one batch."""
    what = "largest difference of an output to the dense model's with every expert on"
    checkpoint = of(model).checkpoint
    if memory_of(checkpoint) > free_memory():
        return _value(None, f"{what}; memory does not hold both models")
    with all_experts(model):
        got = run_outputs(model, batch, keep_BT=batch.mask())
    dense = load_dense(checkpoint, dtype=model.dtype, device_map={"": device_of(model)})
    error, size, most = difference(got, run_outputs(dense, batch, keep_BT=batch.mask()))
    entry = _value(most, what)
    relative = error / size
    entry["relative"] = relative
    equal = relative <= TOLERANCE[model.dtype]
    entry["verdict"] = f"{'equal' if equal else 'NOT equal'} up to {relative:.1e} (relative)"
    return entry


def _from_tables(tables: Mapping[str, Table]) -> Entries:
    """What the other parts found, over layers."""
    layers, routing = tables.get("layers", {}), tables.get("routing", {})
    found = {"stability": _stability(layers)}
    for name, what in _ROUTING.items():
        found[name] = _of_routing(routing, name, what)
    control = tables.get("random_weights")
    what = "figures (of a layer) that tell trained weights from random ones, as a share"
    if control is None:
        found["random_weights"] = _value(None, f"{what}; not measured")
        return found
    known = [bool(v) for v in control["separates"] if v is not None]
    share = sum(known) / len(known) if known else None
    entry = found["random_weights"] = _value(share, f"{what}; of {len(known)}")
    not_told = sorted(
        {f for f, v in zip(control["figure"], control["separates"], strict=True) if v is False}
    )
    if not_told:
        entry["verdict"] = f"no evidence in some layer: {', '.join(not_told)}"
    return found


def _stability(layers: Table) -> dict[str, Any]:
    """Mean over layers, with the least and the largest layer as its ends."""
    what = "stability: ARI between partitions from other seeds and texts"
    values = [float(v) for v in layers.get("stability_ari", []) if v is not None]
    if not values:
        return _value(None, f"{what}; not measured")
    entry = _value(float(np.mean(values)), f"{what}; mean, least and largest of the layers")
    words = next(word for least, word in _STABLE.items() if entry["value"] >= least)
    return entry | {"low": min(values), "high": max(values), "verdict": words}


def _of_routing(routing: Table, name: str, what: str) -> dict[str, Any]:
    """A figure over all layers together."""
    if not routing.get(name) or routing[name][0] is None:
        return _value(None, f"{what}; not measured")
    ends = {end: routing.get(f"{name}_{end}", [None])[0] for end in ("low", "high")}
    return _value(routing[name][0], what) | ends


def _entry(given: dict[str, Any] | None, what: str) -> dict[str, Any]:
    """From what `evaluate` records."""
    if given is None:
        return _value(None, f"{what}; the dense model is no better than the bigram")
    low, high = given["ci95"] or (None, None)
    return {**_value(given["mean"], what), "low": low, "high": high}


def _interval(given: Interval, what: str) -> dict[str, Any]:
    mean, low, high = (float(v[0]) for v in (given.mean_C, given.low_C, given.high_C))
    return {**_value(mean, what), "low": low, "high": high}


def _value(value: float | None, what: str) -> dict[str, Any]:
    value = None if value is None or not math.isfinite(value) else value
    return {"value": value, "low": None, "high": None, "what": what}
