"""What a model makes of its context, before and after conversion: induction, and long documents.

    induction    random tokens, then the same again: how much better are they known the second time?
    late tokens  how much better are tokens far into a document predicted than those at its start?

Both are differences of cross-entropy (nats/token; below 0 is better) that no bigram can show.

Shapes: B sequences or documents, T tokens.
"""

from collections.abc import Iterable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.data.corpus import IGNORED, Batch, Document, Sample, make_batches
from moefy.data.documents import Ints
from moefy.evaluation import outputs
from moefy.evaluation.statistics import Floats, Interval, ratio_interval, units
from moefy.experts.sparse_mlp import all_experts
from moefy.inspection.texts.reading import Reading

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
    """For `dense` and `moefied`: cross-entropy of the second time less that of the first.

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
    batches = _batches(torch.cat([start_BT, drawn_BT, drawn_BT], 1))
    # A position is judged by the token after it.
    first = slice(len(begin), len(begin) + length - 1)
    second = slice(len(begin) + length, len(begin) + 2 * length - 1)
    found = {}
    for name in MODELS:
        nats_BT = torch.cat([nats(model, batch, name) for batch in batches])
        away_B = (nats_BT[:, second].mean(1) - nats_BT[:, first].mean(1)).double().numpy()
        found[name] = _interval(away_B, np.ones(SEQUENCES), np.arange(SEQUENCES), seed)
    return found


def late_tokens(
    model: PreTrainedModel, reading: Reading, *, seed: int = 0
) -> tuple[dict[str, Interval], int] | None:
    """For `dense` and `moefied`: mean cross-entropy at positions above 256 less that below 32, over
    documents, and of how many documents; None where no two are so long."""
    held = units(reading.documents)
    chosen = [
        (number, sample)
        for batch, at in zip(reading.batches, reading.first_B, strict=True)
        for number, sample in enumerate(batch.samples, at)
        if len(sample.inputs["input_ids"]) > LATE + LEAST_LATE
    ]
    order = np.random.default_rng(seed).permutation(len(chosen))[:LATE_DOCUMENTS]
    chosen = [chosen[index] for index in sorted(order)]
    if len(chosen) < 2:
        return None
    number_of = {id(sample): number for number, sample in chosen}
    batches = make_batches([sample for _, sample in chosen])
    unit_B = np.array([held[number_of[id(sample)]] for b in batches for sample in b.samples])
    found = {}
    for name in MODELS:
        away: list[float] = []
        for batch in batches:
            nats_BT = nats(model, batch, name)
            for nats_T, sample in zip(nats_BT, batch.samples, strict=True):
                end = len(sample.inputs["input_ids"]) - 1
                away.append(float(nats_T[LATE + 1 : end].mean() - nats_T[:EARLY].mean()))
        found[name] = _interval(np.array(away), np.ones(len(away)), unit_B, seed)
    return found, len(chosen)


@torch.no_grad()
def nats(model: PreTrainedModel, batch: Batch, name: str = "moefied") -> Tensor:
    """Nats of every predicted token `[B, T]` on the CPU, zero where nothing is predicted; `dense` runs
    every expert."""
    with all_experts(model) if name == "dense" else nullcontext():
        said = outputs.run_outputs(model, batch)
    return outputs.placed(outputs.ce_per_token(said), said.keep_BT)


def _batches(ids_BT: Tensor) -> list[Batch]:
    return make_batches(_samples(ids_BT))


def _samples(ids_BT: Tensor) -> Iterable[Sample]:
    end = torch.tensor([IGNORED])
    for number, ids_T in enumerate(ids_BT):
        document = Document("random", str(number), ids=tuple(ids_T.tolist()))
        inputs = {"input_ids": ids_T, "attention_mask": torch.ones_like(ids_T)}
        yield Sample(document, inputs, torch.cat([ids_T[1:], end]), 0)


def _interval(top_B: Floats, bottom_B: Floats, unit_B: Ints, seed: int) -> Interval:
    return ratio_interval(top_B[:, None], bottom_B, unit_B, seed=seed)
