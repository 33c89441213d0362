"""`moefy.models.locate` at its edges: heads and prefixes, models it refuses, a transformers that changed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import LAYERS, NEURONS, build, random_model, tiny_model
from transformers import AutoConfig, PreTrainedModel

from moefy.errors import UnsupportedModel
from moefy.models.locate import disk_names, meta_model, permute, sites


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoint of a tiny model by name, built once."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else build(name, path)

    return folder


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ("bert_base", "BertForMaskedLM"),
        ("bert", "BertModel"),
        ("llama", "LlamaModel"),
        ("gpt2", "GPT2Model"),
        ("vit", "ViTModel"),
        ("gpt_neox", "GPTNeoXModel"),
        ("t5", "T5EncoderModel"),
    ],
)
def test_heads_and_prefixes_do_not_matter(
    stored: str, wanted: str, folders: Callable[[str], Path]
) -> None:
    folder = folders(stored)
    kind = getattr(transformers, wanted)
    with torch.device("meta"):
        meta = kind(AutoConfig.from_pretrained(folder))
    disk = load_file(folder / "model.safetensors")
    names = disk_names(meta, disk)
    state = kind.from_pretrained(folder, dtype=torch.float32).state_dict()
    found = sites(meta)
    assert len(found) == LAYERS
    parameters = {parameter for site in found for parameter in site.parameters}
    assert parameters <= set(names.values())
    for key, parameter in names.items():
        assert torch.equal(disk[key], state[parameter]), key


def test_old_bert_names_are_renamed(folders: Callable[[str], Path]) -> None:
    meta = meta_model(AutoConfig.from_pretrained(folders("bert")))
    key = "bert.encoder.layer.0.output.LayerNorm."
    assert disk_names(meta, [key + "gamma"]) == {key + "gamma": key + "weight"}


def test_class_is_chosen_by_kind_without_architectures() -> None:
    for name, kind in [
        ("llama", "LlamaForCausalLM"),
        ("t5", "T5ForConditionalGeneration"),
        ("bert", "BertModel"),
        ("vit", "ViTForImageClassification"),
        ("electra", "ElectraModel"),
    ]:
        config = tiny_model(name).make_config()
        assert type(meta_model(config)).__name__ == kind
        config.architectures = ["NoSuchClass"]
        assert type(meta_model(config)).__name__ == kind


def refused(model: PreTrainedModel, *words: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        sites(model)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ("MixtralConfig", "num_local_experts=8"),
        ("Qwen3MoeConfig", "experts=128"),
        ("DeepseekV3Config", "n_routed_experts="),
        ("SwitchTransformersConfig", "num_experts=8"),
    ],
)
def test_mixture_of_experts_is_refused(config: str, key: str) -> None:
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 96}
    if config.startswith("Switch"):
        settings = {"d_model": 32, "num_layers": 1, "num_decoder_layers": 1, "vocab_size": 96}
    refused(meta_model(getattr(transformers, config)(**settings)), key, "experts already")


def test_experts_are_seen_in_the_modules_too() -> None:
    model = random_model(transformers.LlamaForCausalLM, tiny_model("llama").make_config())
    model.model.layers[0].mlp.experts = torch.nn.ModuleList()
    refused(model, "model.layers.0.mlp.experts", "experts already")


def test_shared_weights_are_refused() -> None:
    model = random_model(transformers.LlamaForCausalLM, tiny_model("llama").make_config())
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    refused(model, "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    refused(model, "share")


def test_bloom_slow_but_exact_is_refused() -> None:
    config = tiny_model("bloom").make_config()
    config.slow_but_exact = True
    refused(meta_model(config), "slow_but_exact", "false")


def test_learned_or_unknown_activation_is_refused() -> None:
    config = tiny_model("llama").make_config()
    config.hidden_act = "prelu"
    refused(meta_model(config), "prelu", "ACT2FN")
    model = meta_model(tiny_model("bert").make_config())
    model.config.hidden_act = "gulu"
    refused(model, "gulu", "ACT2FN")


def test_a_model_that_is_not_what_its_config_says_is_refused() -> None:
    model = meta_model(tiny_model("llama").make_config())
    model.config.num_hidden_layers = 3
    refused(model, "2 modules match 'layers.{}'", "num_hidden_layers=3")
    model.config.num_hidden_layers = 2
    model.config.intermediate_size = 65
    refused(model, "model.layers.0 has 64 neurons", "intermediate_size=65")
    model.config.intermediate_size = 64
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 63, device="meta")
    refused(model, "model.layers.1")
    model.model.layers[0].mlp.gate_proj = torch.nn.Identity()
    refused(model, "model.layers.0 has no linear map 'mlp.gate_proj'")
    model.model.layers = torch.nn.ModuleList()
    refused(model, "no layers")


def test_config_that_cannot_be_built_is_refused() -> None:
    class UnknownConfig(transformers.PreTrainedConfig):
        model_type = "no-such-type"

    with pytest.raises(UnsupportedModel, match="no-such-type"):
        meta_model(UnknownConfig())


@pytest.mark.parametrize("change", ["gone", "other arguments", "other result"])
def test_a_transformers_that_maps_names_otherwise_is_an_error(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import core_model_loading

    replacement: dict[str, Any] = {
        "other arguments": lambda key: key,
        "other result": lambda *_: (1, 2, 3),
    }
    if change == "gone":
        monkeypatch.delattr(core_model_loading, "rename_source_key")
    else:
        monkeypatch.setattr(core_model_loading, "rename_source_key", replacement[change])
    meta = meta_model(tiny_model("bert").make_config())
    with pytest.raises(UnsupportedModel, match=re.escape(transformers.__version__)):
        disk_names(meta, ["bert.encoder.layer.0.output.dense.weight"])


def test_tensors_that_transformers_computes_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    split = WeightConverter(
        "mlp.w13.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)]
    )
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [split])
    meta = meta_model(tiny_model("llama").make_config())
    keys = ["model.layers.0.mlp.w13.weight", "model.layers.0.mlp.down_proj.weight"]
    assert disk_names(meta, keys) == {keys[1]: keys[1]}


def test_permute_moves_both_halves_of_a_fused_tensor() -> None:
    site = sites(meta_model(tiny_model("phi3").make_config()))[0]
    name = site.path("up") + ".weight"
    tensor = torch.arange(2.0 * NEURONS)[:, None].expand(-1, 32)
    order = torch.arange(NEURONS).flip(0)
    moved = permute(site, name, tensor, order)
    assert torch.equal(moved[:NEURONS, 0], tensor[:NEURONS, 0].flip(0))
    assert torch.equal(moved[NEURONS:, 0], tensor[NEURONS:, 0].flip(0))
    assert permute(site, "another.parameter", tensor, order) is tensor


def test_locate_names_its_modules() -> None:
    gated = sites(meta_model(tiny_model("llama").make_config()))[1]
    assert gated.module == "model.layers.1.mlp"
    assert gated.path("gate") == "model.layers.1.mlp.gate_proj"
    assert gated.act is None
    splice = sites(meta_model(tiny_model("bert").make_config()))[1]
    assert splice.module == splice.path("up")
    assert splice.module.endswith("encoder.layer.1.intermediate.dense")
    assert str(splice.act).endswith("encoder.layer.1.intermediate.intermediate_act_fn")
    assert splice.path("down").endswith("encoder.layer.1.output.dense")
    assert "attention" not in "".join(splice.parameters)
    with pytest.raises(KeyError):
        splice.path("gate")
