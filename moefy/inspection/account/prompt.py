"""One text, token by token: what every expert adds, what is left out, and how the logit comes about.

    logit[v] - mean logit = embedding + attention of all layers + all experts + biases + error + constant

where the term of the error is what the experts that are off would have added, with its sign turned:
it is missing. The final norm's scale is frozen at its value (`moefy.inspection.account.observe`). The terms
are measured where they arise: attention at its output projection, experts from the ledger of their
layer. That they add up to the logit the model gives is checked; where they do not, because the model
adds something in another way, the account is refused with the reason and the shares are given all the
same.

Shapes: T tokens, D width, E experts, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.data.corpus import IGNORED, Batch, Document, Sample
from moefy.data.documents import HELD_OUT, Documents
from moefy.errors import MoefyError, UnsupportedModel
from moefy.evaluation.outputs import first_choices, per_position, run_outputs
from moefy.evaluation.statistics import Floats
from moefy.experts.moefied import of
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.inspection.account import Ledger
from moefy.inspection.account.observe import Unembedding, find_unembedding, observe
from moefy.inspection.texts import _of_ids, _rising
from moefy.inspection.texts.reading import Reading
from moefy.inspection.texts.table import Table, joined, rows, table
from moefy.models.heads import head_sites
from moefy.models.library import hidden_of

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest gap of the account, as a share of the largest logit; ledgers are in fp32."""
_TOLERANCE_16 = 5e-2


@torch.no_grad()
def ledger_of_prompt(model: PreTrainedModel, ids: Sequence[int]) -> dict[str, Table]:
    """What every expert does at every token of one text, as the model runs.

    `prompt` has a row for each token, `prompt_layers` one for each layer and token with lists over
    experts, `prompt_account` one row that says whether the logits were accounted for. The logit is that
    of the token that comes next, and at the last token of the one that the model puts first. Raises
    `MoefyError` for fewer than two ids or ids that the model does not know.
    """
    vocabulary = model.config.get_text_config().vocab_size
    if len(ids) < 2 or min(ids) < 0 or max(ids) >= vocabulary:
        raise MoefyError(
            f"prompt of {len(ids)} token ids: give two or more, each from 0 to {vocabulary - 1}"
        )
    ids_T = torch.tensor(list(ids))
    kind = of(model).kind
    unembedding = find_unembedding(model, ids_T) if kind == "decoder" else None
    kept = _Ledgers()
    reading = _reading(ids_T, vocabulary)
    with _stream(model, unembedding) as stream:
        observe(model, reading, [kept], unembedding=unembedding)
    target_T = torch.cat([ids_T[1:], ids_T[:1]])
    said = run_outputs(model, reading.batches[0], keep_BT=reading.batches[0].mask())
    if said.is_logits:
        target_T[-1] = first_choices(said)[-1].cpu()
    reason = stream.refused
    if unembedding is None:
        reason = f"a model of kind '{kind}' whose logits are no linear map behind a final norm"
    account = None
    if unembedding is not None and reason is None:
        logit_T = per_position(partial(_centred, target_T), said)[0].cpu()
        account = _account(model, unembedding, stream, kept, target_T, logit_T)
        if account.gap > account.tolerance:
            reason = (
                f"the terms miss the model's logit by {account.gap:.2g} of the largest, at most "
                f"{account.tolerance:.2g} is rounding; this model adds to its stream in another way"
            )
            account = None
    return _tables(ids_T, target_T, kept, account, reason)


@dataclass
class _Ledgers:
    """Keeps the ledgers of a short text."""

    of: dict[int, list[Ledger]] = field(default_factory=dict)

    def hear(self, ledger: Ledger) -> None:
        self.of.setdefault(ledger.layer, []).append(ledger)


@dataclass
class _Stream:
    """The residual stream of one pass."""

    enters: dict[int, Tensor] = field(default_factory=dict)
    """Input of every block `[T, D]`."""
    leaves: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    refused: str | None = None


@dataclass(frozen=True)
class _Account:
    """Terms of the logit of each token's target, mean over the vocabulary taken off."""

    logit_T: Tensor
    """What the model gives."""
    embedding_T: Tensor
    constant_T: Tensor
    attention_LT: Tensor
    bias_LT: Tensor
    error_LT: Tensor
    expert_LTE: list[Tensor]
    total_T: Tensor
    tolerance: float

    @property
    def gap(self) -> float:
        """Largest difference from the model's logit, as a share of the largest."""
        largest = float(self.logit_T.abs().max()) or 1.0
        return float((self.total_T - self.logit_T).abs().max()) / largest


def _reading(ids_T: Tensor, vocabulary: int) -> Reading:
    targets_T = torch.cat([ids_T[1:], torch.tensor([IGNORED])])
    document = Document("prompt", "prompt", ids=tuple(ids_T.tolist()))
    inputs = {"input_ids": ids_T, "attention_mask": torch.ones_like(ids_T)}
    batch = Batch(
        [Sample(document, inputs, targets_T, 0)],
        {name: value[None] for name, value in inputs.items()},
        targets_T[None],
    )
    documents = Documents([document], [HELD_OUT], ["prompt"])
    return Reading([batch], documents, None, "decoder", vocabulary, {})


@contextmanager
def _stream(model: PreTrainedModel, unembedding: Unembedding | None) -> Iterator[_Stream]:
    """Records the residual stream of the pass that is run meanwhile."""
    stream, handles = _Stream(), []
    paths = {index: site.layer for index, site in enumerate(of(model).sites)}

    def enters(index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            stream.enters[index] = _flat(hidden_of(args, given))

        return hook

    def leaves(store: dict[int, Tensor], index: int) -> Any:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            store[index] = _flat(out[0] if isinstance(out, tuple) else out)

        return hook

    if len(set(paths.values())) < len(paths):
        stream.refused = "a block of this model holds several MLPs"
    elif unembedding is not None:
        try:
            projections = {site.block: site.projection for site in head_sites(model)}
        except UnsupportedModel as error:
            projections, stream.refused = {}, str(error)
        for index, path in paths.items():
            block = model.get_submodule(path)
            handles.append(block.register_forward_pre_hook(enters(index), with_kwargs=True))
            handles.append(block.register_forward_hook(leaves(stream.leaves, index)))
            for place, projection in projections.items():
                if place.startswith(f"{path}."):
                    output = model.get_submodule(projection)
                    handles.append(output.register_forward_hook(leaves(stream.attention, index)))
    try:
        yield stream
    finally:
        for handle in handles:
            handle.remove()
    if stream.refused is None and unembedding is not None:
        missing = [path for index, path in paths.items() if index not in stream.attention]
        if missing:
            stream.refused = f"{missing[0]}: no attention block is known here"


def _flat(values: Tensor) -> Tensor:
    return values.detach().reshape(-1, values.shape[-1]).float().cpu()


def _account(
    model: PreTrainedModel,
    unembedding: Unembedding,
    stream: _Stream,
    kept: _Ledgers,
    target_T: Tensor,
    logit_T: Tensor,
) -> _Account:
    """Every term of the logits of these tokens, which are `logit_T` less their mean."""
    direction_TD = unembedding.directions(target_T.to(unembedding.weight_VD.device)).cpu()
    first = kept.of[0][0].scale_T
    assert first is not None
    scale_T = torch.cat([part.scale_T.cpu() for part in kept.of[0] if part.scale_T is not None])

    def effect(vector_TD: Tensor) -> Tensor:
        return (vector_TD.double() * direction_TD.double()).sum(1) / scale_T.double()

    attention, biases, errors, experts = [], [], [], []
    modules = sparse_mlps(model)
    for layer, parts in kept.of.items():
        bias = modules[layer].weights.down_bias_D
        zero_TD = torch.zeros_like(stream.attention[layer])
        biases.append(effect(zero_TD if bias is None else zero_TD + bias.detach().float().cpu()))
        attention.append(effect(stream.attention[layer]))
        errors.append(-effect(torch.cat([part.error_TD.cpu() for part in parts])))
        at, inner = 0, []
        for part in parts:
            here_TD = direction_TD[at : at + len(part.x_TD)].to(part.x_TD.device)
            inner.append(part.inner(here_TD).cpu().double())
            at += len(part.x_TD)
        experts.append(torch.cat(inner) / scale_T.double()[:, None])
    embedding_T, constant_T = effect(stream.enters[0]), _constant(model, unembedding, target_T)
    lists = (attention, biases, errors, [e.sum(1) for e in experts])
    total_T = embedding_T + constant_T + sum(torch.stack(terms).sum(0) for terms in lists)
    tolerance = TOLERANCE.get(model.dtype, _TOLERANCE_16)
    return _Account(
        logit_T,
        embedding_T,
        constant_T,
        torch.stack(attention),
        torch.stack(biases),
        torch.stack(errors),
        experts,
        total_T,
        tolerance,
    )


def _centred(target_T: Tensor, at: slice, logits_CV: Tensor) -> tuple[Tensor, ...]:
    """Logits of the targets, their mean over the vocabulary taken off."""
    target_C1 = target_T[at, None].to(logits_CV.device)
    return (logits_CV.gather(1, target_C1)[:, 0].double() - logits_CV.mean(1, dtype=torch.float64),)


def _constant(model: PreTrainedModel, unembedding: Unembedding, target_T: Tensor) -> Tensor:
    """What the biases of the final norm and of the output embedding give."""
    found_T = torch.zeros(len(target_T), dtype=torch.float64)
    norm_bias = getattr(unembedding.norm, "bias", None)
    if norm_bias is not None:
        weight = unembedding.weight_VD
        rows_TD = weight[target_T.to(weight.device)].float() - unembedding.mean_D
        found_T += (rows_TD @ norm_bias.detach().float()).cpu().double()
    head_bias = getattr(model.get_output_embeddings(), "bias", None)
    if head_bias is not None:
        bias_V = head_bias.detach().cpu().double()
        found_T += bias_V[target_T] - bias_V.mean()
    return found_T


def _tables(
    ids_T: Tensor, target_T: Tensor, kept: _Ledgers, account: _Account | None, reason: str | None
) -> dict[str, Table]:
    count = len(ids_T)
    columns: dict[str, Any] = {
        "position": list(range(count)),
        "token": ids_T.tolist(),
        "target": target_T.tolist(),
    }
    for name in ("logit", "embedding", "constant", "total"):
        columns[name] = _column(None if account is None else getattr(account, f"{name}_T"), count)
    layers, share_gap = [], 0.0
    for index, (layer, parts) in enumerate(kept.of.items()):
        share_TE = torch.cat([part.share_TE.cpu().double() for part in parts])
        share_gap = max(share_gap, float((share_TE.sum(1) - 1).abs().max()))
        rows: dict[str, Any] = {"layer": [layer] * count, "position": list(range(count))}
        for name in ("attention", "bias", "error"):
            terms = None if account is None else getattr(account, f"{name}_LT")[index]
            rows[name] = _column(terms, count)
        rows["error_share"] = torch.cat([_error_share(part) for part in parts]).numpy()
        rows["share"] = _lists(share_TE)
        rows["norm"] = _lists(torch.cat([part.norm_TE.cpu() for part in parts]))
        rows["ran"] = torch.cat([part.mask_TE.cpu() for part in parts]).tolist()
        experts = None if account is None else account.expert_LTE[index]
        rows["effect"] = [None] * count if experts is None else _lists(experts)
        layers.append(table(rows))
    summary = {
        "accounted": [account is not None],
        "reason": [reason],
        "largest_gap": _column(None if account is None else [account.gap], 1),
        "tolerance": _column(None if account is None else [account.tolerance], 1),
        "share_sum_error": np.array([share_gap]),
    }
    return {
        "prompt": table(columns),
        "prompt_layers": joined(layers),
        "prompt_account": table(summary),
    }


def _error_share(ledger: Ledger) -> Tensor:
    """`<error, y> / ||y||^2` `[T]`: the share of the dense output that is missing."""
    energy_T = ledger.y_TD.square().sum(1)
    along_T = (ledger.error_TD * ledger.y_TD).sum(1)
    return torch.where(energy_T > 0, along_T / energy_T, 0).cpu()


def _column(values: ArrayLike | None, count: int) -> Floats:
    return np.full(count, np.nan) if values is None else np.asarray(values, dtype=float)


def _lists(values_TE: Tensor) -> list[list[float | None]]:
    """Rows as lists of JSON values, as exact as columns."""
    return [list(table({"row": row})["row"]) for row in values_TE.numpy()]


def prompt_record(model: PreTrainedModel, tokenizer: Any, prompt: str) -> dict[str, Any]:
    """`ledger_of_prompt` of a text, with the text: what the Prompt screen shows.

    Raises `MoefyError` for a model without a tokenizer, and for a prompt of fewer than two tokens.
    """
    if tokenizer is None:
        raise MoefyError("a prompt needs the model's tokenizer, and its folder has none")
    read = tokenizer(prompt, return_offsets_mapping=tokenizer.is_fast)
    ids = list(read["input_ids"])
    ends = [int(end) for _, end in read["offset_mapping"]] if tokenizer.is_fast else None
    if tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids, ends = [tokenizer.bos_token_id, *ids], None if ends is None else [0, *ends]
    found = ledger_of_prompt(model, ids)
    shown = _of_ids(ids) if ends is None else {"text": prompt, "ends": _rising(ends)}
    by_layer: dict[int, list[dict[str, Any]]] = {}
    for row in rows(found["prompt_layers"]):
        by_layer.setdefault(row["layer"], []).append(row)
    layers = [
        {
            "layer": layer,
            "share": [row["share"] for row in given],
            "ran": [row["ran"] for row in given],
            "error": [row["error_share"] for row in given],
        }
        for layer, given in by_layer.items()
    ]
    summary = rows(found["prompt_account"])[0]
    account = _account_record(found, summary["accounted"])
    return {**shown, "layers": layers, "account": account, **summary}


def _account_record(found: dict[str, Table], accounted: bool) -> Table | None:
    """Where the logit of the next token comes from, a row for every position."""
    if not accounted:
        return None
    tokens = found["prompt"]
    sums: dict[str, list[float]] = {
        name: [0.0] * len(tokens["position"]) for name in ("attention", "experts", "bias", "error")
    }
    for row in rows(found["prompt_layers"]):
        at = row["position"]
        for name in ("attention", "bias", "error"):
            sums[name][at] += row[name]
        sums["experts"][at] += sum(row["effect"])
    first = {name: tokens[name] for name in ("position", "token", "target", "embedding")}
    last = {name: tokens[name] for name in ("constant", "total", "logit")}
    return {**first, **sums, **last}
