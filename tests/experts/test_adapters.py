"""LoRA adapters and moefied models: merged where their neurons lie, or refused."""

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_conversion import convert_tiny
from tiny_models import build, example_inputs, tiny_model

import moefy
from moefy.errors import CheckpointError, MoefyError
from moefy.models.artefact import read_artefact

TARGETS = {
    "llama": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "phi3": ["gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "opt": ["q_proj", "fc1", "fc2"],
    "bert": ["query", "intermediate.dense", "output.dense"],
}
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The tiny model `source`, its conversions `out` and `side` (adapter form), by name."""
    place, done = tmp_path_factory.mktemp("adapters"), {}

    def get(name):
        if name not in done:
            source = build(name, place / name / "source")
            convert_tiny(name, source, place / name / "out")
            convert_tiny(name, source, place / name / "side", adapter=True)
            done[name] = place / name
        return done[name]

    return get


def adapted(folder, name, **options):
    """The stock model of a folder in fp64 with an adapter whose every number has been drawn."""
    settings = {
        "r": 4,
        "lora_alpha": 16,
        "init_lora_weights": False,
        "target_modules": TARGETS[name],
    }
    model = tiny_model(name).auto.from_pretrained(folder, dtype=torch.float64)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return peft.get_peft_model(model, peft.LoraConfig(**settings | options)).eval()


@torch.no_grad()
def output(model, name):
    return model(**example_inputs(name)).logits


def distance(a, b):
    return float((a - b).norm() / b.norm())


def change(adapter, **settings):
    file = adapter / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_an_adapter_is_merged_where_its_neurons_lie(name, dora, folders, tmp_path):
    place = folders(name)
    model = adapted(place / "source", name, use_dora=dora)
    model.save_pretrained(tmp_path / "lora")
    moefy.permute_adapter(tmp_path / "lora", place / "out", tmp_path / "moved")
    want, plain = output(model, name), output(model.unload(), name)
    assert distance(plain, want) > 1e-2
    for folder, adapter in (("out", "lora"), ("out", "moved"), ("side", "lora")):
        got = moefy.load(place / folder, adapter=tmp_path / adapter, dtype=torch.float64)
        with moefy.all_experts(got):
            # fp64: sums over neurons are only taken in another order.
            assert distance(output(got, name), want) < 1e-12
        assert not hasattr(got, "peft_config")
        assert all(p.requires_grad for n, p in got.named_parameters() if n.endswith("proj.weight"))


def test_an_adapter_of_the_folder_itself_is_not_moved(folders, tmp_path):
    out = folders("llama") / "out"
    model = adapted(out, "llama")
    model.save_pretrained(tmp_path / "lora")
    got = moefy.load(out, adapter=tmp_path / "lora", dtype=torch.float64)
    with moefy.all_experts(got):
        assert distance(output(got, "llama"), output(model, "llama")) < 1e-12


def test_a_merged_adapter_is_saved_in_the_weights(folders, tmp_path):
    place = folders("llama")
    adapted(place / "source", "llama").save_pretrained(tmp_path / "lora")
    model = moefy.load(place / "out", adapter=tmp_path / "lora")
    model.save_pretrained(tmp_path / "merged")
    assert read_artefact(tmp_path / "merged").weights_modified
    assert torch.equal(output(moefy.load(tmp_path / "merged"), "llama"), output(model, "llama"))
    side = moefy.load(place / "side", adapter=tmp_path / "lora")
    with pytest.raises(MoefyError, match="an adapter cannot hold weights"):
        side.save_pretrained(tmp_path / "again")


def test_where_the_neurons_lie_is_not_guessed(folders, tmp_path):
    place = folders("llama")
    lora = tmp_path / "lora"
    adapted(place / "source", "llama").save_pretrained(lora)
    for base in ("somebody/model", None):
        change(lora, base_model_name_or_path=base)
        for folder in ("out", "side"):
            with pytest.raises(CheckpointError, match="neurons lie is not known"):
                moefy.load(place / folder, adapter=lora)
    change(lora, base_model_name_or_path=str(folders("gpt2") / "source"))
    with pytest.raises(CheckpointError, match="which holds other files"):
        moefy.load(place / "out", adapter=lora)
    # Of attention alone it does not matter.
    model = adapted(place / "source", "llama", target_modules=["q_proj", "v_proj"])
    model.save_pretrained(lora)
    change(lora, base_model_name_or_path="somebody/model")
    got = moefy.load(place / "out", adapter=lora, dtype=torch.float64)
    with moefy.all_experts(got):
        assert distance(output(got, "llama"), output(model, "llama")) < 1e-12


def test_an_adapter_moved_for_a_folder_is_not_put_onto_its_source(folders, tmp_path):
    place = folders("llama")
    adapted(place / "source", "llama").save_pretrained(tmp_path / "lora")
    moefy.permute_adapter(tmp_path / "lora", place / "out", tmp_path / "moved")
    adapted(place / "out", "llama").save_pretrained(tmp_path / "trained")
    for adapter in ("moved", "trained"):
        with pytest.raises(CheckpointError, match="whose neurons lie in expert order"):
            moefy.load(place / "side", adapter=tmp_path / adapter)


def test_half_an_adapter_is_refused(folders, tmp_path):
    place, lora = folders("llama"), tmp_path / "lora"
    adapted(place / "source", "llama").save_pretrained(lora)
    whole = load_file(lora / WEIGHTS)
    save_file(dict(list(whole.items())[1:]), lora / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lora_A.* is on one side alone"):
        moefy.load(place / "out", adapter=lora)
    save_file(whole, lora / WEIGHTS, {"format": "pt"})
    change(lora, target_modules=["q_proj", "up_proj", "down_proj"])
    with pytest.raises(CheckpointError, match=r"gate_proj\.lora_.* is on one side alone"):
        moefy.load(place / "out", adapter=lora)


def test_what_peft_does_not_merge_is_refused_in_one_line(folders, tmp_path):
    place = folders("llama")
    adapted(place / "source", "llama", lora_bias=True).save_pretrained(tmp_path / "lora")
    with pytest.raises(CheckpointError, match="peft does not merge this adapter"):
        moefy.load(place / "out", adapter=tmp_path / "lora")


def test_an_adapter_needs_weights_in_memory(folders, tmp_path):
    place = folders("llama")
    adapted(place / "source", "llama").save_pretrained(tmp_path / "lora")
    places = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(MoefyError, match=r"layers\.1.* is offloaded by device_map"):
        moefy.load(
            place / "out",
            adapter=tmp_path / "lora",
            device_map=places,
            offload_folder=tmp_path / "off",
        )


def test_the_stock_model_of_a_folder_refuses_adapters_of_its_source(folders, tmp_path):
    place = folders("llama")
    model = adapted(place / "source", "llama")
    model.save_pretrained(tmp_path / "lora")
    moefy.permute_adapter(tmp_path / "lora", place / "out", tmp_path / "moved")
    opened = {"dtype": torch.float64, "dense": True}
    with pytest.raises(CheckpointError, match=r"neurons of .*out lie otherwise.*permute-adapter"):
        peft.PeftModel.from_pretrained(moefy.open_model(place / "out", **opened), tmp_path / "lora")
    for folder, adapter in (("out", "moved"), ("side", "lora")):
        stock = moefy.open_model(place / folder, **opened)
        got = peft.PeftModel.from_pretrained(stock, tmp_path / adapter)
        assert distance(output(got, "llama"), output(model, "llama")) < 1e-12
    # One that is trained on it goes on from where it was saved.
    trained = peft.get_peft_model(
        moefy.open_model(place / "out", **opened), model.peft_config["default"]
    )
    trained.save_pretrained(tmp_path / "own")
    peft.PeftModel.from_pretrained(moefy.open_model(place / "out", **opened), tmp_path / "own")


def test_a_moefied_model_refuses_adapters_of_maps_that_are_in_experts(folders, tmp_path):
    place = folders("llama")
    adapted(place / "source", "llama").save_pretrained(tmp_path / "lora")
    with pytest.raises(MoefyError, match=r"mlp\.\w+_proj: is in experts.*adapter=\.\.\."):
        peft.PeftModel.from_pretrained(moefy.load(place / "out"), tmp_path / "lora")
