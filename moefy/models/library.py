"""What moefy relies on in transformers, accelerate, peft, torch and huggingface_hub, all in one place.

Above: what a forward call was given, found by what it is. A release may rename an argument (the
key-value cache was `past_key_values` up to transformers 5.23, then `cache`); its kind stays, and where
that is not enough moefy refuses rather than take a token for a prompt. Below: `ROWS`, everything that a
release could move without notice, with the release it was last seen in. tests/models/test_library.py holds a
canary for every row.

    cache = find_cache(given_to(names, args, kwargs))
    model(ids, **passing(model, cache))

Shapes: B sequences, T tokens of this pass, S tokens of it and before it, D width.
"""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache

from moefy.errors import MoefyError

CACHE_NAMES = ("cache", "past_key_values", "cache_params", "layer_past")
"""What parameters of `forward` for a cache have been called: only to tell several apart."""
TOKEN_NAMES = ("input_ids", "inputs_embeds", "pixel_values")
MASK_NAME = "attention_mask"
HIDDEN_NAME = "hidden_states"
POSITION_NAMES = ("position_ids", "cache_position")
_LIKE_MASKS = frozenset({
    *POSITION_NAMES, "token_type_ids", "mm_token_type_ids", "labels", "encoder_attention_mask",
    "global_attention_mask", "decoder_input_ids", "decoder_attention_mask", "bool_masked_pos",
})  # fmt: skip
"""Arguments of the shape and dtype of ids or of a padding mask, which are neither."""
_PLAIN = (type(None), bool, int, float, str, Tensor, torch.dtype, torch.device)

Given = Mapping[str, Any]
"""What a forward call was given, by name, or by number where a position has no name."""


def positions(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The names of a function's positional arguments."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(forward).parameters
    return tuple(name for name, parameter in found.items() if parameter.kind in kinds)


def given_to(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Given:
    """The arguments of a call of a function whose positional arguments have these names."""
    if not args:
        return kwargs
    rest = (f"argument {number}" for number in range(len(names), len(args)))
    return {**dict(zip((*names, *rest), args, strict=False)), **kwargs}


def find_cache(given: Given) -> Cache | None:
    """The key-value cache of the tokens themselves: of an encoder-decoder's, the self-attention part.

    Raises `MoefyError` if there are several and no name tells which it is.
    """
    found = {name: value for name, value in given.items() if isinstance(value, Cache)}
    if len({id(cache) for cache in found.values()}) > 1:
        known = [name for name in CACHE_NAMES if name in found]
        if len(known) != 1:
            raise MoefyError(
                f"forward was given several key-value caches ({', '.join(found)}); pass the one of "
                "these tokens alone"
            )
        found = {known[0]: found[known[0]]}
    cache = next(iter(found.values()), None)
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def find_tokens(given: Given) -> Tensor | None:
    """Ids `[B, T]`, embeddings `[B, T, D]` or images `[B, C, H, W]`; None if there are none.

    Of several like ids the shortest: a mask covers at least the tokens.
    """
    for name in TOKEN_NAMES:
        if isinstance(given.get(name), Tensor):
            found: Tensor = given[name]
            return found
    others = {n: v for n, v in given.items() if isinstance(v, Tensor) and n not in _LIKE_MASKS}
    ids = [v for n, v in others.items() if n != MASK_NAME and v.ndim == 2 and _whole(v)]
    if ids:
        return min(ids, key=lambda value: value.shape[1])
    wide = [v for n, v in others.items() if n != MASK_NAME and v.ndim > 2 and v.is_floating_point()]
    return wide[0] if len(wide) == 1 else None


def find_mask(given: Given, tokens: Tensor, *, surely: bool) -> Tensor | None:
    """The padding mask `[B, S]`, True or 1 where a token is; None if there is none.

    Masks of four axes say who attends to whom, and are none. With `surely` a mask of whole numbers is
    also found under another name, by its values, and several candidates raise `MoefyError`.
    """
    named = given.get(MASK_NAME)
    if isinstance(named, Tensor):
        return named if named.ndim == 2 else None
    if tokens.ndim > 3:
        return None
    found = {
        name: value
        for name, value in given.items()
        if isinstance(value, Tensor) and value is not tokens and name not in _LIKE_MASKS
        and name not in TOKEN_NAMES and _may_mask(value, tokens, surely)
    }  # fmt: skip
    if surely and len(found) > 1:
        raise MoefyError(
            f"forward was given {', '.join(found)}, and which is the padding mask is not clear; pass "
            f"it as {MASK_NAME}"
        )
    return next(iter(found.values()), None)


def _may_mask(value: Tensor, tokens: Tensor, surely: bool) -> bool:
    B, T = tokens.shape[:2]
    if value.ndim != 2 or len(value) != B or value.shape[1] < T:
        return False
    return value.dtype == torch.bool or (
        surely and _whole(value) and bool(((value == 0) | (value == 1)).all())
    )


def attending(given: Given, tokens: Tensor) -> Tensor | None:
    """Where a prompt holds tokens `[B, T]`, by a mask `[B, 1, T, S]` of who attends to whom.

    Such a mask comes with a cache of fixed size, also as one for each kind of layer. Every token attends
    to itself and nobody to padding. Raises `MoefyError` for several sequences under a mask of
    another kind.
    """
    mask = given.get(MASK_NAME)
    if isinstance(mask, Mapping):
        mask = next(iter(mask.values()), None)
    if mask is None or isinstance(mask, Cache) or len(tokens) == 1:
        return None
    B, T = tokens.shape[:2]
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[2] != T or mask.shape[3] < T:
        raise MoefyError(
            f"the routing of this model depends on the prompt, and {MASK_NAME} is a "
            f"{type(mask).__name__} {list(getattr(mask, 'shape', ()))} that does not show which of its "
            f"[{B}, {T}] places are padding; pass a mask [{B}, {T}]"
        )
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return seen.diagonal(dim1=2, dim2=3).any(1).expand(B, T)


def _whole(value: Tensor) -> bool:
    return value.dtype in (torch.int64, torch.int32)


def cached(given: Given, tokens: Tensor, mask_BS: Tensor | None) -> Cache | None:
    """The cache of a pass whose routing depends on there being one.

    Raises `MoefyError` where none is found and yet the pass has something that may be one, or goes on
    behind tokens that are not among the arguments.
    """
    cache = find_cache(given)
    if cache is not None:
        return cache
    remedy = "pass a transformers Cache, or use_cache=False for a pass that stands alone"
    for name, value in given.items():
        if (name in CACHE_NAMES and value is not None) or _may_be_state(value):
            raise MoefyError(
                f"the routing of this model depends on the key-value cache, and '{name}' is a "
                f"{type(value).__name__}, not one that is known here; {remedy}"
            )
    behind = _goes_on(given, tokens, mask_BS)
    if behind is not None:
        raise MoefyError(
            "the routing of this model depends on the key-value cache, and none is among the "
            f"arguments ({', '.join(given)}) though {behind}; {remedy}"
        )
    return None


def _may_be_state(value: Any) -> bool:
    """Whether a value may hold what came before: neither plain nor a mapping of plain values."""
    if isinstance(value, _PLAIN):
        return False
    if isinstance(value, Mapping):
        return any(_may_be_state(one) for one in value.values())
    if isinstance(value, (list, tuple)):
        return any(isinstance(one, Tensor) or _may_be_state(one) for one in value)
    return True


def _goes_on(given: Given, tokens: Tensor, mask_BS: Tensor | None) -> str | None:
    """What says that tokens came before those of a pass without a cache; None where nothing does."""
    T = tokens.shape[1]
    if mask_BS is not None and mask_BS.shape[1] > T:
        return f"the mask covers {mask_BS.shape[1]} tokens and {T} are given"
    if given.get("use_cache") is False:
        return None
    if T == 1:
        return "a single token is given"
    for name in POSITION_NAMES:
        places = given.get(name)
        if isinstance(places, Tensor) and int(places.min()) > 0:
            return f"{name} begins at {int(places.min())}"
    return None


def is_empty(cache: Cache) -> bool:
    """Whether no token has gone into a cache; `MoefyError` where it does not tell."""
    try:
        return int(cache.get_seq_length()) == 0
    except (AttributeError, TypeError, ValueError) as error:
        raise MoefyError(
            f"{type(cache).__name__}: how many tokens this cache holds is not to be had ({error}); use "
            "a selection that does not depend on the prompt"
        ) from None


def cache_parameter(forward: Callable[..., Any]) -> str | None:
    """The parameter of a model's `forward` that takes the key-value cache; None where none does."""
    found = inspect.signature(forward).parameters
    typed = [name for name, parameter in found.items() if _is_cache(parameter.annotation)]
    known = [name for name in CACHE_NAMES if name in found]
    both = [name for name in known if name in typed]
    return next(iter([*both, *known, *(typed if len(typed) == 1 else [])]), None)


def _is_cache(annotation: Any) -> bool:
    if isinstance(annotation, str):
        return re.search(r"\b\w*Cache\b", annotation) is not None
    kinds = get_args(annotation) or (annotation,)
    return any(isinstance(kind, type) and issubclass(kind, Cache) for kind in kinds)


def cache_argument(model: nn.Module) -> str:
    """`cache_parameter` of a model that decodes; `MoefyError` where it has none."""
    name = cache_parameter(model.forward)
    if name is None:
        raise MoefyError(
            f"{type(model).__name__}: forward takes no key-value cache that is known here (its "
            f"arguments are {', '.join(positions(model.forward))}), which decoding and selections that "
            "depend on the prompt need; use a selection that looks at single tokens"
        )
    return name


def passing(model: nn.Module, cache: Cache) -> dict[str, Cache]:
    """A cache as the argument of `model` that takes it."""
    return {cache_argument(model): cache}


def find_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], width: int | None = None
) -> int | str:
    """Where a layer, MLP or attention block was given its hidden states `[..., D]`.

    They come first, or by their name, or as the only tensor of this `width`. Raises `MoefyError` where
    none of it holds.
    """
    if args and _is_hidden(args[0], width):
        return 0
    if _is_hidden(kwargs.get(HIDDEN_NAME), width):
        return HIDDEN_NAME
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    found = [place for place, value in places if _is_hidden(value, width)]
    if len(found) != 1:
        raise MoefyError(
            f"a block was called with {[place for place, _ in places]}, of which {len(found)} may be "
            f"its hidden states{'' if width is None else f' of width {width}'}; this release of "
            "transformers calls it in a way that is not known here"
        )
    return found[0]


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any], width: int | None = None) -> Tensor:
    """The hidden states `[..., D]` that a block was given; see `find_hidden`."""
    place = find_hidden(args, kwargs, width)
    found: Tensor = args[place] if isinstance(place, int) else kwargs[place]
    return found


def _is_hidden(value: Any, width: int | None) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 2:
        return False
    return width is None or value.shape[-1] == width


class Row(NamedTuple):
    """Something that a release of a library could move."""

    name: str
    where: str
    """`module:attribute`, as `missing` looks it up."""
    purpose: str
    seen: str
    """The last release that had it."""
    takes: tuple[str, ...] = ()
    """Parameters that moefy names or counts on; "a or b" where either will do."""


_T, _A, _P, _H, _TORCH = (
    "transformers 5.24.0", "accelerate 1.15.0", "peft 0.21.2", "huggingface_hub 2.4.0", "torch 2.13.0"
)  # fmt: skip
_MODEL, _MOE = "transformers:PreTrainedModel", "transformers.integrations.moe"
_EXPERTS = ("hidden_states", "top_k_index", "top_k_weights")
_CACHED = ("input_ids", "attention_mask", "cache or past_key_values", "inputs_embeds", "use_cache")

ROWS = (
    Row("cache", "transformers:Cache.get_seq_length", "told by its class; empty means a prompt", _T),
    Row("cache of an encoder-decoder", "transformers:EncoderDecoderCache",
        "has a self_attention_cache", _T),
    Row("forward of a decoder", "transformers:LlamaForCausalLM.forward",
        "what passes are given, and options of our own calls", _T,
        (*_CACHED, "position_ids", "logits_to_keep")),
    Row("forward of the decoder of an encoder-decoder",
        "transformers.models.t5.modeling_t5:T5Stack.forward", "as that of a decoder", _T, _CACHED),
    Row("two sides", f"{_MODEL}.get_decoder", "each side of an encoder-decoder runs by itself", _T),
    Row("generate", "transformers:GenerationMixin.generate",
        "gives every pass a cache, an empty one with the prompt; hands use_cache=False on", _T),
    Row("cache that grows", "transformers:DynamicCache.__init__", "bench", _T, ("config",)),
    Row("cache of fixed size", "transformers:StaticCache.__init__", "bench of compiled models", _T,
        ("config", "max_cache_len")),
    Row("cache emptied", "transformers:StaticCache.reset", "bench of compiled models", _T),
    Row("hidden states given", "transformers.models.llama.modeling_llama:LlamaDecoderLayer.forward",
        "blocks are given them first or as hidden_states", _T, (HIDDEN_NAME,)),
    Row("hidden states returned", "transformers.modeling_outputs:BaseModelOutput",
        "output_hidden_states=True gives hidden_states, the last one last", _T, (HIDDEN_NAME,)),
    Row("declared output", "transformers:BertForQuestionAnswering.forward",
        "its return type names its fields: start_logits, prediction_logits, last_hidden_state", _T),
    Row("masked language models",
        "transformers.models.auto.modeling_auto:MODEL_FOR_MASKED_LM_MAPPING_NAMES",
        "types that see what comes next unless config.is_decoder", _T),
    Row("class of a config", "transformers:AutoModelForCausalLM._model_mapping",
        "class of a model, or several, by the class of its config", _T),
    Row("model of a config", f"{_MODEL}._from_config",
        "shapes on the meta device, in a dtype; streaming", _T, ("config",)),
    Row("tied weights", f"{_MODEL}.tie_weights", "all_tied_weights_keys: copy to original", _T),
    Row("names on disk", "transformers.conversion_mapping:get_model_conversion_mapping",
        "which parameter a stored tensor is", _T, ("model",)),
    Row("renaming", "transformers.core_model_loading:WeightRenaming", "told from conversions", _T),
    Row("name of a stored tensor", "transformers.core_model_loading:rename_source_key",
        "five arguments in this order", _T,
        ("source_key", "weight_renamings", "weight_converters", "base_model_prefix",
         "meta_state_dict")),
    Row("loading", f"{_MODEL}.from_pretrained",
        "dtype, device_map, experts_implementation, output_loading_info (kind to names)", _T),
    Row("main input", f"{_MODEL}.main_input_name", "'pixel_values' is how images are told", _T),
    Row("known types", "transformers:CONFIG_MAPPING", "model_type in it", _T),
    Row("activations", "transformers.activations:ACT2FN", "functions by the name in config.json", _T),
    Row("transposed linear map", "transformers.pytorch_utils:Conv1D", "weights [in, out]", _T),
    Row("epsilon of a norm", "transformers.models.llama.modeling_llama:LlamaRMSNorm",
        "variance_epsilon, or eps in other norms; taken for 0 if there is neither", _T),
    Row("MLP method of BERT", "transformers.models.bert.modeling_bert:BertLayer.feed_forward_chunk",
        "an MLP that is no module", _T),
    Row("rotary scalings", "transformers.modeling_rope_utils:ROPE_INIT_FUNCTIONS", "GGUF", _T),
    Row("fast tokenizer", "transformers:PreTrainedTokenizerFast.backend_tokenizer",
        "to_str() is its JSON; GGUF", _T),
    Row("layer recomputed", "transformers.modeling_layers:GradientCheckpointingLayer",
        "recomputes while `training` is set on it", _T),
    Row("recomputing", f"{_MODEL}.gradient_checkpointing_enable", "use_reentrant=False", _T,
        ("gradient_checkpointing_kwargs",)),
    Row("choice of expert functions", f"{_MODEL}.set_experts_implementation", "bench", _T,
        ("experts_implementation",)),
    Row("whether there are experts", f"{_MODEL}._can_set_experts_implementation", "bench", _T),
    Row("expert function of a config", "transformers:MixtralConfig",
        "_experts_implementation is read at every call; bench of layers", _T),
    Row("registry of expert functions", f"{_MOE}:ExpertsInterface.register",
        "experts_implementation='moefy'", _T, ("key", "value")),
    Row("gate of experts", f"{_MOE}:_default_apply_gate", "another one is computed by theirs", _T),
    Row("experts of few tokens", f"{_MOE}:batched_mm_experts_forward", "what ours hands on", _T,
        _EXPERTS),
    Row("experts of many tokens", f"{_MOE}:grouped_mm_experts_forward", "what ours hands on", _T,
        _EXPERTS),
    Row("stock experts", "transformers.models.mixtral.modeling_mixtral:MixtralExperts",
        "has_gate, has_bias, is_transposed, is_concatenated, gate_up_proj, down_proj, act_fn", _T),
    Row("stock router", "transformers.models.mixtral.modeling_mixtral:MixtralSparseMoeBlock",
        "its `gate` returns logits first and ids third; export is verified by them", _T),
    Row("state of accelerate", "accelerate.state:AcceleratorState._reset_state",
        "a precision for each training of a process", _A),
    Row("weights given for a while", "accelerate.hooks:AlignDevicesHook.__init__",
        "layers on disk; offload and execution_device are read back", _A,
        ("execution_device", "offload", "weights_map")),
    Row("hook of a module", "accelerate.hooks:add_hook_to_module",
        "kept as _hf_hook, several of them in `hooks` of one", _A, ("module", "hook")),
    Row("model without weights", "accelerate:init_empty_weights", "streaming", _A,
        ("include_buffers",)),
    Row("a tensor set", "accelerate.utils:set_module_tensor_to_device", "streaming", _A,
        ("module", "tensor_name", "device", "value", "dtype")),
    Row("objects sent to all", "accelerate.utils:broadcast_object_list", "several processes", _A),
    Row("objects of all", "accelerate.utils:gather_object", "several processes", _A),
    Row("unused parameters", "accelerate.utils:DistributedDataParallelKwargs",
        "routers may go unused in a step", _A, ("find_unused_parameters",)),
    Row("model taken out again", "accelerate:Accelerator.unwrap_model", "after training", _A,
        ("keep_fp32_wrapper",)),
    Row("adapters", "peft:LoraConfig", "parameters called lora_*", _P,
        ("r", "lora_alpha", "target_modules", "target_parameters")),
    Row("adapters added for a while", "peft.tuners.lora:LoraModel.merge_adapter", "checks", _P),
    Row("adapters taken out", "peft.tuners.lora:LoraModel.unmerge_adapter", "checks", _P),
    Row("adapter onto a model", "peft:PeftModel.__init__", "merged when a folder is loaded", _P,
        ("model", "peft_config")),
    Row("numbers of an adapter", "peft:set_peft_model_state_dict",
        "returns missing_keys and unexpected_keys", _P, ("model", "peft_model_state_dict")),
    Row("adapter into the weights", "peft.tuners.lora:LoraModel.merge_and_unload",
        "merged when a folder is loaded", _P, ("safe_merge",)),
    Row("settings on an adapted model", "peft.tuners.tuners_utils:BaseTuner",
        "kept as peft_config on the model itself too", _P),
    Row("every linear map", "peft.tuners.tuners_utils:_maybe_include_all_linear_layers",
        "takes what is an nn.Linear, and asks it for its weight", _P),
    Row("graphs of one function", "torch._dynamo.config:recompile_limit", "bench", _TORCH),
    Row("under torch.compile", "torch.compiler:is_compiling", "what a graph cannot hold", _TORCH),
    Row("graphs forgotten", "torch.compiler:reset", "bench", _TORCH),
    Row("constant of a graph", "torch.compiler:assume_constant_result", "native kernels", _TORCH),
    Row("insides of a module", "torch.nn:Module",
        "_parameters, _forward_hooks, _forward_pre_hooks", _TORCH),
    Row("hook with arguments", "torch.nn:Module.register_forward_pre_hook", "passes read", _TORCH,
        ("with_kwargs",)),
    Row("operation", "torch.library:custom_op", "kernels", _TORCH, ("mutates_args",)),
    Row("schema of an operation", "torch.library:infer_schema", "native kernels", _TORCH,
        ("mutates_args",)),
    Row("shape of an operation", "torch.library:register_fake", "native kernels", _TORCH, ("lib",)),
    Row("error between processes", "torch.distributed:DistError", "another one ended", _TORCH),
    Row("instruction set", "torch.backends.cpu:get_cpu_capability", "records", _TORCH),
    Row("AVX512-BF16", "torch.cpu:_is_avx512_bf16_supported", "records", _TORCH),
    Row("AMX", "torch.cpu:_is_amx_tile_supported", "records", _TORCH),
    Row("shards", "huggingface_hub:split_torch_state_dict_into_shards", "export", _H,
        ("max_shard_size",)),
    Row("download", "huggingface_hub:snapshot_download", "ids for folders", _H,
        ("allow_patterns",)),
    Row("no such id", "huggingface_hub.errors:HFValidationError", "one line for the user", _H),
    Row("no answer", "huggingface_hub.errors:HfHubHTTPError", "one line for the user", _H),
    Row("not downloaded", "huggingface_hub.errors:LocalEntryNotFoundError",
        "one line for the user", _H),
)  # fmt: skip


def missing(row: Row) -> str | None:
    """What of a row the installed libraries do not have; None where all is there.

    A library that is not installed at all, as peft may be, misses nothing.
    """
    module, _, path = row.where.partition(":")
    if find_spec(module.split(".")[0]) is None:
        return None
    try:
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        return f"last seen in {row.seen}: {row.where} ({row.name}): {error}"
    takes = inspect.signature(found).parameters if row.takes else {}
    for names in row.takes:
        if not any(name in takes for name in names.split(" or ")):
            return f"last seen in {row.seen}: argument '{names}' of {row.where} ({row.name})"
    return None


def moved() -> list[str]:
    """One line for each row that the installed libraries do not have as moefy uses it."""
    return [line for row in ROWS if (line := missing(row)) is not None]
