"""GGUF files against the checkpoints they were made from, tensor by tensor."""

import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf_forward
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf_reading import DEMO, read, refused, values
from safetensors.torch import load_file, save_file
from tiny_exports import CASES, SETTINGS, Case, moefied, source, token_ids
from tiny_models import build, random_model
from torch import Tensor
from typer.testing import CliRunner

from moefy import recipe as recipes
from moefy.cli.verbs import app
from moefy.conversion.convert import convert
from moefy.errors import CheckpointError, MoefyError, OutputError, RecipeError, UnsupportedModel
from moefy.experts.loading import load
from moefy.exporting import gguf as tensors
from moefy.exporting.export import export
from moefy.exporting.gguf import write_gguf
from moefy.models.artefact import read_artefact

NAMES = ["llama", "mistral", "qwen2", "qwen3", "shared", "llama_shared", "bf16"]
FILES = {
    "llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe",
}  # fmt: skip
# Every tensor that a file may hold, by the part of a layer it stands for.
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
ROLES = {
    "w1": "gate", "w2": "down", "w3": "up",
    "gate_proj": "gate", "down_proj": "down", "up_proj": "up",
}  # fmt: skip
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True)
class Written:
    """A case's conversion, its export for transformers, and the GGUF of that."""

    case: Case
    source: Path
    moefied: Path
    stock: Path
    file: Path
    record: dict[str, Any]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Written]:
    """Every case that llama.cpp can compute."""
    found = {}
    for name in NAMES:
        case, root = CASES[name], tmp_path_factory.mktemp(name)
        dense = source(case, root / "source")
        made = moefied(dense, root / "moefied", case.recipe)
        export(made, root / "stock", to=case.to)
        record = write_gguf(root / "stock", root / "out.gguf")
        found[name] = Written(case, dense, made, root / "stock", root / "out.gguf", record)
    return found


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled Llama, converted and exported."""
    root = tmp_path_factory.mktemp("demo")
    settings = {
        "context": "48", "partition.experts": "16", "selection.k": "8", "partition.tokens": "512",
        "router.tokens": "1024", "router.epochs": "2",
    }  # fmt: skip
    recipe = recipes.override(recipes.load("export"), settings)
    convert(DEMO, root / "out", recipe=recipe, corpus=token_ids(), quiet=True)
    export(root / "out", root / "stock", to="mixtral")
    return root / "stock"


def turned_back(rows: Tensor, heads: int) -> Tensor:
    """Rows in transformers' order, one at a time: its first half are the even rows of the file."""
    size = len(rows) // heads
    order = []
    for head in range(heads):
        for half in (0, 1):
            order += [head * size + 2 * i + half for i in range(size // 2)]
    return rows[order]


def assert_same(stock: Path, file: Path) -> None:
    """Every tensor of the checkpoint is in the file, and nothing else is."""
    config = json.loads((stock / "config.json").read_text())
    keys, got = read(file)
    kind = keys["general.architecture"]
    count = config.get("num_local_experts") or config.get("num_experts") or 0
    active = config.get("num_experts_per_tok") or 1
    left = set(got)

    def equal(name: str, part: Tensor, want: Tensor) -> None:
        left.discard(name)
        assert part.shape == want.shape, name
        assert torch.equal(part, want.float()), name

    for name, want in load_file(stock / "model.safetensors").items():
        if name in OUTER:
            equal(OUTER[name], values(got[OUTER[name]]), want)
            continue
        layer, part = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name).groups()
        expert = re.fullmatch(r".+\.experts\.(\d+)\.(\w+)\.weight", part)
        if expert:
            name = f"blk.{layer}.ffn_{ROLES[expert[2]]}_exps.weight"
            shape = [int(size) for size in got[name].shape]
            assert shape == [*reversed(want.shape), count]
            if ROLES[expert[2]] == "down" and kind == "qwen2moe" and config["norm_topk_prob"]:
                want = want * (count / active)
            equal(name, values(got[name])[int(expert[1])], want)
            continue
        owner, suffix = part.rsplit(".", 1)
        name = f"blk.{layer}.{PARTS[owner]}.{suffix}"
        found = values(got[name])
        if PARTS[owner] == "ffn_gate_inp_shexp":
            # Not zero: llama.cpp divides by what it gives.
            want = want[0] if want.any() else torch.full_like(want[0], 2.0**-24)
        if kind == "llama" and PARTS[owner] in ("attn_q", "attn_k"):
            heads = "attention" if PARTS[owner] == "attn_q" else "key_value"
            found = turned_back(found, config[f"num_{heads}_heads"])
        equal(name, found, want)
        if want.ndim == 1 or "gate_inp" in name:
            assert got[name].tensor_type == Kind.F32
    if kind == "qwen2moe" and config["tie_word_embeddings"]:
        assert torch.equal(values(got["output.weight"]), values(got["token_embd.weight"]))
        left.remove("output.weight")
    assert left == ({"rope_freqs.weight"} if kind == "llama" and llama3(config) else set())


def llama3(config: dict[str, Any]) -> bool:
    return bool(config["rope_parameters"]["rope_type"] == "llama3")


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_the_exports(name: str, written: dict[str, Written]) -> None:
    one = written[name]
    assert_same(one.stock, one.file)
    _, got = read(one.file)
    wide = Kind.BF16 if one.case.dtype == torch.bfloat16 else Kind.F32
    assert got["blk.2.ffn_down_exps.weight"].tensor_type == wide
    assert got["token_embd.weight"].tensor_type == wide
    assert one.record["tensors"].get("BF16", 0) == sum(
        t.tensor_type == Kind.BF16 for t in got.values()
    )
    assert one.record["bytes"] == one.file.stat().st_size


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_dense_models_are_written_too(
    name: str, written: dict[str, Written], tmp_path: Path
) -> None:
    one = written[name]
    record = export(one.source, tmp_path / "dense.gguf", to="gguf")
    assert record["architecture"] == name
    assert_same(one.source, tmp_path / "dense.gguf")
    assert "llama.expert_count" not in read(tmp_path / "dense.gguf")[0]


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NAMES if name != "bf16"])
def test_the_file_computes_moefys_function(
    name: str, written: dict[str, Written], tmp_path: Path
) -> None:
    """No further than sliding windows reach, which llama.cpp does not have."""
    one = written[name]
    documents = [ids[:9] for ids in token_ids()[:12]]

    def error(file: Path, model: Any) -> Tensor:
        found = []
        for ids in documents:
            got, want = gguf_forward.logits(file, ids), model(torch.tensor([ids])).logits[0]
            found.append((got - want).norm(dim=1) / want.norm(dim=1))
        return torch.cat(found)

    dense = transformers.AutoModelForCausalLM.from_pretrained(one.source, dtype=torch.float32)
    write_gguf(one.source, tmp_path / "dense.gguf")
    assert error(tmp_path / "dense.gguf", dense).max() < 5e-6
    assert error(one.file, dense).median() > 0.05
    # A token for which a layer runs other experts, scores being tied, is another model's.
    moe = error(one.file, load(one.moefied, dtype=torch.float32))
    assert moe.median() < 5e-5
    assert (moe > 1e-3).float().mean() < 0.1


@pytest.mark.parametrize("model", ["Mixtral", "Qwen2Moe", "Qwen3Moe"])
def test_mixtures_that_are_not_moefys(model: str, tmp_path: Path) -> None:
    sizes = {"intermediate_size": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    if model != "Mixtral":
        sizes = {
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8, "norm_topk_prob": model == "Qwen3Moe",
        }  # fmt: skip
    config = getattr(transformers, f"{model}Config")(**SETTINGS | sizes)
    made = random_model(getattr(transformers, f"{model}ForCausalLM"), config)
    made.save_pretrained(tmp_path / "source")
    write_gguf(tmp_path / "source", tmp_path / "out.gguf")
    assert_same(tmp_path / "source", tmp_path / "out.gguf")


def test_biases_of_llama_are_turned_with_their_rows(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**SETTINGS, attention_bias=True, mlp_bias=True)
    model = random_model(transformers.LlamaForCausalLM, config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "source")
    write_gguf(tmp_path / "source", tmp_path / "out.gguf")
    assert_same(tmp_path / "source", tmp_path / "out.gguf")


@pytest.mark.parametrize("what", ["swapped", "not turned", "router"])
def test_the_comparison_sees_mistakes(
    what: str, written: dict[str, Written], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, stock = written["llama"], tmp_path / "stock"
    shutil.copytree(one.stock, stock)
    held = load_file(stock / "model.safetensors")
    block = "model.layers.1.block_sparse_moe"
    if what == "swapped":
        first, second = (f"{block}.experts.{number}.w2.weight" for number in (3, 4))
        held[first], held[second] = held[second], held[first].clone()
    if what == "router":
        held[f"{block}.gate.weight"] = held[f"{block}.gate.weight"].flip(0)
    if what == "not turned":
        monkeypatch.setattr(tensors, "_paired", lambda read, heads: read())
    save_file(held, stock / "model.safetensors", {"format": "pt"})
    write_gguf(stock, tmp_path / "out.gguf")
    with pytest.raises(AssertionError, match=r"blk\.\d"):
        assert_same(one.stock, tmp_path / "out.gguf")


def test_an_artefact_goes_through_the_target_that_fits(
    written: dict[str, Written], tmp_path: Path
) -> None:
    for name in ("llama", "shared", "llama_shared", "qwen3"):
        one, out = written[name], tmp_path / "sub" / f"{name}.gguf"
        record = export(one.moefied, out, to="gguf")
        assert record["native"] == one.case.to
        assert record["architecture"] == FILES[one.case.to]
        assert record["verification"]["float32"]["relative_error_before_flips"] < 1e-3
        assert record["bytes"] == out.stat().st_size
        assert_same(one.stock, out)
        assert read(out)[0]["general.name"] == "source"
        json.dumps(record, allow_nan=False)
        assert [file.name for file in out.parent.iterdir()] == [out.name]
        out.unlink()


@pytest.mark.parametrize("name", NAMES)
def test_metadata(name: str, written: dict[str, Written]) -> None:
    one = written[name]
    keys, _ = read(one.file)
    config = json.loads((one.stock / "config.json").read_text())
    kind = FILES[one.case.to]
    head = one.case.settings.get("head_dim", 8)
    want = {
        "block_count": 3,
        "context_length": 128,
        "embedding_length": 32,
        "vocab_size": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": head,
        "attention.value_length": head,
        "rope.dimension_count": head,
        "attention.layer_norm_rms_epsilon": pytest.approx(3e-5),
        "rope.freq_base": pytest.approx(config["rope_theta"]),
        "expert_count": 16 - int(one.case.recipe.get("partition.shared", 0)),
        "expert_used_count": int(one.case.recipe.get("selection.k", 4)),
        "feed_forward_length": 4 if one.case.to == "mixtral" else 64,
    }
    if one.case.to != "mixtral":
        want["expert_feed_forward_length"] = 4
    if one.case.to == "qwen2_moe":
        size = 4 * max(1, int(one.case.recipe.get("partition.shared", 0)))
        want["expert_shared_feed_forward_length"] = size
    scaling = config["rope_parameters"]["rope_type"]
    want["rope.scaling.type"] = scaling if scaling in ("linear", "yarn") else "none"
    if scaling in ("linear", "yarn"):
        want["rope.scaling.factor"] = config["rope_parameters"]["factor"]
    if scaling == "yarn":
        want["rope.scaling.original_context_length"] = 32
    got = {key.removeprefix(f"{kind}."): v for key, v in keys.items() if key.startswith(kind + ".")}
    assert got == want
    assert keys["general.architecture"] == kind
    assert keys["general.file_type"] == (32 if name == "bf16" else 0)
    assert keys["tokenizer.ggml.model"] == "none"


def test_warnings(written: dict[str, Written]) -> None:
    said = {name: " ".join(one.record["warnings"]) for name, one in written.items()}
    assert "no tokenizer" in said["llama"]
    assert "back 9 tokens" in said["mistral"]
    assert "back 9 tokens" in said["shared"]
    assert "multiplied by 3.5" not in said["shared"]  # fp32 rounds nothing
    assert "reaches back" not in said["qwen2"]


def test_loss_of_experts_that_are_no_power_of_two_is_said(
    written: dict[str, Written], tmp_path: Path
) -> None:
    stock = tmp_path / "stock"
    shutil.copytree(written["shared"].stock, stock)
    held = {
        name: value.bfloat16() for name, value in load_file(stock / "model.safetensors").items()
    }
    save_file(held, stock / "model.safetensors", {"format": "pt"})
    record = write_gguf(stock, tmp_path / "out.gguf")
    assert any("multiplied by 3.5" in warning for warning in record["warnings"])


def test_llama_3_positions_are_factors(written: dict[str, Written]) -> None:
    """The formula of Llama 3's own code, https://github.com/meta-llama/llama-models."""
    _, got = read(written["llama"].file)
    factors = values(got["rope_freqs.weight"])
    want = []
    for i in range(4):
        wave = 2 * np.pi * 500.0 ** (2 * i / 8)
        smooth = (16 / wave - 1.0) / (4.0 - 1.0)
        if wave < 16 / 4.0:
            want.append(1.0)
        elif wave > 16 / 1.0:
            want.append(8.0)
        else:
            want.append(1 / ((1 - smooth) / 8.0 + smooth))
    assert len({round(x, 3) for x in want}) > 1
    assert factors.tolist() == pytest.approx(want, rel=1e-5)


def test_q8_0(demo: Path, tmp_path: Path) -> None:
    plain = export(demo, tmp_path / "plain.gguf", to="gguf")
    assert_same(demo, tmp_path / "plain.gguf")
    record = export(demo, tmp_path / "small.gguf", to="gguf", quantize="q8_0")
    assert record["bytes"] < 0.6 * plain["bytes"]
    assert record["tensors"] == {"Q8_0": plain["tensors"]["BF16"], "F32": plain["tensors"]["F32"]}
    keys, got = read(tmp_path / "small.gguf")
    _, want = read(tmp_path / "plain.gguf")
    assert keys["general.file_type"] == 7
    for name, tensor in got.items():
        near, true = values(tensor), values(want[name])
        if tensor.tensor_type == Kind.F32:
            assert torch.equal(near, true)
            continue
        blocks = true.reshape(-1, 32)
        step = blocks.abs().amax(1, keepdim=True) / 127
        assert ((near.reshape(-1, 32) - blocks).abs() <= 0.51 * step + 127 * step / 2**11).all()
        assert 1e-3 < (near - true).norm() / true.norm() < 1e-2
    assert got["blk.0.ffn_gate_inp.weight"].tensor_type == Kind.F32


def q4_1_codes(tensor: Any) -> Tensor:
    """Codes of a tensor in Q4_1: blocks of d, m (fp16 each) and 32 nibbles, the low ones first."""
    shape = [int(size) for size in reversed(tensor.shape)]
    blocks = torch.from_numpy(np.array(tensor.data).reshape(-1, 20)[:, 4:].copy())
    return torch.cat([blocks & 15, blocks >> 4], 1).reshape(shape)


@torch.no_grad()
def test_q4_1_holds_the_codes_that_a_conversion_has_stored(tmp_path: Path) -> None:
    settings = {
        "context": "48", "partition.experts": "16", "selection.k": "8", "partition.tokens": "512",
        "router.tokens": "512", "router.epochs": "1", "storage.bits": "4", "storage.scales": "16",
    }  # fmt: skip
    recipe = recipes.override(recipes.load("export"), settings)
    convert(DEMO, tmp_path / "out", recipe=recipe, corpus=token_ids(), quiet=True)
    record = export(tmp_path / "out", tmp_path / "out.gguf", to="gguf", quantize="q4_1")
    keys, got = read(tmp_path / "out.gguf")
    assert keys["general.file_type"] == 3
    assert record["tensors"]["Q4_1"] == 3 * 6
    assert {got[f"blk.{i}.attn_q.weight"].tensor_type for i in range(6)} == {Kind.Q8_0}
    artefact = read_artefact(tmp_path / "out")
    for layer in range(6):
        stored = artefact.stored(layer)
        assert stored is not None
        for name in ("gate", "up", "down"):
            codes_END = q4_1_codes(got[f"blk.{layer}.ffn_{name}_exps.weight"])
            own_ND = stored.matrix(name).codes_ND
            want_END = own_ND.unflatten(0, (16, -1))
            want_END = want_END.mT if name == "down" else want_END
            # Offsets of bf16 weights are off by up to 2^-9 of a group's range: now and then a tie falls apart.
            assert (codes_END == want_END).float().mean() > 0.9999, name
            assert (codes_END.int() - want_END.int()).abs().max() <= 1


def test_rows_that_no_block_fits_keep_their_dtype(
    written: dict[str, Written], tmp_path: Path
) -> None:
    record = write_gguf(written["llama"].stock, tmp_path / "out.gguf", quantize="q8_0")
    _, got = read(tmp_path / "out.gguf")
    assert got["blk.0.ffn_down_exps.weight"].tensor_type == Kind.F32
    assert got["blk.0.ffn_up_exps.weight"].tensor_type == Kind.Q8_0
    assert any("3 matrices" in w and "no multiple of 32" in w for w in record["warnings"])


@pytest.mark.parametrize(
    ("model", "settings", "words"),
    [
        (
            "Llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            ("'dynamic'", "linear, llama3, yarn"),
        ),
        (
            "Qwen3",
            {"rope_parameters": CASES["llama"].settings["rope_parameters"]},
            ("'llama3'", "qwen3"),
        ),
        (
            "Qwen2",
            {"rope_parameters": CASES["qwen2"].settings["rope_parameters"] | {"beta_fast": 16.0}},
            ("beta_fast=16.0",),
        ),
        ("Llama", {"hidden_act": "gelu"}, ("'gelu'", "silu")),
        ("Qwen3", {"attention_bias": True}, ("o_proj.bias", "qwen3")),
        ("Qwen2", {"head_dim": 16}, ("4 heads of 16", "32")),
        (
            "Qwen2Moe",
            {"norm_topk_prob": True, "num_experts": 4, "num_experts_per_tok": 2},
            ("layer 0", "norm_topk_prob is true"),
        ),
        (
            "Qwen3Moe",
            {"norm_topk_prob": False, "num_experts": 4, "num_experts_per_tok": 2},
            ("norm_topk_prob is false",),
        ),
    ],
)
def test_models_llama_cpp_computes_otherwise_are_refused(
    model: str, settings: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    sizes = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    if not model.endswith("Moe"):
        sizes = {}
    config = getattr(transformers, f"{model}Config")(**SETTINGS | sizes | settings)
    made = random_model(getattr(transformers, f"{model}ForCausalLM"), config)
    made.save_pretrained(tmp_path / "source")
    refused(UnsupportedModel, tmp_path / "source", tmp_path / "out.gguf", *words)


def test_what_is_in_the_way_and_what_is_missing(
    written: dict[str, Written], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, out = written["llama"], tmp_path / "out.gguf"
    refused(MoefyError, one.moefied, out, "'q8_0'", quantize="q8_1")
    refused(UnsupportedModel, build("gpt2", tmp_path / "gpt2"), out, "GPT2LMHeadModel", "Qwen2Moe")
    with pytest.raises(MoefyError, match="export --to gguf"):
        export(one.moefied, out, to="mixtral", quantize="q8_0")
    out.write_text("mine")
    refused(OutputError, one.moefied, out, "--overwrite")
    refused(OutputError, one.moefied, tmp_path / "gpt2", "is a folder")
    assert out.read_text() == "mine"
    refused(OutputError, one.source, out, "no run of moefy wrote", overwrite=True)
    out.write_bytes(b"GGUF of before")
    export(one.source, out, to="gguf", overwrite=True)
    assert out.read_bytes()[:4] == b"GGUF"
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "moefy.exporting.gguf")
    refused(MoefyError, one.moefied, tmp_path / "no.gguf", 'pip install "moefy[gguf]"')


def test_routings_that_no_stock_model_holds_are_refused(
    written: dict[str, Written], tmp_path: Path
) -> None:
    changes = {"router.name": "mlp", "router.epochs": "1"}
    made = moefied(written["llama"].source, tmp_path / "moefied", changes)
    words = ("router 'mlp'", "--recipe export")
    refused(RecipeError, made, tmp_path / "out.gguf", *words)


def test_a_file_appears_when_it_is_whole(
    written: dict[str, Written], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, out = written["qwen3"], tmp_path / "out.gguf"
    out.write_text("GGUF of before")
    plain = tensors._stacked

    def broken(checkpoint: Any, parts: list[str], gain: float) -> Tensor:
        if ".2." in parts[0]:
            raise CheckpointError("the disk is gone")
        return plain(checkpoint, parts, gain)

    monkeypatch.setattr(tensors, "_stacked", broken)
    with pytest.raises(CheckpointError, match="gone"):
        write_gguf(one.stock, out, overwrite=True)
    assert out.read_text() == "GGUF of before"
    assert list(tmp_path.iterdir()) == [out]


def test_shards_are_read(written: dict[str, Written], tmp_path: Path) -> None:
    one = written["qwen3"]
    config = transformers.AutoConfig.from_pretrained(one.source)
    model = transformers.AutoModelForCausalLM.from_pretrained(one.source, config=config)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    write_gguf(tmp_path / "shards", tmp_path / "out.gguf")
    assert_same(one.source, tmp_path / "out.gguf")


def test_the_verb(written: dict[str, Written], tmp_path: Path) -> None:
    arguments = ["export", written["qwen3"].source, tmp_path / "out.gguf", "--to", "gguf"]
    result = CliRunner().invoke(app, [*map(str, arguments), "--quantize", "q8_0", "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert (record["architecture"], record["quantize"]) == ("qwen3", "q8_0")
    again = CliRunner().invoke(app, [str(a) for a in arguments])
    assert again.exit_code == 1
    assert "--overwrite" in again.output
