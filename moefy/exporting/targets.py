"""Stock mixture-of-experts architectures: what each can hold, and its configuration.

A target is a row of data. `check` refuses what the row cannot hold and says which target can;
`stock_config` writes the source's settings in the target's words.

Shapes: N neurons, D width, E routed experts, S shared experts, F neurons per expert, K experts
that run.
"""

from dataclasses import dataclass, field
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from moefy.errors import MoefyError, RecipeError, UnsupportedModel, unknown_choice
from moefy.models.artefact import Artefact
from moefy.models.entries import LayerEntry
from moefy.models.locate import Site

DENSE, GGUF = "dense", "gguf"
SHARED_GAIN = 2.0
"""Stock shared experts pass through a sigmoid gate: 1/2 where the gate's weights are zero."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One stock architecture. Names of tensors are those on disk, which engines read too."""

    model_type: str
    architecture: str
    sources: frozenset[str]
    """Model types whose attention, norms and positions this architecture computes the same way."""
    block: str
    """The mixture of experts, relative to a layer."""
    experts: dict[str, str]
    """Tensor of one expert by role (`gate`, `up`, `down`), `{}` its number."""
    count_key: str
    """Config key of E."""
    size_key: str
    """Config key of F."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Config values that make the architecture do what is wanted of it."""
    attention_biases: bool = False
    """Query, key and value have biases, always; they are zero where the source has none."""
    shared: bool = False
    """Every layer has a shared expert; it is zero where the source has none."""

    def expert(self, layer: str, role: str, number: int) -> str:
        """Name on disk of one expert's weight."""
        return f"{layer}.{self.block}.{self.experts[role].format(number)}"


_QWEN_EXPERTS = {role: f"experts.{{}}.{role}_proj.weight" for role in ("gate", "up", "down")}
# Without norm_topk_prob the weights would add up to K/E instead of 1.
_QWEN_SETTINGS = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}

TARGETS: dict[str, Target] = {
    row.model_type: row
    for row in (
        Target(
            model_type="mixtral",
            architecture="MixtralForCausalLM",
            sources=frozenset({"llama", "mistral"}),
            block="block_sparse_moe",
            experts={
                "gate": "experts.{}.w1.weight",
                "down": "experts.{}.w2.weight",
                "up": "experts.{}.w3.weight",
            },
            count_key="num_local_experts",
            size_key="intermediate_size",
            settings={"router_jitter_noise": 0.0},
        ),
        Target(
            model_type="qwen2_moe",
            architecture="Qwen2MoeForCausalLM",
            sources=frozenset({"llama", "mistral", "qwen2"}),
            block="mlp",
            experts=_QWEN_EXPERTS,
            count_key="num_experts",
            size_key="moe_intermediate_size",
            settings={**_QWEN_SETTINGS, "qkv_bias": True},
            attention_biases=True,
            shared=True,
        ),
        Target(
            model_type="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            sources=frozenset({"qwen3"}),
            block="mlp",
            experts=_QWEN_EXPERTS,
            count_key="num_experts",
            size_key="moe_intermediate_size",
            settings=_QWEN_SETTINGS,
        ),
    )
}

# Settings that mean the same in every source and target.
_COMMON = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "attention_dropout",
    "rope_parameters",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_SPELLED_OUT = (*_COMMON, "tie_word_embeddings", "transformers_version")


def find_target(name: str) -> Target | None:
    """The row called `name`, None for `dense`; `MoefyError` for any other name."""
    if name == DENSE:
        return None
    if name not in TARGETS:
        raise MoefyError(unknown_choice("export target", name, [*TARGETS, DENSE, GGUF]))
    return TARGETS[name]


def native_target(config: PreTrainedConfig, *, shared: bool) -> str:
    """The row that holds a source with this configuration, one with shared experts if need be.

    Where no row does, the nearest: `check` then says why not.
    """
    rows = _fitting(config) or list(TARGETS)
    return next((name for name in rows if TARGETS[name].shared or not shared), rows[0])


def check(target: Target, artefact: Artefact, places: list[Site], meta: PreTrainedModel) -> None:
    """Refuse what `target` cannot hold of a model, with MLPs at these places, saying what can.

    Raises `RecipeError` for a routing it has no words for and `UnsupportedModel` for a model.
    """
    _check_model(target, places, meta)
    if artefact.heads:
        raise RecipeError(
            f"attention heads are routed (attention.density={artefact.recipe['attention']['density']}"
            f"); {target.model_type} runs them all: convert with attention.density=null, or export "
            "--to dense"
        )
    for index, entry in enumerate(artefact.layers):
        _check_routing(target, index, entry)
    first = artefact.layers[0]
    for index, entry in enumerate(artefact.layers):
        for what, got, want in (
            ("experts", entry.experts, first.experts),
            ("shared experts", entry.shared, first.shared),
            ("experts that run", entry.active, first.active),
            ("neurons", entry.neurons, first.neurons),
        ):
            if got != want:
                raise RecipeError(
                    f"layer {index} has {got} {what}, layer 0 has {want}; {target.model_type} has "
                    "one number for all layers: convert with the same for each"
                )
    if first.shared and not target.shared:
        fitting = [name for name in _fitting(meta.config) if TARGETS[name].shared]
        raise RecipeError(
            f"{first.shared} shared experts, {target.model_type} has none; "
            + (f"export --to {fitting[0]}, or " if fitting else "")
            + "convert with --set partition.shared=0"
        )


def _check_model(target: Target, places: list[Site], meta: PreTrainedModel) -> None:
    config, kind = meta.config, meta.config.model_type
    if kind not in target.sources:
        fitting = _fitting(config)
        known = sorted({source for row in TARGETS.values() for source in row.sources})
        remedy = (
            f"export --to {' or '.join(fitting)}"
            if fitting
            else f"only {', '.join(known)} have stock counterparts; export --to dense"
        )
        raise UnsupportedModel(
            f"{kind}: {target.model_type} computes its attention or norms in another way; {remedy}"
        )
    for site in places:
        if site.biases:
            raise UnsupportedModel(
                f"{site.layer}: its MLP has biases ({', '.join(sorted(site.biases))}), no stock "
                "mixture of experts has; export --to dense"
            )
    windows = set(getattr(config, "layer_types", None) or [])
    if target.model_type == "qwen3_moe" and len(windows) > 1:
        raise UnsupportedModel(
            f"{kind}: some layers have a sliding window and some have not, {target.model_type} "
            "has one kind for all; export --to dense"
        )
    if not type(meta).__name__.endswith("ForCausalLM"):
        raise UnsupportedModel(
            f"{kind}: {type(meta).__name__}; only models with a language-model head have stock "
            "counterparts here, export --to dense"
        )


def _check_routing(target: Target, index: int, entry: LayerEntry) -> None:
    for what, got, want in (
        ("router", entry.router["name"], "linear"),
        ("selection", entry.selection["name"], "softmax_topk"),
        ("compensation", entry.compensation["name"], "none"),
    ):
        if got != want:
            raise RecipeError(
                f"layer {index}: {what} '{got}', {target.model_type} can hold only '{want}'; "
                "convert with --recipe export"
            )


def _fitting(config: PreTrainedConfig) -> list[str]:
    return [name for name, row in TARGETS.items() if config.model_type in row.sources]


def stock_config(
    target: Target, entry: LayerEntry, config: PreTrainedConfig, *, tied: bool, dtype: str
) -> PreTrainedConfig:
    """The target's configuration of the source `config`, whose layers are all like `entry`.

    `tied` says whether the input and output embeddings are one tensor, `dtype` in what the weights
    are stored.
    """
    size = entry.neurons // entry.experts
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    settings = {key: getattr(config, key) for key in _COMMON}
    settings |= {
        "head_dim": head,
        "tie_word_embeddings": tied,
        "dtype": dtype,
        "architectures": [target.architecture],
        "num_experts_per_tok": entry.selection["k"],
        target.count_key: entry.experts - entry.shared,
        **_window(target, config),
        **target.settings,
    }
    if target.size_key != "intermediate_size":
        settings["intermediate_size"] = entry.neurons
    if target.shared:
        settings["shared_expert_intermediate_size"] = size * max(1, entry.shared)
    settings[target.size_key] = size
    made: PreTrainedConfig = AutoConfig.for_model(target.model_type, **settings)
    return made


def _window(target: Target, config: PreTrainedConfig) -> dict[str, Any]:
    """Sliding-window attention in the target's words."""
    window, layers = getattr(config, "sliding_window", None), config.num_hidden_layers
    if target.model_type == "mixtral":
        return {"sliding_window": window}
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * layers
    sliding = "sliding_attention" in kinds
    settings: dict[str, Any] = {
        "use_sliding_window": sliding,
        "sliding_window": window if sliding else None,
    }
    if target.model_type == "qwen2_moe":
        settings["layer_types"] = kinds
        settings["max_window_layers"] = getattr(config, "max_window_layers", layers)
    return settings


def config_json(config: PreTrainedConfig) -> dict[str, Any]:
    """`config.json` with every setting of the architecture spelled out, defaults too.

    Positions are there twice: as `rope_parameters`, which transformers 5 reads, and as `rope_theta`
    and `rope_scaling`, which readers made for transformers 4 do.
    """
    idle = PreTrainedConfig().to_dict()
    settings: dict[str, Any] = {
        key: value
        for key, value in config.to_dict().items()
        if key not in idle or idle[key] != value or key in _SPELLED_OUT
    }
    rope = dict(settings["rope_parameters"])
    settings["rope_theta"] = rope.pop("rope_theta")
    settings["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    return settings


def warnings(target: Target, entry: LayerEntry, config: PreTrainedConfig, dtype: str) -> list[str]:
    """What may go wrong in serving engines, in words for the user."""
    k, experts, size = (
        entry.selection["k"],
        entry.experts - entry.shared,
        entry.neurons // entry.experts,
    )
    cautions = {
        f"{k} experts run for a token, which is no power of two: down projections times {k} are rounded to "
        f"{dtype}; convert with --set selection.k={1 << (k.bit_length() - 1)} to avoid that": (
            k & (k - 1) and dtype != "float32"
        ),
        "the scaled routers lie below the normal range of float16 and lose bits when loaded in it; load the "
        "model in bfloat16 or float32": dtype == "float16",
        **_sizes(experts, size),
        f"activation '{config.hidden_act}': engines other than transformers take silu for granted in "
        f"{target.model_type}": config.hidden_act != "silu",
        f"{target.model_type} always has a shared expert; one of {size} neurons with zero weights was added": (
            target.shared and not entry.shared
        ),
        "the sliding window is written as layer_types, which not every engine reads": (
            target.shared
            and config.model_type != "qwen2"
            and getattr(config, "sliding_window", None)
        ),
    }
    return [text for text, applies in cautions.items() if applies]


def _sizes(experts: int, size: int) -> dict[str, bool]:
    """Cautions about E and F, and whether each applies."""
    return {
        f"{experts} routed experts are no power of two: vLLM's fused top-k kernel is made for powers of two, "
        "and old llama.cpp builds sort nothing else on a GPU": bool(experts & (experts - 1)),
        f"{experts} routed experts: llama.cpp stops at a fixed number when it loads a model (256 in builds of "
        "early 2025, then 512, later more)": experts > 256,
        f"experts of {size} neurons: GGUF's block quantisation needs multiples of 32 (K-quants of 256)": (
            size % 32 > 0
        ),
        f"experts of {size} neurons: transformers' grouped kernel needs multiples of 8 in 16 bits and of 4 in "
        "float32; load others with experts_implementation='eager'": size % 8 > 0,
        f"experts of {size} neurons are small for the grouped kernels of serving engines, which may run them "
        "no faster than the dense model": size < 128,
    }
