"""What tables point at, in words: the documents of examples, the names of tokens, prompts.

A document is its text and where in it, in characters, every token ends. Without a text, or where the
tokenizer does not know, its ids stand for it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from transformers import PreTrainedModel

from moefy.errors import MoefyError
from moefy.interpret.contexts import sample_of, spans_of
from moefy.interpret.prompt import ledger_of_prompt
from moefy.interpret.reading import Reading
from moefy.interpret.table import Table, rows, table

_LOST = "\ufffd"
"""What decoding puts in the place of bytes that are no character by themselves."""


def texts_of(reading: Reading, tables: Mapping[str, Table]) -> dict[str, dict[str, Any]]:
    """By number, `text` and `ends` of every document that a table other than `documents` names."""
    shown = {
        number
        for name, given in tables.items()
        if name != "documents"
        for number in given.get("document", ())
        if number is not None
    }
    return {str(number): _text(reading, number) for number in sorted(shown)}


def _text(reading: Reading, number: int) -> dict[str, Any]:
    sample, spans = sample_of(reading, number), spans_of(reading, number)
    if spans is None:
        return _of_ids(sample.inputs["input_ids"].tolist())
    ends = _rising(end for _, end in spans)
    return {"text": sample.document.text[: ends[-1]], "ends": ends}


def _rising(ends: Iterable[int]) -> list[int]:
    """A token that stands for no character ends where the one before it does."""
    found: list[int] = []
    for end in ends:
        found.append(max(end, found[-1] if found else 0))
    return found


def _of_ids(ids: list[int]) -> dict[str, Any]:
    pieces = [f"{number} " for number in ids]
    return {"text": "".join(pieces), "ends": _rising(_sums(map(len, pieces)))}


def _sums(lengths: Iterable[int]) -> Iterable[int]:
    total = 0
    for length in lengths:
        total += length
        yield total


def vocabulary_of(reading: Reading, tables: Iterable[Table]) -> dict[str, str]:
    """The name of every token id in a column of the tables that holds some; nothing without a tokenizer.

    A token that is part of a character has the tokenizer's own name for it.
    """
    if reading.tokenizer is None:
        return {}
    ids = {
        number
        for given in tables
        for column in ("token", "next", "target")
        for number in given.get(column, ())
        if isinstance(number, int) and number >= 0
    }
    found = {}
    for number in sorted(ids):
        text = reading.tokenizer.decode([number])
        if _LOST in text:
            text = str(reading.tokenizer.convert_ids_to_tokens(number))
        found[str(number)] = text
    return found


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
    account = _account(found, summary["accounted"])
    return {**shown, "layers": layers, "account": account, **summary}


def _account(found: dict[str, Table], accounted: bool) -> Table | None:
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


def documents_table(reading: Reading) -> Table:
    """A row for every document that was read, without its text."""
    documents = reading.documents
    return table(
        {
            "document": list(range(len(documents))),
            "domain": [doc.domain for doc in documents.documents],
            "source": [doc.source_id for doc in documents.documents],
            "corpus": documents.corpora,
            "shard": documents.shards,
            "tokens": reading.tokens_D,
            "sha256": [doc.sha256 for doc in documents.documents],
        }
    )
