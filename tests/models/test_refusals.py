"""Folders that would convert into something else than they are: one line in the plan, nothing fitted."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import build
from typer.testing import CliRunner

import moefy
from moefy.cli.verbs import app
from moefy.errors import CheckpointError, UnsupportedModel
from moefy.models.checkpoint import Checkpoint
from moefy.models.locate import meta_model, sites
from moefy.models.refusals import refuse_outputs


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return build("llama", tmp_path_factory.mktemp("refusals") / "llama")


@pytest.fixture
def source(llama, tmp_path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "source"))


def dry_run(source: Path, *options: str) -> str:
    """What `--dry-run` shows."""
    done = CliRunner().invoke(app, ["convert", str(source), "out", "--dry-run", *options])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def refuse(source: Path, *words: str, options: tuple[str, ...] = ()) -> None:
    """Both the plan and the conversion end in one line with these words."""
    for extra in (("--dry-run",), ()):
        out = source.parent / "out"
        arguments = ["convert", str(source), str(out), "-q", *options, *extra]
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 1, (done.output, done.exception)
        assert done.stderr.startswith("moefy: ") and done.stderr.count("\n") == 1, done.stderr
        for word in words:
            assert word in done.stderr
        assert not list(source.parent.glob("*out*"))


def edit(source: Path, **values) -> None:
    file = source / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def store(source: Path, change) -> None:
    """Change the tensors of a folder by name."""
    file = source / "model.safetensors"
    tensors = {name: change(name, value) for name, value in load_file(file).items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, file, {"format": "pt"})


ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 8}


def test_an_adapter_is_no_model(tmp_path):
    source = tmp_path / "lora"
    source.mkdir()
    (source / "adapter_config.json").write_text(json.dumps(ADAPTER))
    refuse(source, "a LORA adapter of some/base, no model", "merge it first", "merge_and_unload")
    for damaged in ("{", "[]", '{"peft_type": "LORA"}', "[" * 50_000):
        (source / "adapter_config.json").write_text(damaged)
        refuse(source, "adapter", "no model", "merge it first")


def test_an_adapter_in_the_folder_of_its_base(source):
    (source / "adapter_config.json").write_text(json.dumps(ADAPTER))
    refuse(
        source,
        "holds a model and a LORA adapter of some/base",
        "merge it first",
        "folder of its own",
    )


def test_adapters_of_a_model_in_memory(llama, tmp_path):
    import peft

    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for adapted in (wrapped, model):
        with pytest.raises(CheckpointError, match="merge them first"):
            moefy.convert(adapted, tmp_path / "out", quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq, 4 bits"),
        ({"quant_method": "gptq", "bits": 8}, "gptq, 8 bits"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"format": "float-quantized"}, "float-quantized"),
    ],
)
def test_codes_are_not_fitted_on(source, settings, words):
    edit(source, quantization_config=settings)
    refuse(source, "its weights are quantized", words, "dequantize")
    edit(source, quantization_config=None, compression_config=settings)
    refuse(source, "its weights are quantized", words)
    edit(source, compression_config=None, text_config={"quantization_config": settings})
    refuse(source, "its weights are quantized", words)


def test_codes_are_not_run_on_either(source):
    edit(source, quantization_config={"quant_method": "awq", "bits": 4})
    for verb in (["eval"], ["compare"], ["sparsify", str(source.parent / "out")]):
        done = CliRunner().invoke(app, [verb[0], str(source), *verb[1:]])
        assert done.exit_code == 1 and "(awq, 4 bits)" in done.stderr, (verb, done.output)


def test_codes_that_no_config_speaks_of(source):
    for name in ("quant_config.json", "quantize_config.json"):
        (source / name).write_text('{"w_bit": 4}')
        refuse(source, f"its weights are quantized (by {name})")
        (source / name).unlink()
    tensors = load_file(source / "model.safetensors")
    for ending in (".qweight", ".weight_packed", ".weight_scale_inv", ".absmax", ".SCB"):
        name = f"model.layers.0.mlp.up_proj{ending}"
        save_file({**tensors, name: torch.ones(2)}, source / "model.safetensors")
        refuse(source, "its weights are quantized", name)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_weights_that_are_no_numbers(source, dtype):
    store(source, lambda name, value: value.to(dtype) if "up_proj" in name else value)
    refuse(source, "mlp.up_proj.weight is stored as", "bfloat16")


@pytest.mark.parametrize("name", ["self_attn.q_proj", "mlp.up_proj", "input_layernorm"])
def test_weights_of_another_shape_than_the_config_says(source, name):
    store(source, lambda n, value: value[1:].contiguous() if f"1.{name}" in n else value)
    refuse(source, f"model.layers.1.{name}.weight has shape", "config.json makes it")


def test_a_config_of_another_model(source):
    edit(source, hidden_size=64)
    refuse(source, "has shape", "of another model")


def test_masks_and_positions_may_be_whole_numbers(tmp_path):
    source = build("gpt2", tmp_path / "gpt2")
    tensors = load_file(source / "model.safetensors")
    tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    tensors["transformer.position_ids"] = torch.arange(8).view(1, 8)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert "GPT2LMHeadModel" in dry_run(source)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_git_lfs_pointers(source, name):
    (source / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refuse(source, f"{name}: is a git-lfs pointer", "git lfs pull")


@pytest.mark.parametrize(
    "code",
    [
        {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
        {"AutoModel": ["me/repo--modeling_own.A", None]},
    ],
)
def test_code_that_is_not_run_is_spoken_of(source, code):
    assert "note: the folder brings code" not in dry_run(source)
    edit(source, auto_map=code)
    (source / "modeling_own.py").write_text("raise SystemExit('ran')")
    text = " ".join(dry_run(source).split())
    assert "code of its own (auto_map: modeling_own), which is not run" in text
    assert "converted as LlamaForCausalLM of transformers" in text and "another model" in text


def test_a_type_that_only_code_of_the_folder_knows(source):
    edit(source, model_type=["own"], auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    refuse(source, "model_type ['own']")
    deep = "a.B"
    for _ in range(400):
        deep = [deep]
    edit(source, model_type="own", auto_map=deep)
    refuse(source, "auto_map: a)")
    edit(source, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    (source / "configuration_own.py").write_text("raise SystemExit('ran')")
    refuse(source, "model_type 'own'", "auto_map: configuration_own", "no code of a folder is run")


def test_a_router_that_reads_gates_needs_some(tmp_path):
    source = build("opt", tmp_path / "opt")
    refuse(source, "layer 0: router 'self_gating' reads the gate", options=("--recipe", "cats"))


def test_files_beside_the_weights_are_counted(source):
    (source / "extra").mkdir()
    with (source / "extra" / "tokens.bin").open("wb") as file:
        file.truncate(70_000_000)
    before = 0.07
    for options in ((), ("--stream",)):
        text = " ".join(dry_run(source, *options).split())
        assert float(text.split("needs ")[1].split()[0]) >= before, text
    adapter = " ".join(dry_run(source, "--adapter").split())
    assert float(adapter.split("needs ")[1].split()[0]) < before


def config_of(kind: str, **more):
    sizes = {"vocab_size": 96, "num_attention_heads": 4, "max_position_embeddings": 64}
    return getattr(transformers, kind)(**{**sizes, **more})


def test_layers_that_hand_on_anything_but_one_stream():
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "head_dim": 8}
    gemma = transformers.Gemma3nTextConfig(
        **small, vocab_size=96, vocab_size_per_layer_input=96, num_attention_heads=4,
        num_key_value_heads=2, hidden_size_per_layer_input=8, laurel_rank=4,
        num_kv_shared_layers=0, activation_sparsity_pattern=[0.0] * 5,
    )  # fmt: skip
    first = transformers.OpenAIGPTConfig(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64
    )
    for config, words in ((gemma, r"hands on \[4, 2, 3, 32\]"), (first, "hands on a list")):
        model = meta_model(config)
        with pytest.raises(UnsupportedModel, match=words):
            refuse_outputs(model, [site.layer for site in sites(model)])


def test_models_of_one_stream_are_not_refused():
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    for kind in (
        "XLMRobertaConfig",
        "MPNetConfig",
        "ElectraConfig",
        "StableLmConfig",
        "Olmo2Config",
    ):
        model = meta_model(config_of(kind, **small))
        refuse_outputs(model, [site.layer for site in sites(model)])


def test_the_plan_of_a_folder_without_weights_needs_none(source):
    (source / "model.safetensors").unlink()
    assert "LlamaForCausalLM" in dry_run(source)
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        Checkpoint.open(source)
