"""A small Llama with random weights and a tokenizer of whole words, as a folder: what the campaigns work on."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def small_llama(folder: Path, words: int, width: int, heads: int, **saved: str) -> None:
    """Two layers of 2 * `width` neurons; the tokenizer knows `w0` to `w<words - 1>` and four marks.

    `saved` are arguments of `save_pretrained`, such as `max_shard_size`.
    """
    marks = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    ids = {f"w{i}": i for i in range(words)} | {
        mark: words + i for i, mark in enumerate(marks.values())
    }
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    config = LlamaConfig(
        vocab_size=-(-len(ids) // 32) * 32, hidden_size=width, intermediate_size=2 * width,
        num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=2,
        max_position_embeddings=64, pad_token_id=ids["<pad>"], bos_token_id=ids["<s>"],
        eos_token_id=ids["</s>"],
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, **saved)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)
