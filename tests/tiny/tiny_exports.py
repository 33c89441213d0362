"""Tiny sources with grouped-query attention, rope scaling and ties, and their conversion for export."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import random_model

from moefy import recipe as recipes
from moefy.conversion.convert import convert

SETTINGS: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 3e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True)
class Case:
    """A source with grouped-query attention, and what it is exported to."""

    model: str
    to: str
    settings: dict[str, Any]
    recipe: dict[str, str]
    dtype: torch.dtype = torch.float32


CASES = {
    "llama": Case(
        "Llama", "mixtral", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}, {}
    ),
    "mistral": Case(
        "Mistral",
        "mixtral",
        {"head_dim": 16, "sliding_window": 9, "rope_parameters": _YARN},
        {"partition.method": "random"},
    ),
    "qwen2": Case(
        "Qwen2", "qwen2_moe", {"rope_parameters": _YARN, "tie_word_embeddings": True}, {}
    ),
    "qwen3": Case(
        "Qwen3",
        "qwen3_moe",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        },
        {},
    ),
    "shared": Case(
        "Qwen2",
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        {"partition.shared": "2"},
    ),
    "llama_shared": Case("Llama", "qwen2_moe", {}, {"partition.shared": "1", "selection.k": "3"}),
    "bf16": Case("Qwen3", "qwen3_moe", {"head_dim": 16}, {}, torch.bfloat16),
    "bf16_three": Case(
        "Llama",
        "mixtral",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        {"selection.k": "3"},
        torch.bfloat16,
    ),
}


def token_ids() -> list[list[int]]:
    g = torch.Generator().manual_seed(5)
    return [torch.randint(3, 96, (20 + i % 41,), generator=g).tolist() for i in range(60)]


def source(case: Case, folder: Path) -> Path:
    config = getattr(transformers, f"{case.model}Config")(**SETTINGS | case.settings)
    model = random_model(getattr(transformers, f"{case.model}ForCausalLM"), config)
    model.to(case.dtype).save_pretrained(folder)
    return folder


def moefied(folder: Path, out: Path, changes: dict[str, str], **options: Any) -> Path:
    settings = {
        "partition.experts": "16",
        "partition.tokens": "256",
        "selection.k": "4",
        "router.tokens": "1024",
        "router.epochs": "2",
        "router.batch_size": "128",
    }
    recipe = recipes.override(recipes.load("export"), settings | changes)
    convert(folder, out, recipe=recipe, corpus=token_ids(), quiet=True, **options)
    return out
