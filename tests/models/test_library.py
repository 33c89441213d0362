"""What moefy relies on in other libraries: a canary for every row, and passes told by what they are given.

The canaries run on the installed libraries; each says what moved and where it was last seen. The rest
gives a model its cache in ways that no release has yet, and in ways that must be refused.
"""

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig, get_peft_model
from tiny_conversion import convert_tiny
from tiny_models import FAMILIES_TINY, build, example_inputs
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StaticCache,
    ViTForImageClassification,
)
from transformers.integrations.moe import ExpertsInterface, _default_apply_gate
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralSparseMoeBlock
from transformers.pytorch_utils import Conv1D

import moefy
from moefy.errors import MoefyError
from moefy.experts.moefied import share_context
from moefy.experts.passes import listen
from moefy.experts.placement import offloaded
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.models.heads import head_sites
from moefy.models.library import (
    ROWS,
    Row,
    attending,
    cache_argument,
    find_cache,
    find_hidden,
    find_mask,
    find_tokens,
    given_to,
    hidden_of,
    is_empty,
    missing,
    moved,
)
from moefy.models.locate import disk_names, sites

IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(5))
PROMPT = 8


# ---- canaries


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES_TINY[name].auto(FAMILIES_TINY[name].make_config()).eval()


def mixtral() -> MixtralConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 8, "num_local_experts": 4, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    return MixtralConfig(**sizes, **heads, experts_implementation="eager")


def passes(root: nn.Module, run: Callable[[], object]) -> list[dict[str, Any]]:
    """What every call of `root` is given meanwhile; of a cache a copy, as it was then."""
    seen: list[dict[str, Any]] = []
    hook = root.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(copy.deepcopy(dict(given_to((), args, kwargs)))),
        with_kwargs=True,
    )
    run()
    hook.remove()
    return seen


def generates_with_a_cache() -> bool:
    model = tiny("llama")
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    seen = passes(model, lambda: model.generate(IDS, **options))
    empty = [is_empty(cache) for given in seen if (cache := find_cache(given)) is not None]
    without = passes(model, lambda: model.generate(IDS, use_cache=False, **options))
    return empty == [True, False, False] and all(
        given["use_cache"] is False and find_cache(given) is None for given in without
    )


def sides_run_by_themselves() -> bool:
    model, inputs = tiny("t5"), example_inputs("t5")
    inputs.pop("decoder_input_ids")
    model.generation_config.decoder_start_token_id = 0

    def run() -> None:
        model.generate(**inputs, max_new_tokens=2, do_sample=False, eos_token_id=None)

    inner = passes(model.get_decoder(), run)
    caches = [find_cache(given) for given in inner]
    outer = passes(model.get_encoder(), run)
    return [cache is not None and is_empty(cache) for cache in caches] == [True, False] and [
        find_cache(given) for given in outer
    ] == [None]


def hidden_states_are_heard() -> bool:
    return all(
        map(_hidden_states_are_heard, ("llama", "gpt2", "opt", "bert", "t5", "vit", "bloom"))
    )


def _hidden_states_are_heard(name: str) -> bool:
    model, heard = tiny(name), []
    found = sites(model)
    width = found[0].width
    places = {s.layer for s in found} | {s.block for s in head_sites_of(model)}
    for place in places:
        model.get_submodule(place).register_forward_pre_hook(
            lambda _, args, kwargs: heard.append(hidden_of(args, kwargs, width)), with_kwargs=True
        )
    listen(model, found, lambda _, x_TD: heard.append(x_TD))
    with torch.no_grad():
        model(**example_inputs(name))
    return len(heard) == len(places) + len(found) and all(x.shape[-1] == width for x in heard)


def head_sites_of(model: PreTrainedModel) -> list[Any]:
    known = model.config.model_type in ("llama", "gpt2", "opt", "t5")
    return head_sites(model) if known else []


def last_hidden_states_are_last() -> bool:
    model, heard = tiny("llama"), []
    model.lm_head.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
    return torch.equal(states[-1], heard[0]) and len(states) == 3


def built_on_meta() -> bool:
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(tiny("llama").config, dtype=torch.bfloat16)
    return model.dtype == torch.bfloat16 and model.device.type == "meta"


def tied_weights_are_named() -> bool:
    model = tiny("llama_tied")
    model.tie_weights()
    return model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}


def stored_names_are_found() -> bool:
    model = tiny("llama")
    names = {name: name for name in model.state_dict()}
    bare = {name.removeprefix("model."): name for name in names}
    return disk_names(model, names) == names and disk_names(model, bare) == bare


def loading_tells() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        _, info = LlamaForCausalLM.from_pretrained(
            build("llama", Path(folder) / "m"), dtype="auto", output_loading_info=True
        )
    return {"missing_keys", "unexpected_keys"} <= set(info) and not any(info.values())


def experts_say_what_they_are() -> bool:
    experts = MixtralExperts(mixtral())
    shapes = experts.gate_up_proj.shape, experts.down_proj.shape
    flags = experts.has_gate, experts.has_bias, experts.is_transposed, experts.is_concatenated
    return (
        shapes == ((4, 16, 16), (4, 16, 8))
        and flags == (True, False, False, True)
        and isinstance(experts.act_fn, nn.Module)
        and type(experts)._apply_gate is _default_apply_gate
    )


def experts_follow_their_config() -> bool:
    experts, called = MixtralExperts(mixtral()), []
    ExpertsInterface.register("canary", lambda self, x, ids, weights: called.append(x) or x)
    experts.config._experts_implementation = "canary"
    experts(torch.ones(3, 16), torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2))
    return len(called) == 1


def a_router_gives_logits_and_ids() -> bool:
    block, heard = MixtralSparseMoeBlock(mixtral()), []
    nn.init.normal_(block.gate.weight)
    block.gate.register_forward_hook(lambda _, __, out: heard.append(out))
    nn.init.zeros_(block.experts.gate_up_proj)
    nn.init.zeros_(block.experts.down_proj)
    block(torch.randn(1, 5, 16))
    logits, ids = heard[0][0], heard[0][2]
    return torch.equal(logits.topk(2).indices.sort().values, ids.sort().values)


def hooks_are_read_back() -> bool:
    linear = nn.Linear(2, 2)
    if offloaded(linear) is not None:
        return False
    weights = {name: value.detach() for name, value in linear.state_dict().items()}
    for _ in range(2):  # the second makes a chain of them
        hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=weights)
        add_hook_to_module(linear, hook, append=True)
    return offloaded(linear) == torch.device("cpu") and hasattr(linear._hf_hook, "hooks")


def adapters_are_called_lora() -> bool:
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"])
    wrapped = get_peft_model(tiny("llama"), config)
    trained = [name for name, value in wrapped.named_parameters() if value.requires_grad]
    wrapped.merge_adapter()
    wrapped.unmerge_adapter()
    return len(trained) == 8 and all("lora_" in name for name in trained)


def shards_are_described() -> bool:
    one = split_torch_state_dict_into_shards({"a": torch.ones(4)}, max_shard_size=100)
    two = split_torch_state_dict_into_shards(
        {"a": torch.ones(4), "b": torch.ones(4)}, max_shard_size=20
    )
    return (
        list(one.filename_to_tensors.values()) == [["a"]]
        and not one.is_sharded
        and two.is_sharded
        and set(two.tensor_to_filename) == {"a", "b"}
        and "total_size" in two.metadata
    )


def a_fast_tokenizer_gives_its_json() -> bool:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")))
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"] == {"a": 0}


def caches_are_told() -> bool:
    config = tiny("llama").config
    caches = [DynamicCache(config=config), StaticCache(config=config, max_cache_len=4)]
    return all(isinstance(cache, Cache) and is_empty(cache) for cache in caches)


def encoder_decoder_caches_have_parts() -> bool:
    own = DynamicCache()
    return EncoderDecoderCache(own, DynamicCache()).self_attention_cache is own


BEHAVIOURS: dict[str, Callable[[], bool]] = {
    "cache": caches_are_told,
    "cache of an encoder-decoder": encoder_decoder_caches_have_parts,
    "generate": generates_with_a_cache,
    "two sides": sides_run_by_themselves,
    "hidden states given": hidden_states_are_heard,
    "hidden states returned": last_hidden_states_are_last,
    "model of a config": built_on_meta,
    "tied weights": tied_weights_are_named,
    "name of a stored tensor": stored_names_are_found,
    "loading": loading_tells,
    "main input": lambda: ViTForImageClassification.main_input_name == "pixel_values",
    "transposed linear map": lambda: Conv1D(3, 2).weight.shape == (2, 3),
    "epsilon of a norm": lambda: LlamaRMSNorm(4, eps=0.5).variance_epsilon == 0.5,
    "layer recomputed": lambda: issubclass(LlamaDecoderLayer, GradientCheckpointingLayer),
    "whether there are experts": lambda: (
        MixtralForCausalLM(mixtral())._can_set_experts_implementation()
        and not tiny("llama")._can_set_experts_implementation()
    ),
    "expert function of a config": experts_follow_their_config,
    "stock experts": experts_say_what_they_are,
    "stock router": a_router_gives_logits_and_ids,
    "hook of a module": hooks_are_read_back,
    "adapters": adapters_are_called_lora,
    "insides of a module": lambda: (
        list(nn.Linear(1, 1)._parameters) == ["weight", "bias"]
        and not nn.Linear(1, 1)._forward_hooks
        and not nn.Linear(1, 1)._forward_pre_hooks
    ),
    "fast tokenizer": a_fast_tokenizer_gives_its_json,
    "shards": shards_are_described,
}
"""What a row is relied on to do, where being there does not say it."""


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_what_moefy_relies_on_is_there(row: Row) -> None:
    assert missing(row) is None, missing(row)
    moved_line = f"last seen in {row.seen}: {row.where} ({row.name}): {row.purpose}"
    try:
        holds = BEHAVIOURS.get(row.name, lambda: True)()
    except Exception as error:
        raise AssertionError(moved_line) from error
    assert holds, moved_line


def test_every_row_has_a_name_of_its_own_and_every_canary_a_row() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert set(BEHAVIOURS) <= set(names)
    assert moved() == []


@pytest.mark.parametrize(
    ("where", "takes", "says"),
    [
        ("transformers:Cash", (), "last seen in transformers 1.0: transformers:Cash"),
        ("torch.no_such_module:x", (), "last seen in transformers 1.0: torch.no_such_module:x"),
        ("torch.nn:Linear", ("in_features", "outs or out"), "argument 'outs or out'"),
    ],
)
def test_what_has_moved_is_named(where: str, takes: tuple[str, ...], says: str) -> None:
    line = missing(Row("it", where, "for a test", "transformers 1.0", takes))
    assert line is not None and says in line
    assert missing(Row("it", "no_such_library:x", "for a test", "1.0")) is None


# ---- what a call was given


def test_a_cache_is_found_by_its_class() -> None:
    cache, other = DynamicCache(), DynamicCache()
    assert find_cache({"kv": cache, "input_ids": IDS}) is cache
    assert find_cache(given_to(("input_ids", "attention_mask"), (IDS, cache), {})) is cache
    assert find_cache(given_to((), (IDS, None, cache), {})) is cache
    assert find_cache({"cache": EncoderDecoderCache(cache, other)}) is cache
    assert find_cache({"encoder_cache": other, "past_key_values": cache}) is cache
    assert find_cache({"cache": (cache,), "input_ids": IDS}) is None
    with pytest.raises(MoefyError, match="several key-value caches \\(mine, yours\\)"):
        find_cache({"mine": cache, "yours": other})


def test_tokens_and_mask_are_found_by_shape_and_dtype() -> None:
    mask, step = torch.ones(2, 12, dtype=torch.long), IDS[:, :1]
    places, full = torch.arange(12).expand(2, 12), torch.zeros(2, 1, 12, 12)
    wide = torch.randn(2, 12, 8)
    assert find_tokens({"words": step, "attention_mask": mask, "position_ids": places}) is step
    assert find_tokens({"words": step, "padding": mask}) is step
    assert find_tokens({"states": wide, "padding": mask.bool()}) is wide
    assert find_tokens({"attention_mask": mask, "labels": IDS}) is None
    assert find_mask({"attention_mask": mask, "input_ids": IDS}, IDS, surely=True) is mask
    renamed = {"input_ids": IDS, "position_ids": places, "others": IDS + 1, "padding": mask}
    assert find_mask(renamed, IDS, surely=True) is mask
    assert find_mask({"input_ids": step, "padding": mask.bool()}, step, surely=False) is not None
    assert find_mask({"attention_mask": full, "input_ids": IDS}, IDS, surely=True) is None
    with pytest.raises(MoefyError, match="given a, b, and which is the padding mask"):
        find_mask({"a": mask, "b": mask.clone(), "input_ids": IDS}, IDS, surely=True)


def test_hidden_states_are_found_first_by_name_or_by_width() -> None:
    x, other = torch.randn(1, 3, 8), torch.randn(1, 5, 8)
    angles = torch.randn(1, 3, 4)
    assert find_hidden((x, other), {"hidden_states": other}, 8) == 0
    assert find_hidden((), {"encoder_hidden_states": other, "hidden_states": x}, 8) == (
        "hidden_states"
    )
    assert find_hidden((angles,), {"states": x, "mask": None}, 8) == "states"
    assert find_hidden((), {"states": x, "ids": IDS}) == "states"
    for given in ({"a": x, "b": other}, {"a": angles}, {}):
        with pytest.raises(MoefyError, match="may be its hidden states of width 8"):
            find_hidden((), given, 8)


def test_the_argument_for_a_cache_is_found_by_name_or_by_type() -> None:
    class Named(nn.Module):
        def forward(self, ids: Tensor, past_key_values: Any = None) -> None: ...

    class Typed(nn.Module):
        def forward(self, ids: Tensor, kv: DynamicCache | None = None) -> None: ...

    class Quoted(nn.Module):
        def forward(self, ids: Tensor, kv: "DynamicCache | None" = None) -> None: ...

    class Neither(nn.Module):
        def forward(self, ids: Tensor, state: Any = None) -> None: ...

    found = [cache_argument(kind()) for kind in (Named, Typed, Quoted)]
    assert found == ["past_key_values", "kv", "kv"]
    with pytest.raises(MoefyError, match="forward takes no key-value cache that is known here"):
        cache_argument(Neither())


# ---- a model whose routing depends on the prompt, given its cache in every way


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    into = tmp_path_factory.mktemp("griffin")
    settings = {
        "router.name": "activation",
        "selection.name": "prompt_static",
        "compensation.name": "none",
        "partition.expert_size": 4,
    }
    convert_tiny("llama", build("llama", into / "source"), into / "out", settings=settings)
    return into / "out"


@pytest.fixture
def model(folder: Path) -> Iterator[Any]:
    with torch.no_grad():
        yield moefy.load(folder)


def take_cache_as(
    model: Any, name: str, unpack: Callable[[Any], Any] = lambda given: given
) -> None:
    """Let `forward` take its cache under another name, or second; `unpack` finds it in what is given."""
    inner, own = model.forward, cache_argument(model)

    def forward(input_ids: Any = None, second: Any = None, **kwargs: Any) -> Any:
        given = second if name == "second" else kwargs.pop(name, None)
        return inner(input_ids=input_ids, **{own: unpack(given)}, **kwargs)

    def prepare(*args: Any, **kwargs: Any) -> dict[str, Any]:
        made = prepared(*args, **kwargs)
        return {name if key == own else key: value for key, value in made.items()}

    prepared = model.prepare_inputs_for_generation
    model.forward, model.prepare_inputs_for_generation = forward, prepare


def call(model: Any, name: str, ids: Tensor, cache: Any, **options: Any) -> Any:
    if name == "second":
        return model(ids, cache, **options)
    return model(input_ids=ids, **{name: cache}, **options)


def continuation(model: Any, name: str) -> tuple[float, list[list[int]]]:
    """Cross-entropy of the tokens behind the prompt, one by one, and how many experts ran."""
    ran: list[list[int]] = [[] for _ in sparse_mlps(model)]
    for index, module in sparse_mlps(model).items():
        module.observer = lambda _, mask_TE, at=index: ran[at].extend(mask_TE.sum(1).tolist())
    cache = DynamicCache(config=model.config)
    logits = [call(model, name, IDS[:, :PROMPT], cache).logits[:, -1]]
    for at in range(PROMPT, IDS.shape[1] - 1):
        logits.append(call(model, name, IDS[:, at, None], cache).logits[:, -1])
    found = cross_entropy(torch.stack(logits, 1).flatten(0, 1), IDS[:, PROMPT:].flatten())
    return float(found), ran


WAYS = ("cache", "past_key_values", "kv", "second")


def test_the_result_is_the_same_however_the_cache_is_passed(model: Any, folder: Path) -> None:
    experts = sparse_mlps(model)[0].experts
    steps = len(IDS) * (IDS.shape[1] - 1 - PROMPT)
    expected = [experts] * len(IDS) * PROMPT + [experts // 2] * steps
    want, ran = continuation(model, cache_argument(model))
    assert ran == [expected] * 2
    for name in WAYS:
        other = moefy.load(folder)
        take_cache_as(other, name)
        assert continuation(other, name) == (want, ran), name


def test_generation_is_the_same_under_another_name(model: Any) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    want = model.generate(IDS, **options)
    beams = model.generate(IDS, num_beams=3, **options)
    take_cache_as(model, "kv")
    assert torch.equal(model.generate(IDS, **options), want)
    assert torch.equal(model.generate(IDS, num_beams=3, **options), beams)


def test_padding_is_seen_under_a_cache_of_fixed_size(model: Any) -> None:
    """transformers then gives a mask of who attends to whom, with room for all that is to come."""
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    options = {"max_new_tokens": 2, "do_sample": False, "eos_token_id": None}
    ran: dict[str, list[Tensor]] = {"dynamic": [], "static": []}
    for kind, masks in ran.items():
        for module in sparse_mlps(model).values():
            module.observer = lambda _, mask_TE, masks=masks: masks.append(mask_TE)
        model.generate(IDS, attention_mask=mask, cache_implementation=kind, **options)
    assert len(ran["static"]) == len(ran["dynamic"]) == 4
    assert all(map(torch.equal, ran["static"], ran["dynamic"]))


def test_a_mask_that_does_not_show_padding_is_refused() -> None:
    bias = torch.zeros(2, 1, 12, 16).masked_fill(torch.ones(12, 16).triu(1).bool(), -1e38)
    bias[1, :, :, :5] = torch.finfo(torch.float32).min
    want = torch.ones(2, 12, dtype=torch.bool)
    want[1, :5] = False
    for mask in (bias, {"full_attention": bias}, bias == 0):
        found = attending({"attention_mask": mask}, IDS)
        assert found is not None and torch.equal(found, want)
    assert attending({"attention_mask": bias[:1]}, IDS[:1]) is None
    assert attending({}, IDS) is None
    for other in (Holder(None), bias[:, :, :3], bias[0]):
        with pytest.raises(MoefyError, match="does not show which of its"):
            attending({"attention_mask": other}, IDS)


class Holder:
    """A cache of some other library."""

    def __init__(self, held: Any) -> None:
        self.held = held


@pytest.mark.parametrize("wrap", [Holder, lambda cache: (cache,)], ids=["object", "tuple"])
@pytest.mark.parametrize("name", WAYS)
def test_a_cache_of_another_kind_is_refused(model: Any, name: str, wrap: Any) -> None:
    take_cache_as(model, name, lambda given: given.held if isinstance(given, Holder) else given[0])
    given = wrap(DynamicCache(config=model.config))
    with pytest.raises(MoefyError, match=f"is a {type(given).__name__}, not one that is known"):
        call(model, name, IDS, given)


def test_tensors_in_a_tuple_are_no_cache(model: Any) -> None:
    layer = (torch.zeros(2, 2, 3, 8), torch.zeros(2, 2, 3, 8))
    with pytest.raises(MoefyError, match="is a tuple, not one that is known here"):
        model(IDS[:, :3], **{cache_argument(model): (layer, layer)})


def test_a_pass_behind_others_without_a_cache_is_refused(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    take_cache_as(model, "key", lambda key: cache)  # nothing of the cache is among the arguments
    call(model, "key", IDS[:, :PROMPT], 7)
    new, mask = IDS[:, PROMPT:], torch.ones(2, 12, dtype=torch.long)
    with pytest.raises(MoefyError, match="though a single token is given"):
        call(model, "key", new[:, :1], 7)
    with pytest.raises(MoefyError, match="the mask covers 12 tokens and 4 are given"):
        call(model, "key", new, 7, attention_mask=mask)
    with pytest.raises(MoefyError, match="position_ids begins at 8"):
        call(model, "key", new, 7, position_ids=torch.arange(PROMPT, 12).expand(2, 4))


def test_a_pass_that_stands_alone_is_not_refused(model: Any) -> None:
    for given in (
        {"input_ids": IDS[:, :1], "use_cache": False},
        {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
        {"input_ids": IDS, "position_ids": torch.arange(12).expand(2, 12)},
        {"inputs_embeds": model.get_input_embeddings()(IDS)},
    ):
        assert model(**given).logits.isfinite().all()


def test_a_call_without_tokens_is_refused(model: Any) -> None:
    with pytest.raises(MoefyError, match="no ids, embeddings or images are among the arguments"):
        model(use_cache=False)


def test_a_model_that_takes_no_cache_is_refused_when_loaded(model: Any) -> None:
    model.forward = lambda input_ids, state=None: None
    with pytest.raises(MoefyError, match="its arguments are input_ids, state"):
        share_context(model)
    for module in sparse_mlps(model).values():
        module.selection.by_score = True  # looks at single tokens
    share_context(model)
