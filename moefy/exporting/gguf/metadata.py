"""The keys that say how large a model is and how its positions turn.

The names are GGUF's (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

Shapes: S size of a head.
"""

from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moefy.errors import UnsupportedModel
from moefy.exporting.gguf.architectures import Architecture, experts, head_size

_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
"""What llama.cpp computes, and transformers where nothing is said."""
_SCALING_KEYS = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    },
    "yarn": {"factor", "original_max_position_embeddings", *_YARN},
}  # fmt: skip


def add_metadata(writer: GGUFWriter, architecture: Architecture, config: Any) -> None:
    """Sizes, positions and routing; `UnsupportedModel` for positions llama.cpp computes otherwise."""
    size = head_size(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if experts(config):
        writer.add_expert_count(experts(config))
        writer.add_expert_used_count(config.num_experts_per_tok)
    if getattr(config, "moe_intermediate_size", None):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if getattr(config, "shared_expert_intermediate_size", None):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    _add_positions(writer, architecture, config)


def _add_positions(writer: GGUFWriter, architecture: Architecture, config: Any) -> None:
    rope = _rope(architecture, config)
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    else:  # Llama 3's factors are a tensor
        writer.add_rope_scaling_type(RopeScalingType.NONE)
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _rope(architecture: Architecture, config: Any) -> dict[str, Any]:
    """The positions, refused where llama.cpp has no words for them."""
    rope: dict[str, Any] = {
        key: value for key, value in config.rope_parameters.items() if value is not None
    }
    kind = rope["rope_type"]
    if kind not in _SCALING_KEYS or (kind == "llama3" and not architecture.factors):
        known = sorted(set(_SCALING_KEYS) - (set() if architecture.factors else {"llama3"}))
        raise UnsupportedModel(
            f"rope scaling '{kind}': llama.cpp's {architecture.name} computes {', '.join(known)}; "
            "within the context the model was trained for, set rope_type to 'default' in config.json"
        )
    known_keys = _SCALING_KEYS[kind] | {"rope_type", "rope_theta", "partial_rotary_factor"}
    usual = _YARN | {"partial_rotary_factor": 1.0}
    for key, value in rope.items():
        if key not in known_keys or (key in usual and value != usual[key]):
            raise UnsupportedModel(
                f"rope scaling '{kind}': {key}={value} has no counterpart in llama.cpp's "
                f"{architecture.name}"
            )
    return rope


def position_factors(architecture: Architecture, config: Any) -> Tensor | None:
    """`[S / 2]`, fp32: by what every rotary frequency is divided; None where by nothing."""
    if _rope(architecture, config)["rope_type"] != "llama3":
        return None
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size, base = head_size(config), config.rope_parameters["rope_theta"]
    plain = torch.tensor(base) ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    factors: Tensor = plain / scaled.double()
    return factors.float()
