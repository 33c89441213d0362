"""The quality summary: how good the moefied model is, and how much of what is said of its experts is trivial.

It stands before all else. Two of its figures say what a model makes of its context, which no bigram can:

    induction    random tokens, then the same again: how much better are they known the second time?
    late tokens  how much better are tokens far into a document predicted than those at its start?

Every entry is `value`, `low`, `high` (95 %, over documents or sources unless it says otherwise) and
`what` it is in words; some have a `verdict`. A value is None where it cannot be had, and `what` then
says why. docs/inspection.md defines each.

Shapes: B documents of a batch, or of all, T tokens.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.conversion.verification import TOLERANCE
from moefy.data.corpus import Batch, Corpus, load_corpus, make_batches
from moefy.data.inputs import read_batches
from moefy.data.shards import BIGRAM_TOKENS, HELD_OUT, SELECT, Ints, of_conversion
from moefy.errors import CorpusError
from moefy.evaluation.bigram import Bigram
from moefy.evaluation.evaluate import evaluate
from moefy.evaluation.outputs import difference, judged, outputs_of_all, run_outputs
from moefy.evaluation.statistics import Interval, ratio_interval, units
from moefy.experts.loading import load_dense
from moefy.experts.moefied import of
from moefy.experts.placement import device_of, memory_of
from moefy.experts.sparse_mlp import all_experts
from moefy.inspection.record import Table
from moefy.inspection.routing import drawn_documents
from moefy.inspection.texts import Reading, sample_of_ids
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
_OF_STRATUM = {
    "share": "share of the {}",
    "kl": "KL of the {}, nats",
    "ce_increase": "CE increase of the {}, nats",
    "share_of_kl": "share of all KL in the {}",
}
_COUNTS = {
    "documents": "held-out documents behind these figures",
    "tokens": "tokens of them",
    "ffn_density": "share of MLP neurons that ran",
    "active_budget": "bits read per token over those of the dense MLPs, router included",
    "bits_read": "bits read per token and MLP weight, router included; 16 is dense",
}


def quality_summary(
    model: PreTrainedModel,
    reading: Reading,
    tables: Mapping[str, Table],
    *,
    seed: int = 0,
    report: Reporter | None = None,
) -> Entries:
    """The entries by name, as JSON values.

    Quality is measured on about `TOKENS` tokens of the held-out shard of the reading, whole documents
    drawn evenly. The baseline of language models is a bigram fitted on `other_text`. `tables` are those of
    the inspection: what is missing there is None here.
    """
    held_out = _drawn(reading, TOKENS, seed)
    bigram = None if held_out[0].targets_BT is None else fit_bigram(model, reading)
    record = evaluate(model, held_out, bigram=bigram, report=report, seed=seed)
    found = {**_quality(record), **_context(model, reading, seed)}
    found["perfect"] = perfect(model, held_out[0])
    return found | _from_tables(tables)


def _drawn(reading: Reading, tokens: int, seed: int) -> list[Batch]:
    samples = [sample for batch in reading.of_shard(HELD_OUT) for sample in batch.samples]
    size_Q = reading.tokens_Q[reading.documents.of_shard(HELD_OUT)]
    chosen_Q = drawn_documents(size_Q, tokens, seed)
    return make_batches([s for s, chosen in zip(samples, chosen_Q, strict=True) if chosen])


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
    pairs = list(zip(documents.documents, documents.shards, strict=True))
    shard = {name: [doc for doc, at in pairs if at == name] for name in (SELECT, HELD_OUT)}
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
    found |= _strata(record.get("strata", {}))
    return found | {name: _value(record[name], what) for name, what in _COUNTS.items()}


def _strata(strata: dict[str, Any]) -> Entries:
    """How good the model is at tokens that a bigram finds easy and hard."""
    found = {}
    for name, tokens in _STRATA.items():
        row = strata.get(name)
        if row is not None and row["tokens"]:
            for figure, what in _OF_STRATUM.items():
                found[f"{name}_{figure}"] = _entry(row[figure], what.format(tokens))
    hard = found.get("rank_over_10_share_of_kl")
    if hard is not None and hard["low"] is not None:
        share = found["rank_over_10_share"]["value"]
        more = "yes" if hard["low"] > share else "no" if hard["high"] < share else "not shown"
        hard["verdict"] = f"damage falls on hard tokens more than their share: {more}"
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
        got = outputs_of_all(model, batch)
    dense = load_dense(checkpoint, dtype=model.dtype, device_map={"": device_of(model)})
    error, size, most = difference(got, outputs_of_all(dense, batch))
    relative = error / size
    equal = "equal" if relative <= TOLERANCE[model.dtype] else "NOT equal"
    verdict = f"{equal} up to {relative:.1e} (relative)"
    return _value(most, what) | {"relative": relative, "verdict": verdict}


def _from_tables(tables: Mapping[str, Table]) -> Entries:
    """What the other parts found, over layers."""
    routing = tables.get("routing", {})
    found = {"stability": _stability(tables.get("layers", {}))}
    found |= {name: _of_routing(routing, name, what) for name, what in _ROUTING.items()}
    return found | {"random_weights": _told(tables.get("random_weights"))}


def _told(control: Table | None) -> dict[str, Any]:
    """How many figures tell trained weights from random ones."""
    what = "figures (of a layer) that tell trained weights from random ones, as a share"
    if control is None:
        return _value(None, f"{what}; not measured")
    pairs = list(zip(control["figure"], control["separates"], strict=True))
    known = [bool(told) for _, told in pairs if told is not None]
    entry = _value(sum(known) / len(known) if known else None, f"{what}; of {len(known)}")
    not_told = sorted({figure for figure, told in pairs if told is False})
    if not_told:
        entry["verdict"] = f"no evidence in some layer: {', '.join(not_told)}"
    return entry


def _stability(layers: Table) -> dict[str, Any]:
    """Mean over layers, with the least and the largest layer as its ends."""
    what = "stability: ARI between partitions from other seeds and texts"
    values = [float(v) for v in layers.get("stability_ari", []) if v is not None]
    if not values:
        return _value(None, f"{what}; not measured")
    mean, what = float(np.mean(values)), f"{what}; mean, least and largest of the layers"
    words = next(word for least, word in _STABLE.items() if mean >= least)
    return _value(mean, what, min(values), max(values)) | {"verdict": words}


def _of_routing(routing: Table, name: str, what: str) -> dict[str, Any]:
    """A figure over all layers together."""
    if not routing.get(name) or routing[name][0] is None:
        return _value(None, f"{what}; not measured")
    ends = (routing.get(f"{name}_{end}", [None])[0] for end in ("low", "high"))
    return _value(routing[name][0], what, *ends)


def _entry(given: dict[str, Any] | None, what: str) -> dict[str, Any]:
    """From what `evaluate` records."""
    if given is None:
        return _value(None, f"{what}; the dense model is no better than the bigram")
    return _value(given["mean"], what, *(given["ci95"] or ()))


def _interval(given: Interval, what: str) -> dict[str, Any]:
    mean, low, high = (float(v[0]) for v in (given.mean_C, given.low_C, given.high_C))
    return _value(mean, what, low, high)


def _value(
    value: float | None, what: str, low: float | None = None, high: float | None = None
) -> dict[str, Any]:
    value = None if value is None or not math.isfinite(value) else value
    return {"value": value, "low": low, "high": high, "what": what}


SEQUENCES = 32
LENGTH = 64
"""Tokens of a sequence before it is repeated."""
EARLY, LATE = 32, 256
"""Positions below and above which tokens are compared."""
LEAST_LATE = 16
"""Late tokens that a document must have."""
LATE_DOCUMENTS = 64
"""Most documents that are read for it."""
MODELS = ("dense", "moefied")


def induction(
    model: PreTrainedModel, reading: Reading, *, seed: int = 0
) -> dict[str, Interval] | None:
    """For `dense` and `moefied`: cross-entropy of the second time less that of the first, nats a token.

    Tokens are drawn evenly from those that the documents hold; what all documents begin with stands
    first. The first token of either half is left out: nothing tells that a repetition begins. None
    where the model's positions do not reach for it.
    """
    ids = [sample.inputs["input_ids"] for batch in reading.batches for sample in batch.samples]
    firsts = {int(ids_T[0]) for ids_T in ids}
    begin = sorted(firsts) if len(firsts) == 1 else []
    known = torch.unique(torch.cat(ids))
    known = known[~torch.isin(known, torch.tensor(begin, dtype=known.dtype))]
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    length = min(LENGTH, (most - len(begin)) // 2)
    if length < 8 or len(known) < 8:
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn_BT = known[torch.randint(len(known), (SEQUENCES, length), generator=generator)]
    start_BT = torch.tensor([begin] * SEQUENCES, dtype=known.dtype).view(SEQUENCES, len(begin))
    ids_BT = torch.cat([start_BT, drawn_BT, drawn_BT], 1)
    batches = make_batches(sample_of_ids("random", ids_T) for ids_T in ids_BT)
    # A position is judged by the token after it.
    first = slice(len(begin), len(begin) + length - 1)
    second = slice(len(begin) + length, len(begin) + 2 * length - 1)

    def away(ce_BT: Tensor, _: Batch) -> list[float]:
        return (ce_BT[:, second].mean(1) - ce_BT[:, first].mean(1)).tolist()

    return _of_both(model, batches, away, np.arange(SEQUENCES), seed)


def late_tokens(
    model: PreTrainedModel, reading: Reading, *, seed: int = 0
) -> tuple[dict[str, Interval], int] | None:
    """For `dense` and `moefied`: mean cross-entropy at positions above 256 less that below 32, over
    documents, and of how many documents; None where no two are so long."""
    unit_Q = units(reading.documents)
    samples = [sample for batch in reading.batches for sample in batch.samples]
    long_Q = np.flatnonzero(reading.tokens_Q > LATE + LEAST_LATE)
    order = np.random.default_rng(seed).permutation(len(long_Q))[:LATE_DOCUMENTS]
    chosen = long_Q[np.sort(order)]
    if len(chosen) < 2:
        return None
    number_of = {id(samples[number]): number for number in chosen}
    batches = make_batches([samples[number] for number in chosen])
    unit_B = np.array([unit_Q[number_of[id(s)]] for batch in batches for s in batch.samples])

    def away(ce_BT: Tensor, batch: Batch) -> list[float]:
        ends = [len(sample.inputs["input_ids"]) - 1 for sample in batch.samples]
        return [
            float(ce_T[LATE + 1 : end].mean() - ce_T[:EARLY].mean())
            for ce_T, end in zip(ce_BT, ends, strict=True)
        ]

    return _of_both(model, batches, away, unit_B, seed), len(chosen)


def _of_both(
    model: PreTrainedModel,
    batches: list[Batch],
    away: Callable[[Tensor, Batch], list[float]],
    unit_B: Ints,
    seed: int,
) -> dict[str, Interval]:
    """The mean of a difference of cross-entropies within documents, for the dense and the moefied model."""
    found = {}
    for name in MODELS:
        with all_experts(model) if name == "dense" else nullcontext():
            away_B = [
                value
                for one in judged(partial(run_outputs, model), batches)
                for value in away(one.placed("ce"), one.batch)
            ]
        top_B1 = np.array(away_B)[:, None]
        found[name] = ratio_interval(top_B1, np.ones(len(away_B)), unit_B, seed=seed)
    return found
