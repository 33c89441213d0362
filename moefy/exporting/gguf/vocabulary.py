"""A tokenizer in GGUF's words.

llama.cpp has two kinds that these models use: `gpt2`, byte-level BPE with its merges and one of a
fixed list of ways to split text beforehand, and `llama`, SentencePiece's BPE, which joins the pair
whose piece has the highest score. transformers keeps both in one form (`tokenizer.json`), which is
what is read here; merges become scores by their rank.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from moefy.data.inputs import load_tokenizer
from moefy.errors import CheckpointError, UnsupportedModel

_BYTE_LEVEL, _DIGIT, _SPACE = "byte level", r"\p{N}", "▁"
_CASES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[tuple[str, ...], str] = {
    (_BYTE_LEVEL,): "gpt-2",
    (_DIGIT, _BYTE_LEVEL): "smollm",
    (_CASES + r"\p{N}{1,3}" + _REST,): "llama-bpe",
    (_CASES + r"\p{N}" + _REST,): "qwen2",
    (_WORD,): "tekken",
}
"""`tokenizer.ggml.pre` by the expressions that split text, in order."""


def add_vocabulary(writer: GGUFWriter, folder: Path, vocab_size: int, config: Any) -> list[str]:
    """Write the tokenizer of a model folder; gives warnings.

    Where there is none the file says so, and llama.cpp then takes token ids only. Raises
    `UnsupportedModel` for a tokenizer that llama.cpp does not have.
    """
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return ["the model folder has no tokenizer: llama.cpp runs the file on token ids only"]
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UnsupportedModel(
            f"{folder}: {type(tokenizer).__name__} has no tokenizer.json; save it once with "
            "transformers as a fast tokenizer"
        )
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise _unsupported(folder, f"a {spec['model']['type']} model")
    steps = list(_flat(spec["pre_tokenizer"], "pretokenizers"))
    if any(step["type"] == "ByteLevel" for step in steps):
        cautions = _add_bpe(writer, folder, spec, steps, vocab_size)
    else:
        cautions = _add_pieces(writer, folder, spec, steps, vocab_size)
    _add_special(writer, tokenizer, config)
    return cautions


def _unsupported(folder: Path, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{folder}: the tokenizer has {what}; llama.cpp reads byte-level BPE and SentencePiece's "
        "BPE of the kinds Llama, Mistral and Qwen have. Without tokenizer files in the folder, "
        "a GGUF for token ids is written"
    )


def _flat(node: dict[str, Any] | None, key: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, sequences opened."""
    if node is None:
        return
    if node["type"] != "Sequence":
        yield node
        return
    for inner in node[key]:
        yield from _flat(inner, key)


def _add_bpe(
    writer: GGUFWriter,
    folder: Path,
    spec: dict[str, Any],
    steps: list[dict[str, Any]],
    vocab_size: int,
) -> list[str]:
    for step in _flat(spec["normalizer"], "normalizers"):
        if step["type"] != "NFC":  # llama.cpp reads text as it is
            raise _unsupported(folder, f"a normalizer, {step['type']}")
    expressions = [_expression(folder, step) for step in steps]
    splits = tuple(expression for expression in expressions if expression)
    if splits not in SPLITS:
        raise _unsupported(folder, f"an unknown way to split text, {list(splits)}")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(SPLITS[splits])
    tokens, types = _tokens(folder, spec, vocab_size)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in _merges(spec)])
    return []


def _expression(folder: Path, step: dict[str, Any]) -> str:
    """How a step splits text; empty where it does not."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return _BYTE_LEVEL if step["use_regex"] else ""
    if step["type"] == "Digits" and step["individual_digits"]:
        return _DIGIT
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex", ""))
    raise _unsupported(folder, f"an unknown way to split text, {step}")


def _add_pieces(
    writer: GGUFWriter,
    folder: Path,
    spec: dict[str, Any],
    steps: list[dict[str, Any]],
    vocab_size: int,
) -> list[str]:
    prefix = _space_prefix(folder, spec, steps)
    tokens, types = _tokens(folder, spec, vocab_size)
    merges = _merges(spec)
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    # What no merge makes is never preferred to what one makes.
    writer.add_token_scores([-float(ranks.get(token, len(merges))) for token in tokens])
    writer.add_token_types(types)
    writer.add_add_space_prefix(prefix)
    if TokenType.BYTE in types:
        return []
    return ["the vocabulary has no bytes: llama.cpp fails on characters that it lacks"]


def _space_prefix(folder: Path, spec: dict[str, Any], steps: list[dict[str, Any]]) -> bool:
    """Whether text gets a space in front, of a tokenizer that writes spaces as SentencePiece does."""
    prefix = spaces = False
    for step in _flat(spec["normalizer"], "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == _SPACE:
            prefix = True
        elif step["type"] == "Replace" and step["content"] == _SPACE:
            spaces = step["pattern"] == {"String": " "}
        else:
            raise _unsupported(folder, f"a normalizer, {step['type']}")
    for step in steps:
        if step["type"] != "Metaspace" or step["replacement"] != _SPACE:
            raise _unsupported(folder, f"an unknown way to split text, {step}")
        prefix, spaces = step["prepend_scheme"] != "never", True
    if not spaces:
        raise _unsupported(folder, "neither bytes nor SentencePiece's spaces")
    return prefix


def _merges(spec: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in spec["model"]["merges"]]
    return [(left, right) for left, right in pairs]


def _tokens(
    folder: Path, spec: dict[str, Any], vocab_size: int
) -> tuple[list[str], list[TokenType]]:
    """Text and kind of every token id, those that only the embeddings have too."""
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    model, added = spec["model"], spec["added_tokens"]
    numbers = [*model["vocab"].values(), *(token["id"] for token in added)]
    if max(numbers) >= vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has token {max(numbers)}, the model embeds {vocab_size}; put "
            "the model's own tokenizer into the folder"
        )
    for text, number in model["vocab"].items():
        tokens[number], types[number] = text, TokenType.NORMAL
        if model["byte_fallback"] and re.fullmatch("<0x[0-9A-F]{2}>", text):
            types[number] = TokenType.BYTE
    for token in added:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        tokens[token["id"]], types[token["id"]] = token["content"], kind
    unknown = model["vocab"].get(model["unk_token"])
    if unknown is not None:
        types[unknown] = TokenType.UNKNOWN
    return tokens, types


def _add_special(writer: GGUFWriter, tokenizer: Any, config: Any) -> None:
    """Tokens with a meaning, whether text gets one in front or behind, and the chat template."""
    ids: dict[str, int] = {}
    for kind in ("bos", "eos", "unk", "pad"):
        token = getattr(tokenizer, f"{kind}_token_id", None)
        if token is None:
            token = getattr(config, f"{kind}_token_id", None)
        if isinstance(token, list):
            token = token[0]
        if token is not None:
            ids[kind] = token
            getattr(writer, f"add_{kind}_token_id")(token)
    probe = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(len(probe) > 1 and probe[0] == ids.get("bos"))
    writer.add_add_eos_token(len(probe) > 1 and probe[-1] == ids.get("eos"))
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)
