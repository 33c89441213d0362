"""`save_pretrained` of a moefied model: what stock transformers does, or a refusal that leaves nothing."""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from packaging.version import Version
from tiny_conversion import convert_tiny
from tiny_models import build, example_inputs
from transformers.integrations.peft import MIN_PEFT_VERSION

import moefy
from moefy.errors import MoefyError
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.models.artefact import read_artefact

KINDS = ("llama", "llama_tied", "gpt2", "phi3", "opt", "bert", "t5")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a converted tiny model by its name."""
    place, done = tmp_path_factory.mktemp("saving"), {}

    def get(name, **options):
        key = f"{name}{'-adapter' if options else ''}"
        if key not in done:
            source = build(name, place / f"{key}-source")
            convert_tiny(name, source, place / key, **options)
            done[key] = place / key
        return done[key]

    return get


def logits(model, name="llama_tied"):
    with torch.no_grad():
        return model(**example_inputs(name)).logits


def files_of(folder: Path):
    """What every file holds, but for the list of what a run may overwrite."""
    files = (f for f in folder.rglob("*") if f.is_file() and not f.name.startswith("."))
    return {f.relative_to(folder): f.read_bytes() for f in files}


def nothing_in(folder: Path):
    """Whether nothing was left there, hidden files included."""
    return not folder.exists() or list(folder.iterdir()) == []


def lora(model, **options):
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"], **options)
    return peft.get_peft_model(model, config)


def test_a_tie_that_training_has_cut_is_saved_as_two_tensors(out, tmp_path):
    model = lora(moefy.load(out("llama_tied")), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.weight.add_(1)
    merged = model.merge_and_unload()
    want = logits(merged)
    merged.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(moefy.load(tmp_path / "again")), want)
    assert read_artefact(tmp_path / "again").weights_modified
    assert not any(f.name.startswith(".") for f in tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama_tied", "llama", "gpt2", "phi3"])
def test_a_resized_vocabulary_is_saved(name, out, tmp_path):
    model = moefy.load(out(name))
    model.resize_token_embeddings(150)
    want = logits(model, name)
    model.save_pretrained(tmp_path / "again")
    again = moefy.load(tmp_path / "again")
    assert again.config.vocab_size == 150 and torch.equal(logits(again, name), want)


@pytest.mark.parametrize("name", KINDS)
def test_other_sizes_of_files_hold_the_same_model(name, out, tmp_path):
    model = moefy.load(out(name))
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1
    again = moefy.load(tmp_path / "again")
    assert not read_artefact(tmp_path / "again").weights_modified
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in model.state_dict().items())
    # The same folder takes the next save: the files of the last make room.
    again.save_pretrained(tmp_path / "again", max_shard_size="1GB")
    assert [f.name for f in (tmp_path / "again").glob("model*.safetensors")] == [
        "model.safetensors"
    ]
    moefy.load(tmp_path / "again")


def test_changed_configs_are_saved(out, tmp_path):
    model = moefy.load(out("llama"))
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5000.0}
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "again")
    again = moefy.load(tmp_path / "again")
    assert again.config.rope_parameters["rope_theta"] == 5000.0
    assert again.generation_config.max_new_tokens == 7
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (out("llama") / weights).read_bytes()


def test_generating_changes_nothing_that_is_saved(out, tmp_path):
    model = moefy.load(out("llama"))
    model.generate(example_inputs("llama")["input_ids"][:1], max_new_tokens=2)
    model.save_pretrained(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(out("llama"))


def test_a_state_dict_is_what_is_saved(out, tmp_path):
    model = moefy.load(out("llama"))
    state = {name: value + 1 for name, value in model.state_dict().items()}
    state = {n: v if v.is_floating_point() else model.state_dict()[n] for n, v in state.items()}
    model.save_pretrained(tmp_path / "again", state_dict=state)
    again = moefy.load(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], value) for name, value in state.items())
    state.pop("lm_head.weight")
    with pytest.raises(MoefyError, match=r"has no lm_head\.weight"):
        model.save_pretrained(tmp_path / "part", state_dict=state)
    assert nothing_in(tmp_path / "part")


def test_another_process_writes_nothing(out, tmp_path):
    moefy.load(out("llama")).save_pretrained(tmp_path / "again", is_main_process=False)
    assert nothing_in(tmp_path)


@pytest.mark.parametrize("options", [{"push_to_hub": True}, {"variant": "fp16"}, {"unknown": 1}])
def test_arguments_that_are_not_done_are_refused(options, out, tmp_path):
    with pytest.raises(MoefyError, match=next(iter(options))):
        moefy.load(out("llama")).save_pretrained(tmp_path / "again", **options)
    assert nothing_in(tmp_path)


def test_an_adapter_that_is_not_merged_is_refused(out, tmp_path):
    adapted = lora(moefy.load(out("llama")))
    with pytest.raises(MoefyError, match="merge_and_unload"):
        adapted.get_base_model().save_pretrained(tmp_path / "again")
    assert nothing_in(tmp_path)
    # Merged, the model is one again; not merged, peft saves the adapter alone.
    adapted.save_pretrained(tmp_path / "adapter")
    want = logits(adapted, "llama")
    again = peft.PeftModel.from_pretrained(moefy.load(out("llama")), tmp_path / "adapter")
    assert torch.equal(logits(again, "llama"), want)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(moefy.load(tmp_path / "merged"), "llama"), logits(merged, "llama"))


def test_adapters_of_the_model_itself_are_saved_as_transformers_does(out, tmp_path):
    model = moefy.load(out("llama"))
    lora = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"])
    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        with pytest.raises(ValueError, match="PEFT"):  # transformers refuses any model
            model.add_adapter(lora)
        return
    model.add_adapter(lora)
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    again = moefy.load(out("llama"))
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


def test_an_error_leaves_what_was_there(out, tmp_path, monkeypatch):
    moefy.load(out("llama")).save_pretrained(tmp_path / "again")
    before = files_of(tmp_path)
    model = moefy.load(out("llama"))
    with torch.no_grad():
        sparse_mlps(model)[1].up_ND.add_(1)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moefy.experts.saving.write_side_files", fail)
    with pytest.raises(MoefyError, match="No space left"):
        model.save_pretrained(tmp_path / "again")
    assert files_of(tmp_path) == before


def test_a_folder_with_weights_of_another_model_is_refused(out, tmp_path):
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "other.safetensors").write_bytes(b"mine")
    with pytest.raises(MoefyError, match=r"weights of another model \(other\.safetensors\)"):
        moefy.load(out("llama")).save_pretrained(tmp_path / "again")
    assert [f.name for f in (tmp_path / "again").iterdir()] == ["other.safetensors"]


@pytest.mark.parametrize("change", ["config", "generation", "vocabulary", "weights"])
def test_an_adapter_form_holds_no_changes(change, out, tmp_path):
    model = moefy.load(out("llama", adapter=True))
    model.save_pretrained(tmp_path / "same")
    if change == "config":
        model.config.eos_token_id = 5
    elif change == "generation":
        model.generation_config.top_k = 5
    elif change == "vocabulary":
        model.resize_token_embeddings(150)
    else:
        with torch.no_grad():
            sparse_mlps(model)[0].up_ND.add_(1)
    with pytest.raises(MoefyError, match="an adapter cannot hold"):
        model.save_pretrained(tmp_path / "again")
    assert [f.name for f in tmp_path.iterdir()] == ["same"]


def test_checkpoints_inside_of_a_model_are_not_copied_along(out, tmp_path):
    moefy.load(out("llama")).save_pretrained(tmp_path / "run")
    model = moefy.load(tmp_path / "run")
    for step in (1, 2):
        model.save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    inner = [f for f in (tmp_path / "run" / "checkpoint-2").rglob("*") if f.is_dir()]
    assert inner == []


def test_a_copy_of_a_model_is_saved_like_the_model(out, tmp_path):
    copy.deepcopy(moefy.load(out("llama"))).save_pretrained(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(out("llama"))
    assert "config.json" in json.loads((tmp_path / "again" / "moefy.json").read_text())["sha256"]
