"""Tokenizers in GGUF files: those of the demo models and their like, and refusals of all others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from gguf_reading import DEMO, read, refused
from tiny_exports import SETTINGS
from tiny_models import random_model
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from moefy.errors import CheckpointError, UnsupportedModel
from moefy.exporting.gguf import write_gguf


def test_vocabulary_of_the_demo(tmp_path: Path) -> None:
    assert write_gguf(DEMO, tmp_path / "out.gguf", name="a name")["warnings"] == []
    keys, _ = read(tmp_path / "out.gguf")
    spec = json.loads((DEMO / "tokenizer.json").read_text())
    tokens = keys["tokenizer.ggml.tokens"]
    assert keys["tokenizer.ggml.model"] == "gpt2"
    assert keys["tokenizer.ggml.pre"] == "smollm"
    assert {text: number for number, text in enumerate(tokens)} == spec["model"]["vocab"]
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in spec["model"]["merges"]]
    assert keys["tokenizer.ggml.token_type"] == [3] + [1] * (len(tokens) - 1)
    assert keys["tokenizer.ggml.eos_token_id"] == 0
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["general.name"] == "a name"


def pieces() -> tokenizers.Tokenizer:
    """SentencePiece's kind: spaces as pieces, and a byte for what is unknown."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}}
    for text in ("▁", "a", "b", "c", "▁a", "bc", "▁abc"):
        vocab[text] = len(vocab)
    made = tokenizers.Tokenizer(
        models.BPE(
            vocab, [("b", "c"), ("▁", "a"), ("▁a", "bc")], unk_token="<unk>", byte_fallback=True
        )
    )
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return made


def levels(*steps: Any) -> tokenizers.Tokenizer:
    """Bytes as letters, and no merge but one."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: number for number, text in enumerate([*letters, "ab"])}
    made = tokenizers.Tokenizer(models.BPE(vocab, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.Sequence(list(steps))
    return made


def with_tokenizer(
    made: tokenizers.Tokenizer, folder: Path, size: int = 300, **special: str
) -> Path:
    """A tiny Llama with that tokenizer."""
    config = transformers.LlamaConfig(**SETTINGS | {"vocab_size": size, "num_hidden_layers": 1})
    random_model(transformers.LlamaForCausalLM, config).save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(folder)
    return folder


def test_vocabulary_of_pieces(tmp_path: Path) -> None:
    folder = with_tokenizer(
        pieces(), tmp_path / "source", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    assert write_gguf(folder, tmp_path / "out.gguf")["warnings"] == []
    keys, _ = read(tmp_path / "out.gguf")
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    scores = dict(zip(tokens, keys["tokenizer.ggml.scores"], strict=True))
    assert keys["tokenizer.ggml.model"] == "llama"
    assert len(tokens) == len(types) == 300
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert tokens[-1] == "[PAD299]"
    assert types[:4] == [2, 3, 3, 6]
    assert (types[tokens.index("▁abc")], types[-1]) == (1, 5)
    assert scores["bc"] > scores["▁a"] > scores["▁abc"] > scores["<s>"]
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert keys["tokenizer.ggml.add_eos_token"] is False
    assert keys["tokenizer.ggml.add_space_prefix"] is True
    ids = [keys[f"tokenizer.ggml.{kind}_token_id"] for kind in ("unknown", "bos", "eos")]
    assert ids == [0, 1, 2]
    assert keys["tokenizer.chat_template"] == "{{ messages }}"


PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("gpt-2", [pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        ("qwen2", [pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"), PLAIN]),
        (
            "llama-bpe",
            [
                pre_tokenizers.Split(
                    Regex(PRETOKENIZE_REGEX.replace(r"\p{N}|", r"\p{N}{1,3}|")), "isolated"
                ),
                PLAIN,
            ],
        ),
    ],
)
def test_ways_to_split(name: str, steps: list[Any], tmp_path: Path) -> None:
    write_gguf(with_tokenizer(levels(*steps), tmp_path / "source"), tmp_path / "out.gguf")
    keys, _ = read(tmp_path / "out.gguf")
    assert keys["tokenizer.ggml.pre"] == name
    assert keys["tokenizer.ggml.merges"] == ["a b"]


def lower() -> tokenizers.Tokenizer:
    made = levels(pre_tokenizers.ByteLevel(add_prefix_space=False))
    made.normalizer = normalizers.Lowercase()
    return made


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: levels(pre_tokenizers.Split(Regex("x"), "isolated"), PLAIN), "split text, ['x']"),
        (lambda: levels(pre_tokenizers.ByteLevel(add_prefix_space=True)), "add_prefix_space"),
        (lower, "a normalizer, Lowercase"),
        (lambda: tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a")), "a WordLevel model"),
        (lambda: tokenizers.Tokenizer(models.BPE({"a": 0}, [])), "neither bytes nor"),
    ],
)
def test_tokenizers_llama_cpp_lacks_are_refused(
    made: Callable[[], tokenizers.Tokenizer], words: str, tmp_path: Path
) -> None:
    folder = with_tokenizer(made(), tmp_path / "source")
    refused(UnsupportedModel, folder, tmp_path / "out.gguf", words)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = with_tokenizer(pieces(), tmp_path / "source", size=100)
    refused(CheckpointError, folder, tmp_path / "out.gguf", "token 265", "embeds 100")
