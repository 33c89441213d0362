"""How far a moefied model is from its dense self, on documents that nothing was fitted on.

    record = evaluate(model, batches)

Language models: cross-entropy (nats/token), bits/byte, KL(dense || sparse) mean and 99th percentile
(nats/token), top-1 agreement. Encoders: cosine of the last hidden states, token by token. Images:
KL and agreement of the class scores, one image a document. Every mean comes per domain with a 95 %
bootstrap interval over sources, or over documents where a domain has fewer than 20 sources
("single-source" then). Selection is always applied.

Shapes: B documents, T tokens, V vocabulary or classes, D width.
"""

import math
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy, log_softmax
from transformers import PreTrainedModel

from moefy.activations import run, side_of
from moefy.console import Reporter
from moefy.data import IGNORED, MANY_SOURCES, Batch
from moefy.locate import Site
from moefy.modeling import SparseMlp, all_experts, sparse_mlps
from moefy.provenance import machine

BOOTSTRAP = 1000


@dataclass
class DocumentSums:
    """Sums over one document's tokens, from which every mean is made."""

    domain: str
    source_id: str
    bytes: int
    sums: dict[str, float] = field(default_factory=dict)


def outputs(result: Any) -> Tensor:
    """What a forward pass is compared by: logits `[B, T, V]`, or last hidden states `[B, T, D]`.

    Class scores `[B, V]` come as `[B, 1, V]`.
    """
    value: Tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    return value if value.ndim == 3 else value[:, None]


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    batches: list[Batch],
    *,
    against: PreTrainedModel | None = None,
    report: Reporter | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare a moefied model with the dense one on these batches; returns a JSON record.

    `against` is the dense model; left out, it is the same weights with every expert on, which
    conversion has verified to be the source.
    """
    report = report or Reporter(quiet=True)
    documents: list[DocumentSums] = []
    p99: list[Tensor] = []
    load = FfnLoad(model)
    for batch in report.track(batches, "evaluate"):
        with nullcontext() if against is not None else all_experts(model):
            dense = _result(against if against is not None else model, batch)
        with load.counting(batch):
            sparse = _result(model, batch)
        documents += _compare(batch, dense.float(), sparse.float(), p99)
    modules = sparse_mlps(model)
    record: dict[str, Any] = {
        "kind": "evaluation",
        "dense": "another checkpoint"
        if against is not None
        else "the same weights, all experts on",
        "documents": len(documents),
        "tokens": int(sum(doc.sums["tokens"] for doc in documents)),
        "first_token": "included",
        "ffn_density": load.density(),
        "active_budget": _active_budget(modules, load.per_layer()),
        "active_parameters": _active_parameters(model, modules, load.per_layer()),
        "total": _summary(documents, seed),
        "domains": {},
        "machine": machine(),
    }
    if p99:
        record["total"]["kl_p99"] = float(np.quantile(torch.cat(p99).numpy(), 0.99))
    for domain in sorted({doc.domain for doc in documents}):
        record["domains"][domain] = _summary([d for d in documents if d.domain == domain], seed)
    return record


def _result(model: PreTrainedModel, batch: Batch) -> Tensor:
    result = run(model, batch)
    if batch.targets_BT is None and "pixel_values" not in batch.inputs:
        hidden = getattr(result, "last_hidden_state", None)
        if hidden is None:
            inputs = {n: v.to(model.device) for n, v in batch.inputs.items()}
            hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        return torch.as_tensor(hidden).cpu()
    return outputs(result).cpu()


def _compare(batch: Batch, dense: Tensor, sparse: Tensor, p99: list[Tensor]) -> list[DocumentSums]:
    """Sums of every metric over the tokens of each document."""
    values: dict[str, Tensor] = {}
    if batch.targets_BT is not None:
        keep = batch.targets_BT != IGNORED
        values["ce_dense"] = _nats(dense, batch.targets_BT)
        values["ce"] = _nats(sparse, batch.targets_BT)
    else:
        mask = batch.mask()
        keep = torch.ones(dense.shape[:2], dtype=torch.bool) if mask is None else mask
    if batch.targets_BT is not None or ("pixel_values" in batch.inputs and dense.shape[1] == 1):
        p, q = log_softmax(dense, -1), log_softmax(sparse, -1)
        values["kl"] = (p.exp() * (p - q)).sum(-1).clamp_min(0)
        values["agreement"] = (dense.argmax(-1) == sparse.argmax(-1)).float()
        p99.append(values["kl"][keep])
    else:
        values["cosine"] = cosine_similarity(dense, sparse, dim=-1)
    found = []
    for row, sample in enumerate(batch.samples):
        sums = {n: float(v[row][keep[row]].double().sum()) for n, v in values.items()}
        sums["tokens"] = float(keep[row].sum())
        doc = sample.document
        found.append(DocumentSums(doc.domain, doc.source_id, sample.bytes, sums))
    return found


def _nats(logits: Tensor, targets_BT: Tensor) -> Tensor:
    """Cross-entropy of every position `[B, T]`, zero where nothing is predicted."""
    return cross_entropy(logits.mT, targets_BT, reduction="none", ignore_index=IGNORED)


def _summary(documents: list[DocumentSums], seed: int) -> dict[str, Any]:
    """Means over tokens with bootstrap intervals."""
    sources = {(doc.domain, doc.source_id) for doc in documents}
    by_source = len(sources) >= MANY_SOURCES
    groups: dict[Any, list[DocumentSums]] = defaultdict(list)
    for index, doc in enumerate(documents):
        groups[(doc.domain, doc.source_id) if by_source else index].append(doc)
    names = [name for name in documents[0].sums if name != "tokens"]
    table = np.array(
        [[sum(d.sums[n] for d in group) for n in [*names, "tokens"]] for group in groups.values()]
    )
    bytes_ = np.array([sum(d.bytes for d in group) for group in groups.values()])
    draws = np.random.default_rng(seed).integers(len(table), size=(BOOTSTRAP, len(table)))
    resampled, resampled_bytes = table[draws].sum(1), bytes_[draws].sum(1)
    total, tokens = table.sum(0), table.sum(0)[-1]
    summary: dict[str, Any] = {
        "documents": len(documents),
        "sources": len(sources),
        "bootstrap": "sources" if by_source else "documents (single-source)",
        "tokens": int(tokens),
    }
    for column, name in enumerate(names):
        means = resampled[:, column] / resampled[:, -1]
        summary[name] = {"mean": total[column] / tokens, "ci95": _interval(means)}
    if "ce" in names:
        ce, dense = names.index("ce"), names.index("ce_dense")
        change = (resampled[:, ce] - resampled[:, dense]) / resampled[:, -1]
        mean = (total[ce] - total[dense]) / tokens
        summary["ce_increase"] = {"mean": mean, "ci95": _interval(change)}
        if bytes_.sum() > 0:
            for name, column in (("bits_per_byte", ce), ("bits_per_byte_dense", dense)):
                rates = resampled[:, column] / np.maximum(resampled_bytes, 1) / math.log(2)
                mean = total[column] / bytes_.sum() / math.log(2)
                summary[name] = {"mean": mean, "ci95": _interval(rates)}
    return summary


def _interval(values: Any) -> list[float]:
    return [float(v) for v in np.quantile(values, [0.025, 0.975])]


class FfnLoad:
    """Counts the experts that run on real tokens, layer by layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.modules = sparse_mlps(model)
        self.found: list[Site] = getattr(model, "moefy_sites", [])
        self.active = dict.fromkeys(self.modules, 0.0)
        self.tokens = dict.fromkeys(self.modules, 0.0)

    def counting(self, batch: Batch) -> "_Counting":
        """Count during one forward pass of this batch."""
        return _Counting(self, batch)

    def per_layer(self) -> dict[int, float]:
        """FFN density of every layer: mean share of its experts that ran."""
        return {
            index: self.active[index] / (self.tokens[index] * module.experts)
            for index, module in self.modules.items()
        }

    def density(self) -> float:
        """FFN density of the model: neurons that ran over all neurons."""
        neurons = {i: m.expert_size * m.experts for i, m in self.modules.items()}
        per_layer = self.per_layer()
        return sum(per_layer[i] * neurons[i] for i in neurons) / sum(neurons.values())


class _Counting:
    def __init__(self, load: FfnLoad, batch: Batch) -> None:
        self.load, self.batch = load, batch

    def __enter__(self) -> None:
        for (index, module), site in zip(self.load.modules.items(), self.load.found, strict=True):
            mask = self.batch.mask(side_of(site))
            module.observer = self._observe(index, mask)

    def __exit__(self, *_: object) -> None:
        for module in self.load.modules.values():
            module.observer = None

    def _observe(self, index: int, mask_BT: Tensor | None) -> Any:
        def observer(x_TD: Tensor, mask_TE: Tensor) -> None:
            if mask_BT is not None:
                mask_TE = mask_TE[mask_BT.flatten().to(mask_TE.device)]
            self.load.active[index] += float(mask_TE.sum())
            self.load.tokens[index] += len(mask_TE)

        return observer


def _matrices(module: SparseMlp) -> int:
    """Weights of one MLP, biases left out."""
    weights = module.weights
    return weights.neurons * weights.width * (2 if weights.gate_ND is None else 3)


def _active_budget(modules: dict[int, SparseMlp], density: dict[int, float]) -> float:
    """MLP weights read per token, router and compensation included, over the dense MLPs' weights."""
    read = sum(
        density[i] * _matrices(m) + m.router.weights_read() + m.compensation.weights_read()
        for i, m in modules.items()
    )
    return read / sum(_matrices(m) for m in modules.values())


def _active_parameters(
    model: PreTrainedModel, modules: dict[int, SparseMlp], density: dict[int, float]
) -> float:
    """Parameters that a token uses over those of the dense model."""
    extra = sum(m.router.weights_read() + m.compensation.weights_read() for m in modules.values())
    added = sum(
        p.numel() for m in modules.values() for part in (m.router,) for p in part.parameters()
    )
    dense = sum(p.numel() for p in model.parameters()) - added
    off = sum((1 - density[i]) * _matrices(m) for i, m in modules.items())
    return (dense - off + extra) / dense
