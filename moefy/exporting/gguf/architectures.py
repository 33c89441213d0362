"""What llama.cpp computes for each architecture, and which stock models it computes exactly.

A row of data for each class of transformers. What a row cannot hold is refused in words; nothing is
left to the error of a program that loads the file later. The rows are read off llama.cpp's
`src/models/{llama,qwen2,qwen3,qwen2moe,qwen3moe}.cpp` and `src/llama-graph.cpp`.
"""

from dataclasses import dataclass
from typing import Any

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
