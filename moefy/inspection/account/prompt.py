"""One text, token by token: what every expert adds, what is left out, and how the logit comes about.

    logit[v] - mean logit = embedding + attention of all layers + all experts + biases + error + constant

where the term of the error is what the experts that are off would have added, with its sign turned:
it is missing. The final norm's scale is frozen at its value (`moefy.inspection.account`). The terms
are measured where they arise: attention at its output projection, experts from the ledger of their
layer. That they add up to the logit the model gives is checked; where they do not, because the model
adds something in another way, the account is refused with the reason and the shares are given all the
same.

Shapes: T tokens, D width, E experts, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.data.corpus import make_batches
from moefy.data.shards import HELD_OUT, Documents
from moefy.errors import MoefyError, UnsupportedModel
from moefy.evaluation.outputs import first_choices, per_position, run_outputs
from moefy.experts.moefied import of
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.inspection.account import Ledger, Unembedding, find_unembedding, observe
from moefy.inspection.record import Table, joined, rows, table
from moefy.inspection.texts import Reading, pieces_of_ids, rising, sample_of_ids
from moefy.models.heads import head_sites
from moefy.models.library import hidden_of

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
"""Largest gap of the account, as a share of the largest logit; ledgers are in fp32."""
_TOLERANCE_16 = 5e-2
_TOKEN = ("logit", "embedding", "constant", "total")
"""Terms of a token that are of no layer, and what they come to."""
_TERMS = ("attention", "bias", "error")
"""Terms of a token and layer, beside those of the experts."""


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
    ids_T, kept = torch.tensor(list(ids)), _Ledgers()
    reading, decoder = _reading(ids_T, vocabulary), of(model).kind == "decoder"
    unembedding = find_unembedding(model, ids_T) if decoder else None
    with _stream(model, unembedding) as stream:
        observe(model, reading, [kept], unembedding=unembedding)
    batch = reading.batches[0]
    outputs = run_outputs(model, batch, keep_BT=batch.mask())
    target_T = torch.cat([ids_T[1:], ids_T[:1]])
    if outputs.is_logits:
        target_T[-1] = first_choices(outputs)[-1].cpu()
    if unembedding is None or stream.refused is not None:
        return _tables(ids_T, target_T, kept, None, stream.refused)
    logit_T = per_position(partial(_centred, target_T), outputs)[0].cpu()
    account = _account(model, unembedding, stream, kept, target_T, logit_T)
    if account.gap <= account.tolerance:
        return _tables(ids_T, target_T, kept, account, None)
    reason = (
        f"the terms miss the model's logit by {account.gap:.2g} of the largest, at most "
        f"{account.tolerance:.2g} is rounding; this model adds to its stream in another way"
    )
    return _tables(ids_T, target_T, kept, None, reason)


@dataclass
class _Ledgers:
    """Keeps the ledgers of a short text."""

    by_layer: dict[int, list[Ledger]] = field(default_factory=dict)

    def hear(self, ledger: Ledger) -> None:
        self.by_layer.setdefault(ledger.layer, []).append(ledger)

    def joined(self, layer: int, figure: Callable[[Ledger], Tensor]) -> Tensor:
        """A figure of all tokens, on the CPU."""
        return torch.cat([figure(ledger).cpu() for ledger in self.by_layer[layer]])


@dataclass
class _Stream:
    """The residual stream of one pass."""

    enters: dict[int, Tensor] = field(default_factory=dict)
    """Input of every block `[T, D]`."""
    attention: dict[int, Tensor] = field(default_factory=dict)
    """What attention adds in it."""
    refused: str | None = None


@dataclass(frozen=True)
class _Account:
    """Terms of the logit of each token's target, mean over the vocabulary taken off."""

    terms: dict[str, Tensor]
    """`[T]`: `logit` (what the model gives), `embedding`, `constant`, and `total` of all terms."""
    layers: list[dict[str, Tensor]]
    """`attention`, `bias`, `error` `[T]`, and `effect` of experts `[T, E]`."""
    tolerance: float

    @property
    def gap(self) -> float:
        """Largest difference from the model's logit, as a share of the largest."""
        logit_T, total_T = self.terms["logit"], self.terms["total"]
        return float((total_T - logit_T).abs().max()) / (float(logit_T.abs().max()) or 1.0)


def _reading(ids_T: Tensor, vocabulary: int) -> Reading:
    batches = make_batches([sample_of_ids("prompt", ids_T)])
    documents = Documents([batches[0].samples[0].document], [HELD_OUT], ["prompt"])
    return Reading(batches, documents, None, "decoder", vocabulary, {})


@contextmanager
def _stream(model: PreTrainedModel, unembedding: Unembedding | None) -> Iterator[_Stream]:
    """Records the residual stream of the pass that is run meanwhile."""
    stream, handles = _Stream(), []
    paths = {index: site.layer for index, site in enumerate(of(model).sites)}
    if unembedding is None:
        kind = of(model).kind
        stream.refused = (
            f"a model of kind '{kind}' whose logits are no linear map behind a final norm"
        )
    elif len(set(paths.values())) < len(paths):
        stream.refused = "a block of this model holds several MLPs"
    else:
        try:
            projections = {site.block: site.projection for site in head_sites(model)}
        except UnsupportedModel as error:
            projections, stream.refused = {}, str(error)
        for index, path in paths.items():
            enters = partial(_keep_input, stream.enters, index)
            block = model.get_submodule(path)
            handles.append(block.register_forward_pre_hook(enters, with_kwargs=True))
            for place, projection in projections.items():
                if place.startswith(f"{path}."):
                    leaves = partial(_keep_output, stream.attention, index)
                    output = model.get_submodule(projection)
                    handles.append(output.register_forward_hook(leaves))
    try:
        yield stream
    finally:
        for handle in handles:
            handle.remove()
    missing = [path for index, path in paths.items() if index not in stream.attention]
    if stream.refused is None and missing:
        stream.refused = f"{missing[0]}: no attention block is known here"


def _keep_input(
    store: dict[int, Tensor], index: int, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> None:
    store[index] = _flat(hidden_of(args, named))


def _keep_output(store: dict[int, Tensor], index: int, _: nn.Module, __: Any, out: Any) -> None:
    store[index] = _flat(out[0] if isinstance(out, tuple) else out)


def _flat(values: Tensor) -> Tensor:
    return values.detach().reshape(-1, values.shape[-1]).float().cpu()


def _scale(ledger: Ledger) -> Tensor:
    assert ledger.scale_T is not None
    return ledger.scale_T


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
    scale_T = kept.joined(0, _scale)

    def effect(vector_TD: Tensor) -> Tensor:
        return (vector_TD.double() * direction_TD.double()).sum(1) / scale_T.double()

    def inner(part: Ledger) -> Tensor:
        return part.inner(direction_TD[part.tokens.position_T].to(part.x_TD.device)).double()

    layers = []
    for layer, module in sparse_mlps(model).items():
        bias, added_TD = module.weights.down_bias_D, stream.attention[layer]
        bias_D = torch.zeros(1) if bias is None else _flat(bias)
        layers.append(
            {
                "attention": effect(added_TD),
                "bias": effect(bias_D.expand_as(added_TD)),
                "error": -effect(kept.joined(layer, lambda part: part.error_TD)),
                "effect": kept.joined(layer, inner) / scale_T.double()[:, None],
            }
        )
    own = {
        "embedding": effect(stream.enters[0]),
        "constant": _constant(model, unembedding, target_T),
    }
    sums = [torch.stack([terms[name] for terms in layers]).sum(0) for name in _TERMS]
    sums.append(torch.stack([terms["effect"].sum(1) for terms in layers]).sum(0))
    total_T = own["embedding"] + own["constant"] + sum(sums)
    terms = {"logit": logit_T, **own, "total": total_T}
    return _Account(terms, layers, TOLERANCE.get(model.dtype, _TOLERANCE_16))


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
    positions = list(range(len(ids_T)))
    none_T = torch.full((len(ids_T),), torch.nan, dtype=torch.float64)
    terms = dict.fromkeys(_TOKEN, none_T) if account is None else account.terms
    tokens = {"position": positions, "token": ids_T.tolist(), "target": target_T.tolist()}
    layers, share_gap = [], 0.0
    for index, layer in enumerate(kept.by_layer):
        effects = dict.fromkeys(_TERMS, none_T) if account is None else account.layers[index]
        share_TE = kept.joined(layer, lambda part: part.share_TE.double())
        share_gap = max(share_gap, float((share_TE.sum(1) - 1).abs().max()))
        columns: dict[str, Any] = {"layer": [layer] * len(positions), "position": positions}
        columns |= {name: effects[name].numpy() for name in _TERMS}
        columns["error_share"] = kept.joined(layer, _error_share).numpy()
        columns["share"] = _lists(share_TE)
        columns["norm"] = _lists(kept.joined(layer, lambda part: part.norm_TE))
        columns["ran"] = kept.joined(layer, lambda part: part.mask_TE).tolist()
        columns["effect"] = (
            [None] * len(positions) if account is None else _lists(effects["effect"])
        )
        layers.append(table(columns))
    summary = {
        "accounted": [account is not None],
        "reason": [reason],
        "largest_gap": np.array([np.nan if account is None else account.gap]),
        "tolerance": np.array([np.nan if account is None else account.tolerance]),
        "share_sum_error": np.array([share_gap]),
    }
    return {
        "prompt": table({**tokens, **{name: terms[name].numpy() for name in _TOKEN}}),
        "prompt_layers": joined(layers),
        "prompt_account": table(summary),
    }


def _error_share(ledger: Ledger) -> Tensor:
    """`<error, y> / ||y||^2` `[T]`: the share of the dense output that is missing."""
    energy_T = ledger.y_TD.square().sum(1)
    along_T = (ledger.error_TD * ledger.y_TD).sum(1)
    return torch.where(energy_T > 0, along_T / energy_T, 0).cpu()


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
    shown = pieces_of_ids(ids) if ends is None else {"text": prompt, "ends": rising(ends)}
    by_layer: dict[int, list[dict[str, Any]]] = {}
    for row in rows(found["prompt_layers"]):
        by_layer.setdefault(row["layer"], []).append(row)
    columns = {"share": "share", "ran": "ran", "error": "error_share"}
    layers = [
        {"layer": layer, **{name: [row[c] for row in of_layer] for name, c in columns.items()}}
        for layer, of_layer in by_layer.items()
    ]
    summary = rows(found["prompt_account"])[0]
    account = _account_record(found["prompt"], by_layer) if summary["accounted"] else None
    return {**shown, "layers": layers, "account": account, **summary}


def _account_record(tokens: Table, by_layer: dict[int, list[dict[str, Any]]]) -> Table:
    """Where the logit of the next token comes from, a row for every position."""
    sums = {
        name: [0.0] * len(tokens["position"]) for name in ("attention", "experts", "bias", "error")
    }
    for of_layer in by_layer.values():
        for at, row in enumerate(of_layer):
            for name in _TERMS:
                sums[name][at] += row[name]
            sums["experts"][at] += sum(row["effect"])
    first = {name: tokens[name] for name in ("position", "token", "target", "embedding")}
    last = {name: tokens[name] for name in ("constant", "total", "logit")}
    return {**first, **sums, **last}
