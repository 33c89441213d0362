"""The table of families, and `moefy.models.locate`, against real transformers models of every family."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import (
    FAMILIES_TINY,
    LAYERS,
    NEURONS,
    SEARCHED_TINY,
    build,
    example_inputs,
    tiny_model,
)
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.activations import ACT2FN

from moefy.models.families import FAMILIES, config_value
from moefy.models.locate import Site, disk_names, meta_model, permute, read_mlp, sites

NAMES = [*FAMILIES_TINY, *SEARCHED_TINY]
REQUIRED = {
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gemma3", "phi3"),
    *("olmo2", "smollm3", "gpt2", "gpt_neox", "opt", "bloom", "t5", "bert", "roberta"),
    *("distilbert", "vit"),
}
ACTIVATIONS = {
    "llama": "silu",
    "phi3": "silu",
    "gemma": "gelu_pytorch_tanh",
    "gemma2": "gelu_pytorch_tanh",
    "gemma3": "gelu_pytorch_tanh",
    "gpt2": "gelu_new",
    "gpt_neox": "gelu",
    "opt": "relu",
    "bloom": "gelu_fast",
    "t5": "relu",
    "t5_gated": "gelu_new",
    "bert": "gelu",
    "distilbert": "gelu",
    "vit": "gelu",
    "arcee": "relu2",
    "starcoder2": "gelu_pytorch_tanh",
}
GATED = {
    *("llama", "llama_mlp_bias", "llama_tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2"),
    *("gemma3_text", "gemma3", "phi3", "olmo2", "smollm3", "t5_gated", "stablelm", "glm", "mt5"),
}
BIASES = {
    "llama": set(),
    "llama_mlp_bias": {"gate", "up", "down"},
    "phi3": set(),
    "t5": set(),
    "gpt2": {"up", "down"},
    "opt": {"up", "down"},
    "bert": {"up", "down"},
    "vit": {"up", "down"},
}
SPLICES = {"opt", "bert", "bert_base", "roberta", "electra", "bart"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Checkpoint of a tiny model by name, built once."""
    root = tmp_path_factory.mktemp("tiny")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.exists() else build(name, path)

    return folder


def load(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return tiny_model(name).auto.from_pretrained(folder, dtype=dtype).eval()


def output(name: str, model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**example_inputs(name))[0]


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


def dense_output(model: PreTrainedModel, site: Site, x: Tensor) -> Tensor:
    """What the modules of transformers compute for this MLP."""
    module = model.get_submodule(site.module)
    if site.family.container is None:
        act = model.get_submodule(str(site.act))
        return model.get_submodule(site.path("down"))(act(module(x)))
    if site.family.residual:
        residual = torch.ones_like(x)
        return module(x, residual) - residual
    return module(x)


def test_every_required_family_has_one_row_and_a_tiny_model() -> None:
    assert set(FAMILIES) == REQUIRED
    assert {tiny.family for tiny in FAMILIES_TINY.values()} == REQUIRED
    for key, row in FAMILIES.items():
        assert key == row.model_type
        assert len(row.layers) == len(row.depth)
        assert (row.container is None) == (row.act is not None)


@pytest.mark.parametrize("name", NAMES)
def test_sites_are_the_mlps_of_the_config(name: str, folders: Callable[[str], Path]) -> None:
    meta = meta_model(AutoConfig.from_pretrained(folders(name)))
    assert type(meta).__name__ == tiny_model(name).model
    assert all(parameter.is_meta for parameter in meta.parameters())
    found = sites(meta)
    assert found == sites(load(name, folders(name)))
    encoder_decoder = meta.config.is_encoder_decoder
    assert [site.index for site in found] == list(range(LAYERS * (1 + encoder_decoder)))
    assert {site.neurons for site in found} == {NEURONS}
    assert {site.width for site in found} == {
        16 if name in ("gpt2", "bloom", "mpt", "falcon") else 32
    }
    assert {site.gated for site in found} == {name in GATED}
    assert {site.activation for site in found} <= {ACTIVATIONS.get(name, found[0].activation)}
    assert {site.biases for site in found} <= {frozenset(BIASES.get(name, found[0].biases))}
    assert (found[0].family.container is None) == (name in SPLICES)
    if encoder_decoder:
        halves = [site.layer.removeprefix("model.").split(".")[0] for site in found]
        assert halves == ["encoder"] * LAYERS + ["decoder"] * LAYERS


@pytest.mark.parametrize("name", NAMES)
def test_weights_read_are_the_function_of_the_module(
    name: str, folders: Callable[[str], Path]
) -> None:
    model = load(name, folders(name), torch.float64)
    generator = torch.Generator().manual_seed(0)
    for site in sites(model):
        mlp = read_mlp(site, model.get_parameter)
        assert (mlp.neurons, mlp.width) == (site.neurons, site.width)
        assert mlp.down_ND.shape == mlp.up_ND.shape
        x = torch.randn(2, 5, site.width, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            expected = dense_output(model, site, x)
            assert relative(mlp(x), expected) < 1e-9
            wrong = dataclasses.replace(mlp, down_ND=mlp.down_ND.roll(1, 0))
            assert relative(wrong(x), expected) > 1e-3
            if mlp.gate_ND is not None:
                swapped = dataclasses.replace(mlp, gate_ND=mlp.up_ND, up_ND=mlp.gate_ND)
                assert relative(swapped(x), expected) > 1e-3
            other = "relu" if site.activation != "relu" else "silu"
            assert relative(dataclasses.replace(mlp, activation=other)(x), expected) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_disk_names_are_what_from_pretrained_loads(
    name: str, folders: Callable[[str], Path]
) -> None:
    disk = load_file(folders(name) / "model.safetensors")
    meta = meta_model(AutoConfig.from_pretrained(folders(name)))
    names = disk_names(meta, [*disk, "no.such.tensor"])
    state = load(name, folders(name)).state_dict()
    assert set(names) == set(disk)
    for key, parameter in names.items():
        assert torch.equal(disk[key], state[parameter]), key
    assert {p for site in sites(meta) for p in site.parameters} <= set(names.values())
    if name == "vit":
        assert any(key != parameter for key, parameter in names.items())


@pytest.mark.parametrize("name", NAMES)
def test_permuted_on_disk_is_the_same_function(
    name: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    source = folders(name)
    disk = load_file(source / "model.safetensors")
    meta = meta_model(AutoConfig.from_pretrained(source))
    names = disk_names(meta, disk)
    generator = torch.Generator().manual_seed(2)
    owners = {}
    found = sites(meta)
    for site in found:
        order = torch.randperm(site.neurons, generator=generator)
        owners |= dict.fromkeys(site.parameters, (site, order))

    def permuted(tensors: dict[str, Tensor], invert: bool) -> dict[str, Tensor]:
        result = dict(tensors)
        for key, parameter in names.items():
            if parameter in owners:
                site, order = owners[parameter]
                order = order.argsort() if invert else order
                result[key] = permute(site, parameter, tensors[key], order).contiguous()
        return result

    moved = permuted(disk, invert=False)
    changed = {names[key] for key in disk if not torch.equal(disk[key], moved[key])}
    assert changed == {p for site in found for p in site.neuron_axes}
    back = permuted(moved, invert=True)
    assert all(torch.equal(disk[key], back[key]) for key in disk)

    for file in source.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(moved, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = output(name, load(name, source))
    assert relative(output(name, load(name, tmp_path)), expected) < 1e-6

    # One matrix left behind must show, or the weights are too small to tell anything.
    left = next(key for key, p in names.items() if p == found[0].path("down") + ".weight")
    save_file(moved | {left: disk[left]}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert relative(output(name, load(name, tmp_path)), expected) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sites_do_not_depend_on_the_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = build("t5_gated", tmp_path / "t5", dtype)
    model = load("t5_gated", folder, dtype)
    site = sites(model)[0]
    mlp = read_mlp(site, model.get_parameter)
    kept = torch.float32 if dtype == torch.float16 else dtype
    assert (mlp.up_ND.dtype, mlp.down_ND.dtype) == (dtype, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bloom_activation_is_gelu_fast_to_the_bit(dtype: torch.dtype) -> None:
    from transformers.models.bloom.modeling_bloom import BloomGelu

    x = torch.linspace(-12, 12, 100_001).to(dtype)
    assert torch.equal(BloomGelu()(x), ACT2FN["gelu_fast"](x))
    assert not torch.equal(BloomGelu()(x), ACT2FN["gelu_new"](x))


@given(
    st.integers(1, 99),
    st.one_of(st.none(), st.integers(1, 99)),
    st.integers(2, 9),
)
@settings(deadline=None)
def test_config_rules(width: int, inner: int | None, factor: int) -> None:
    config = transformers.GPT2Config(n_embd=width, n_inner=inner)
    config.part = transformers.GPT2Config(n_embd=width + 1)
    assert config_value(config, "n_embd") == config_value(config, "hidden_size") == width
    assert config_value(config, f"{factor}*n_embd") == factor * width
    assert config_value(config, f"n_inner|{factor}*n_embd") == (inner or factor * width)
    assert config_value(config, "part.n_embd") == width + 1
    assert config_value(config, "part.absent|absent.n_embd|absent") is None
    assert config_value(config, f"={width}") == width
    assert config_value(config, "=gelu") == "gelu"
