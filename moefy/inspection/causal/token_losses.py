"""Where two models differ: `delta_t = log p_base(x_t) - log p_other(x_t)`, token by token.

    tables = token_losses(dense, pruned, reading)

The two may be any models with the same tokenizer, or functions from a batch to logits. Positive: the
other model predicts the token worse. A mean hides where the difference sits: here are both tails,
every domain, classes of tokens, and the share of all losses that the worst 1 % of tokens holds.

Language models: the increase of cross-entropy and KL(base || other), in nats. With `z = logits - base`
and p the base's probabilities,

    m = <p, z>,   s = sum_v p_v exp(z_v - m) / sum_v p_v,   KL = log s,   increase = m + log s - z_target

so that small effects are not lost in the difference of large numbers, nor in a sum of p that is 1 but for
rounding. Encoders have no next token:
their loss is 1 - cosine of the last hidden states, and they have no KL. It is taken as
`||u - v||^2 / 2` of the states at unit length, which is the same but never below 0, nor anything but 0
where nothing changed.

Memory of `differences`: 40 bytes a token, and the logits of two runs of one batch.

Shapes: B documents of a batch, P positions, V vocabulary, J judged tokens, Q documents, C cells
(of `Reference` a chunk of tokens).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from moefy.data.corpus import Batch
from moefy.data.documents import HELD_OUT
from moefy.errors import MoefyError
from moefy.evaluation.groups import TOP, tail
from moefy.evaluation.outputs import (
    Outputs,
    ce_per_token,
    judged_positions,
    outputs_of,
    per_position,
    run_outputs,
)
from moefy.evaluation.statistics import Floats, Interval, ratio_interval, summed, units
from moefy.experts.passes import walk
from moefy.experts.sparse_mlp import all_experts
from moefy.inspection.account import tokens_of
from moefy.inspection.causal.documents import MIN_DOCUMENTS
from moefy.inspection.record import Table, table
from moefy.inspection.texts import Reading
from moefy.inspection.texts.tokens import Tokens, classes_of, token_classes
from moefy.run.console import Reporter
from moefy.run.processes import ALONE, Processes

NATS, COSINE = "nats per token", "1 - cosine of the last hidden states"
_CHUNK = 2**18
"""Logits compared at a time: few enough for the processor's caches."""
_LARGEST = 80.0


def output(model: PreTrainedModel, batch: Batch) -> Outputs:
    """What a run is judged by: logits, or last hidden states of an encoder."""
    if batch.targets_BT is not None:
        return run_outputs(model, batch)
    results: list[Any] = []
    with model.base_model.register_forward_hook(lambda _, __, result: results.append(result)):
        walk(model, batch)
    return outputs_of(batch, torch.as_tensor(results[-1][0]))


class Reference:
    """The base run of one batch."""

    def __init__(self, base: Outputs) -> None:
        """`base` is what `output` gave. Few logits are kept, many made again for every comparison."""
        self.base = base.with_logits()
        self.p_JV: Tensor | None = None
        if base.classes and self.base.head is None:
            rows_JV = self.base.rows_JD
            self.p_JV = self.base.logits(rows_JV).softmax(-1)

    def compare(self, other: Outputs) -> tuple[Tensor, Tensor | None]:
        """Loss increase `[J]` of another run of the batch, and KL `[J]` of language models."""
        if not self.base.classes:
            return per_position(_apart, self.base, other)[0], None
        ce_J, kl_J = per_position(self._increase, self.base, other)
        return ce_J, kl_J

    def _increase(self, here: slice, base_CV: Tensor, other_CV: Tensor) -> tuple[Tensor, ...]:
        assert self.base.targets_J is not None
        target_C = self.base.targets_J[here]
        p_CV = base_CV.softmax(-1) if self.p_JV is None else self.p_JV[here]
        ce, kl, one_V = [], [], torch.ones_like(other_CV[:1])
        step = max(1, _CHUNK // other_CV.shape[1])
        for first in range(0, len(other_CV), step):
            at = slice(first, first + step)
            p, z = p_CV[at], other_CV[at] - base_CV[at]
            of_target = z.gather(1, target_C[at, None])[:, 0]
            m = torch.linalg.vecdot(p, z)
            z.sub_(m[:, None]).clamp_(max=_LARGEST).exp_()
            log_s = (torch.linalg.vecdot(p, z) / torch.linalg.vecdot(p, one_V)).log()
            ce.append(m + log_s - of_target)
            kl.append(log_s.clamp_min(0))
        return torch.cat(ce), torch.cat(kl)

    def target_log_p(self) -> Tensor:
        """Log-probability `[J]` that the base gives to the targets."""
        return -ce_per_token(self.base)


def _apart(_: slice, base_CD: Tensor, other_CD: Tensor) -> tuple[Tensor]:
    """1 - cosine `[C]`, as the squared distance of unit vectors."""
    away_CD = normalize(base_CD, dim=-1) - normalize(other_CD, dim=-1)
    return (away_CD.square().sum(-1) / 2,)


Logits = Callable[[Batch], Tensor | Outputs]
"""From a batch to logits `[B, P, V]`, or to what stands for them."""
TOKENS = 50_000
"""Tokens that are compared by default."""
SHOWN = 50
_ROUNDING = 1e-6
"""Nats that runs in fp32 differ by where nothing differs."""


@dataclass(frozen=True)
class Differences:
    """Every judged token `[J]` of the texts."""

    tokens: Tokens
    delta_J: Floats
    log_p_J: Floats
    """Log-probability that the base gives to the token that comes next."""
    kl_J: Floats


@torch.no_grad()
def differences(
    base: PreTrainedModel | Logits,
    other: PreTrainedModel | Logits,
    reading: Reading,
    *,
    tokens: int = TOKENS,
    report: Reporter | None = None,
    processes: Processes = ALONE,
) -> Differences:
    """Run both on held-out documents: all batches, or as many, evenly spaced, as hold about `tokens`.
    `processes`, all of which call this, share them out.

    Raises `MoefyError` if there is no next token to judge by, or the vocabularies differ.
    """
    if reading.kind != "decoder":
        raise MoefyError("token losses compare next-token probabilities; encoders give none")
    first, second = _outputs(base), _outputs(other)
    report = report or Reporter(quiet=True)
    own: list[tuple[int, tuple[Tokens, list[Floats]]]] = []
    for batch, at in report.track(processes.mine(_spaced(reading, tokens)), "compare two models"):
        reference, out = Reference(first(batch)), second(batch)
        if out.size != reference.base.size:
            raise MoefyError(
                f"the two models know {reference.base.size} and {out.size} tokens; only "
                "models with one tokenizer can be compared token by token"
            )
        delta_J, kl_J = reference.compare(out)
        assert kl_J is not None
        mask = batch.mask()
        assert mask is not None
        keep_J = judged_positions(batch)[mask].numpy()
        values = [v.double().cpu().numpy() for v in (delta_J, reference.target_log_p(), kl_J)]
        own.append((at, (tokens_of(batch, at).take(keep_J), values)))
    read, every = zip(*processes.in_order(own), strict=True)
    columns = (np.concatenate(column) for column in zip(*every, strict=True))
    return Differences(Tokens.join(list(read)), *columns)


def token_losses(
    base: PreTrainedModel | Logits,
    other: PreTrainedModel | Logits,
    reading: Reading,
    *,
    tokens: int = TOKENS,
    shown: int = SHOWN,
    report: Reporter | None = None,
    processes: Processes = ALONE,
) -> dict[str, Table]:
    """Tables `hunt` (both tails), `hunt_domains`, `hunt_classes` and `hunt_summary`."""
    losses = differences(base, other, reading, tokens=tokens, report=report, processes=processes)
    classes = token_classes(reading.tokenizer, reading.vocabulary)
    classes_JC = classes_of(losses.tokens.target_T, classes).T
    domains = reading.documents.domains
    domain_JC = np.eye(len(domains), dtype=bool)[
        reading.documents.domain_Q[losses.tokens.document_T]
    ]
    every_J1 = np.ones((len(losses.tokens), 1), dtype=bool)
    tables = {
        "hunt": _tails(losses, reading, shown),
        "hunt_domains": {"domain": domains} | _means(losses, domain_JC, reading),
        "hunt_classes": {"class": [*classes]} | _means(losses, classes_JC, reading),
        "hunt_summary": _means(losses, every_J1, reading) | _concentration(losses),
    }
    return tables if classes else {n: t for n, t in tables.items() if n != "hunt_classes"}


def dense_against_moefied(
    model: PreTrainedModel,
    reading: Reading,
    *,
    tokens: int = TOKENS,
    report: Reporter | None = None,
    processes: Processes = ALONE,
) -> dict[str, Table]:
    """`token_losses` of what `moefy.load` gave, beside the dense model."""

    def dense(batch: Batch) -> Outputs:
        with all_experts(model):
            return output(model, batch)

    return token_losses(dense, model, reading, tokens=tokens, report=report, processes=processes)


def _spaced(reading: Reading, tokens: int) -> list[tuple[Batch, int]]:
    """Held-out batches and the number of the first document of each."""
    numbered = zip(reading.batches, reading.first_B, strict=True)
    every = [(b, at) for b, at in numbered if reading.documents.shards[at] == HELD_OUT]
    held = sum(int(judged_positions(batch).sum()) for batch, _ in every)
    return every[:: max(1, round(held / tokens))]


def _outputs(which: PreTrainedModel | Logits) -> Callable[[Batch], Outputs]:
    if isinstance(which, PreTrainedModel):
        return lambda batch: output(which, batch)

    def call(batch: Batch) -> Outputs:
        outputs = which(batch)
        return outputs if isinstance(outputs, Outputs) else outputs_of(batch, outputs)

    return call


def _means(losses: Differences, mark_JC: NDArray[np.bool_], reading: Reading) -> dict[str, Any]:
    """Mean difference and KL over the tokens of every cell, with intervals over documents."""
    documents = len(reading.documents)
    tokens_QC = summed(mark_JC.astype(float), losses.tokens.document_T, documents)
    unit_Q = units(reading.documents, tokens_QC.sum(1) > 0)

    def interval(values_J: Floats) -> Interval:
        top_QC = summed(mark_JC * values_J[:, None], losses.tokens.document_T, documents)
        return ratio_interval(top_QC, tokens_QC, unit_Q)

    losses_C = (mark_JC * losses.delta_J.clip(0)[:, None]).sum(0)
    in_documents = (tokens_QC > 0).sum(0)
    return table(
        {
            **interval(losses.delta_J).columns("delta"),
            **interval(losses.kl_J).columns("kl"),
            "share_of_losses": losses_C / max(losses.delta_J.clip(0).sum(), 1e-300),
            "share_of_tokens": mark_JC.mean(0),
            "documents": in_documents,
            "tokens": tokens_QC.sum(0).astype(int),
            "few": in_documents < MIN_DOCUMENTS,
        }
    )


def _tails(losses: Differences, reading: Reading, shown: int) -> Table:
    """The tokens that lose most and those that gain most, one of each document."""
    names = ("tail", "rank", "document", "domain", "position", "token", "next", "delta", "p_base",
             "p_other", "kl")  # fmt: skip
    found: list[tuple[Any, ...]] = []
    tokens = losses.tokens
    for name, sign in (("loses", -1.0), ("gains", 1.0)):
        order_J = np.argsort(sign * losses.delta_J, kind="stable")
        _, first = np.unique(tokens.document_T[order_J], return_index=True)
        for rank, j in enumerate(order_J[np.sort(first)[:shown]].tolist()):
            if sign * losses.delta_J[j] >= -_ROUNDING:
                break
            number = int(tokens.document_T[j])
            found.append((
                name, rank, number, reading.documents.documents[number].domain,
                int(tokens.position_T[j]), int(tokens.ids_T[j]), int(tokens.target_T[j]),
                float(losses.delta_J[j]), math.exp(losses.log_p_J[j]),
                math.exp(min(0.0, losses.log_p_J[j] - losses.delta_J[j])), float(losses.kl_J[j]),
            ))  # fmt: skip
    return {name: [row[column] for row in found] for column, name in enumerate(names)}


def _concentration(measured: Differences) -> Table:
    """How few tokens hold the losses."""
    losses, kl = tail(measured.delta_J.clip(0)), tail(measured.kl_J)
    return table(
        {
            "top_share_of_tokens": [TOP],
            "concentration": [losses["top_1_percent_share"]],
            "kl_concentration": [kl["top_1_percent_share"]],
            "delta_p99": [float(np.quantile(measured.delta_J, 0.99))],
            "delta_p1": [float(np.quantile(measured.delta_J, 0.01))],
            "kl_p99": [kl["p99"]],
            "kl_max": [kl["max"]],
            "worse_share": [float((measured.delta_J > _ROUNDING).mean())],
        }
    )
