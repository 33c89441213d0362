"""What llama.cpp computes for each architecture, which stock models it computes exactly, and the keys that say so.

A row of data for each class of transformers. What a row cannot hold is refused in words; nothing is
left to the error of a program that loads the file later. The rows are read off llama.cpp's
`src/models/{llama,qwen2,qwen3,qwen2moe,qwen3moe}.cpp` and `src/llama-graph.cpp`; names of keys are GGUF's
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

Shapes: S size of a head.
"""

from dataclasses import dataclass
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moefy.errors import UnsupportedModel

_QKV = frozenset({"q_proj", "k_proj", "v_proj"})


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One of llama.cpp's architectures."""

    name: str
    """`general.architecture` of the file, and the prefix of its keys."""
    pairs: bool = False
    """Rotary positions turn rows 2i and 2i + 1 of a head; transformers turns i and i + size / 2."""
    factors: bool = False
    """Every rotary frequency can have a factor of its own, as Llama 3 scales them."""
    square: bool = False
    """Heads times their size are the width."""
    own_output: bool = False
    """The output embeddings are stored even where they are the input's."""
    normalises: bool = True
    """Weights of the experts that run are divided by their sum."""
    biases: frozenset[str] = _QKV
    """Projections that may have biases."""


_LLAMA = Architecture(
    name="llama",
    pairs=True,
    factors=True,
    biases=_QKV | {"o_proj", "gate_proj", "up_proj", "down_proj"},
)

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Architecture(name="qwen2", square=True),
    "Qwen3ForCausalLM": Architecture(name="qwen3"),
    "Qwen2MoeForCausalLM": Architecture(
        name="qwen2moe", square=True, own_output=True, normalises=False
    ),
    "Qwen3MoeForCausalLM": Architecture(name="qwen3moe"),
}


def head_size(config: Any) -> int:
    """Width of one attention head."""
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def experts(config: Any) -> int:
    """Routed experts of a layer; 0 for a dense model."""
    for key in ("num_local_experts", "num_experts"):
        if getattr(config, key, None):
            return int(getattr(config, key))
    return 0


def architecture_of(config: Any) -> Architecture:
    """The row of a stock model; `UnsupportedModel` for one that llama.cpp computes in another way."""
    named = list(getattr(config, "architectures", None) or [config.model_type])
    if named[0] not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{named[0]}: no GGUF is written of it here, only of {', '.join(ARCHITECTURES)}"
        )
    row = ARCHITECTURES[named[0]]
    if config.hidden_act != "silu":
        raise UnsupportedModel(
            f"{named[0]}: activation '{config.hidden_act}'; llama.cpp's {row.name} knows only 'silu'"
        )
    size, heads = head_size(config), config.num_attention_heads
    if row.square and size * heads != config.hidden_size:
        raise UnsupportedModel(
            f"{named[0]}: {heads} heads of {size} are not the width {config.hidden_size}, which "
            f"llama.cpp's {row.name} takes for granted"
        )
    if experts(config) and row.normalises and not getattr(config, "norm_topk_prob", True):
        raise UnsupportedModel(
            f"{named[0]}: norm_topk_prob is false; llama.cpp's {row.name} always divides the "
            "weights of experts by their sum"
        )
    return row


def warnings(config: Any) -> list[str]:
    """What llama.cpp leaves out of the model, in words for the user."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"]
    if not window or "sliding_attention" not in kinds:
        return []
    return [
        f"attention reaches back {window} tokens only; llama.cpp's architecture has no sliding "
        "window and computes other logits beyond"
    ]


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
