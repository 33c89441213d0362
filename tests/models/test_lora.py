"""Adapters of a dense model, for its moefied folder: moved to where the neurons lie, or refused by name."""

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_conversion import convert_tiny
from tiny_models import build, example_inputs, tiny_model
from typer.testing import CliRunner

import moefy
from moefy.cli.verbs import app
from moefy.errors import CheckpointError, OutputError
from moefy.models.artefact import read_artefact
from moefy.models.lora import CONFIG, WEIGHTS, Lora, order_of

TARGETS = {
    "llama": ["q_proj", "gate_proj", "up_proj", "down_proj"],
    "llama_mlp_bias": ["gate_proj", "down_proj"],
    "phi3": ["gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "c_proj"],
    "opt": ["fc1", "fc2"],
    "bert": ["query", "intermediate.dense", "output.dense"],
    "t5_gated": ["wi_0", "wi_1", "wo"],
    "gemma3": r".*language_model.*(gate|up|down)_proj",
    "falcon": "all-linear",
}
"""A gated and a plain MLP, with biases, fused, stored transposed, spliced, two sides, inside of another
model, found by structure."""
VARIANTS = {
    "lora": {},
    "dora": {"use_dora": True},
    "bias": {"bias": "all"},
    "b": {"lora_bias": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with the tiny model `source` and its conversion `out`, by name."""
    place, done = tmp_path_factory.mktemp("lora"), {}

    def get(name):
        if name not in done:
            convert_tiny(name, build(name, place / name / "source"), place / name / "out")
            done[name] = place / name
        return done[name]

    return get


def dense(folder, name):
    return tiny_model(name).auto.from_pretrained(folder, dtype=torch.float64)


def adapted(folder, name, **options):
    """A dense model with an adapter whose every number has been drawn."""
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 16, "init_lora_weights": False, "target_modules": TARGETS[name]} | options
    )  # fmt: skip
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = peft.get_peft_model(dense(folder, name), config)
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def output(model, name):
    return model(**example_inputs(name)).logits


def distance(a, b):
    return float((a - b).norm() / b.norm())


def lora_of(folders, name, place, **options):
    """The source's adapter, saved at `place`, and what the source computes with it."""
    model = adapted(folders(name) / "source", name, **options)
    model.save_pretrained(place)
    return output(model, name)


def check(folders, name, place, want):
    """A moved adapter on the plain folder is the source with its own; one that is not moved is not."""
    out = folders(name) / "out"
    moefy.permute_adapter(place / "old", out, place / "new")
    got = output(peft.PeftModel.from_pretrained(dense(out, name), place / "new"), name)
    raw = output(peft.PeftModel.from_pretrained(dense(out, name), place / "old"), name)
    # fp64: sums over neurons are only taken in another order.
    assert distance(got, want) < 1e-12
    assert distance(raw, want) > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", TARGETS)
def test_a_moved_adapter_is_the_same_on_the_folder(name, variant, folders, tmp_path):
    want = lora_of(folders, name, tmp_path / "old", **VARIANTS[variant])
    check(folders, name, tmp_path, want)


@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("llama", "down_proj"),
        ("llama_mlp_bias", "gate_proj"),
        ("phi3", "gate_up_proj"),
        ("gpt2", "c_fc"),
    ],
)
def test_maps_that_were_trained_in_full_are_moved(name, whole, folders, tmp_path):
    attention = {"gpt2": ["c_attn"], "phi3": ["qkv_proj"]}.get(name, ["q_proj"])
    options = {"target_modules": attention, "modules_to_save": [whole]}
    check(folders, name, tmp_path, lora_of(folders, name, tmp_path / "old", **options))


def test_an_adapter_of_the_model_without_its_head_is_moved(folders, tmp_path):
    """Names without the prefix of the base model, as of another class of the same type."""
    lora_of(folders, "llama", tmp_path / "old")
    old = load_file(tmp_path / "old" / WEIGHTS)
    bare = {name.replace(".model.model.", ".model."): value for name, value in old.items()}
    save_file(bare, tmp_path / "old" / WEIGHTS, {"format": "pt"})
    record = moefy.permute_adapter(tmp_path / "old", folders("llama") / "out", tmp_path / "new")
    assert record["tensors"] == len(old) == 16 and record["moved"] == 6


def test_what_a_moved_adapter_says_of_itself(folders, tmp_path):
    lora_of(folders, "llama", tmp_path / "old")
    for name in ("optimizer.pt", "trainer_state.json", "tokenizer_config.json"):
        (tmp_path / "old" / name).write_text("{}")
    out = folders("llama") / "out"
    record = moefy.permute_adapter(tmp_path / "old", out, tmp_path / "new")
    assert record == {
        "kind": "permute-adapter", "out": str(tmp_path / "new"), "tensors": 16, "moved": 6, "notes": []
    }  # fmt: skip
    names = {file.name for file in (tmp_path / "new").iterdir() if file.name[0] != "."}
    assert names == {CONFIG, WEIGHTS, "README.md", "tokenizer_config.json"}
    before, after = (json.loads((tmp_path / at / CONFIG).read_text()) for at in ("old", "new"))
    assert after == before | {"base_model_name_or_path": str(out), "revision": None}
    assert Lora.open(tmp_path / "new").mark == order_of(read_artefact(out))
    with pytest.raises(OutputError, match="exists already"):
        moefy.permute_adapter(tmp_path / "old", out, tmp_path / "new")
    for folder in (tmp_path / "new", tmp_path / "trained"):
        if folder.name == "trained":
            adapted(out, "llama").save_pretrained(folder)
        with pytest.raises(CheckpointError, match=r"is an adapter of .*out already"):
            moefy.permute_adapter(folder, out, tmp_path / "again")


def test_the_verb(folders, tmp_path):
    lora_of(folders, "llama", tmp_path / "old")
    out = folders("llama") / "out"
    line = ["permute-adapter", str(tmp_path / "old"), str(out), str(tmp_path / "new")]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 0
    assert "6 of 16 tensors have neurons and were moved" in result.output
    assert "exists already" in CliRunner().invoke(app, line).output
    line[1] = str(tmp_path / "nothing")
    assert "nothing: no such folder" in CliRunner().invoke(app, line).output


SETTINGS = {
    "peft_type": ("LOHA", "peft_type 'LOHA', only LORA"),
    "init_lora_weights": ("pissa_niter_4", "init_lora_weights 'pissa_niter_4' changes the base too"),
    "target_parameters": (["mlp.up_proj.weight"], "target_parameters is set"),
    "layer_replication": ([[0, 2], [1, 2]], "layer_replication is set"),
    "use_qalora": (True, "use_qalora is set"),
    "of_a_later_release": ("x", "of_a_later_release is set"),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_not_plain_lora_is_refused_by_name(name, folders, tmp_path):
    lora_of(folders, "llama", tmp_path / "old")
    value, message = SETTINGS[name]
    change(tmp_path / "old", **{name: value})
    refused(folders, tmp_path, message)


def change(adapter, **settings):
    file = adapter / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def refused(folders, place, message):
    with pytest.raises(CheckpointError, match=message):
        moefy.permute_adapter(place / "old", folders("llama") / "out", place / "new")
    assert not (place / "new").exists()


UP = "base_model.model.model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (f"{UP}.lora_C.weight", (64, 4), r"lora_C.weight \[64, 4\] is no tensor of LoRA"),
        (f"{UP}.lora_B.weight", (32, 4), r"lora_B.weight \[32, 4\] is no tensor of LoRA"),
        (f"{UP}.lora_A.weight", (4, 64), r"lora_A.weight \[4, 64\] is no tensor of LoRA"),
        (f"{UP}.weight", (64, 31), r"up_proj.weight \[64, 31\] is no tensor of LoRA"),
        (f"{UP}.bias", (64,), r"up_proj.bias \[64\] is no tensor of LoRA"),
        (UP.replace("1", "7") + ".lora_A.weight", (4, 32), r"layers.7.* is of a layer that Llama"),
    ],
)
def test_tensors_that_are_not_known_are_refused_by_name(name, shape, message, folders, tmp_path):
    lora_of(folders, "llama", tmp_path / "old")
    tensors = load_file(tmp_path / "old" / WEIGHTS) | {name: torch.ones(shape)}
    save_file(tensors, tmp_path / "old" / WEIGHTS, {"format": "pt"})
    refused(folders, tmp_path, message)


def test_an_adapter_of_another_model_is_refused(folders, tmp_path):
    lora_of(folders, "llama", tmp_path / "old")
    change(tmp_path / "old", base_model_name_or_path=str(folders("llama_tied") / "source"))
    refused(folders, tmp_path, "which holds other files")
    change(tmp_path / "old", base_model_name_or_path=str(folders("llama_tied") / "out"))
    refused(folders, tmp_path, "which holds other files")
    # What is not there is taken for the source by its name, or with a note.
    change(tmp_path / "old", base_model_name_or_path="somebody/source")
    out = folders("llama") / "out"
    assert not moefy.permute_adapter(tmp_path / "old", out, tmp_path / "a")["notes"]
    change(tmp_path / "old", base_model_name_or_path="somebody/model")
    (note,) = moefy.permute_adapter(tmp_path / "old", out, tmp_path / "b")["notes"]
    assert "names 'somebody/model' as its base" in note
    # One that was moved for another folder is none of this one's.
    convert_tiny("llama", folders("llama") / "source", tmp_path / "other", settings={"seed": 5})
    with pytest.raises(CheckpointError, match="was moved for another folder's neurons"):
        moefy.permute_adapter(tmp_path / "a", tmp_path / "other", tmp_path / "c")


def test_files_that_are_no_adapter_are_refused(folders, tmp_path):
    lora_of(folders, "llama", tmp_path / "old")
    weights = tmp_path / "old" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-7])
    refused(folders, tmp_path, "truncated or corrupt")
    weights.rename(tmp_path / "old" / "adapter_model.bin")
    refused(folders, tmp_path, f"no {WEIGHTS}; save the adapter")
    (tmp_path / "old" / CONFIG).write_text("[1]")
    refused(folders, tmp_path, "must be keys and values")
    (tmp_path / "old" / CONFIG).unlink()
    refused(folders, tmp_path, f"no {CONFIG}")


def test_where_the_neurons_did_not_move_nothing_is_to_be_done(folders, tmp_path):
    lora_of(folders, "llama", tmp_path / "old")
    convert_tiny("llama", folders("llama") / "source", tmp_path / "out", adapter=True)
    with pytest.raises(CheckpointError, match=r"in their order; moefy\.load\("):
        moefy.permute_adapter(tmp_path / "old", tmp_path / "out", tmp_path / "new")


def test_nothing_is_written_where_it_is_read(folders, tmp_path):
    lora_of(folders, "llama", tmp_path / "old")
    out = folders("llama") / "out"
    for place in (tmp_path / "old", tmp_path / "old" / "new", out, out / "new", tmp_path):
        with pytest.raises(OutputError, match=r"which is read"):
            moefy.permute_adapter(tmp_path / "old", out, place, overwrite=True)
    assert {file.name for file in (tmp_path / "old").iterdir()} == {CONFIG, WEIGHTS, "README.md"}
