"""Exported checkpoints against moefy's own model, in a process that has never seen moefy."""

import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_conversion import rehash
from tiny_exports import CASES, SETTINGS, Case, moefied, source
from tiny_models import build
from torch import Tensor

from moefy.errors import CheckpointError, MoefyError, OutputError, RecipeError, UnsupportedModel
from moefy.experts.loading import load
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.exporting import tensors
from moefy.exporting.export import export
from moefy.exporting.targets import TARGETS, check, config_json, find_target, stock_config
from moefy.exporting.tensors import Exportable, Planned, plan_tensors, write_shards
from moefy.models.artefact import read_artefact
from moefy.models.checkpoint import Checkpoint, read_header
from moefy.models.config import read_config
from moefy.models.entries import LayerEntry
from moefy.models.locate import meta_model, sites
from moefy.run.folder import MARK
from moefy.run.output import digest

NEW_TOKENS = 64
_PROBE = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
folders, new_tokens, out = json.loads(sys.argv[1])
generator = torch.Generator().manual_seed(7)
ids = torch.randint(3, 96, (6, 40), generator=generator)
found = {"ids": ids}
for name, folder in folders.items():
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    sets = []
    for path, module in model.named_modules():
        if path.endswith(".gate"):
            module.register_forward_hook(lambda m, i, o: sets.append(o[2].sort(-1).values))
    with torch.no_grad():
        found[name + ".logits"] = model(ids).logits
    found[name + ".sets"] = torch.stack(sets)
    found[name + ".tokens"] = model.generate(
        ids[:2, :12], attention_mask=torch.ones(2, 12), do_sample=False,
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0,
    )
    found[name + ".type"] = torch.tensor(list(type(model).__name__.encode()))
assert not [name for name in sys.modules if name.startswith("moefy")]
save_file(found, out)
"""


@dataclass(frozen=True)
class Exported:
    """A case's folders and record."""

    case: Case
    source: Path
    moefied: Path
    out: Path
    record: dict[str, Any]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Every case, converted and exported."""
    found = {}
    for name, case in CASES.items():
        root = tmp_path_factory.mktemp(name)
        dense = source(case, root / "source")
        made = moefied(dense, root / "moefied", case.recipe)
        (made / "tokenizer_config.json").write_text("{}")
        record = export(made, root / "out", to=case.to)
        found[name] = Exported(case, dense, made, root / "out", record)
    return found


@pytest.fixture(scope="module")
def stock(
    exported: dict[str, Exported], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tensor]:
    """What stock transformers computes in a process of its own, without moefy."""
    root = tmp_path_factory.mktemp("stock")
    folders = {name: str(one.out) for name, one in exported.items()}
    arguments = json.dumps([folders, NEW_TOKENS, str(root / "found.safetensors")])
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", _PROBE, arguments], cwd=root, check=True, env=one_thread)
    return load_file(root / "found.safetensors")


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("name", CASES)
def test_stock_transformers_computes_moefys_function(
    name: str, exported: dict[str, Exported], stock: dict[str, Tensor]
) -> None:
    one = exported[name]
    model = load(one.moefied, dtype=torch.float32)
    masks: list[Tensor] = []
    for module in sparse_mlps(model).values():
        module.observer = lambda _, mask_TE, s=module.shared: masks.append(mask_TE[:, s:])
    with torch.no_grad():
        want = model(stock["ids"]).logits
    sets = torch.stack(masks)
    k = one.record["active"]
    assert bytes(stock[f"{name}.type"].tolist()).decode() == one.record["architecture"]
    got_sets = torch.zeros_like(sets).scatter_(-1, stock[f"{name}.sets"], True)
    rounded = one.case.dtype != torch.float32 and k & (k - 1)
    if rounded:
        assert (got_sets != sets).any(-1).float().mean() < 0.05
        assert 1e-5 < relative(stock[f"{name}.logits"], want) < 5e-2
        return
    # Rounding decides where scores are tied, which changes that token and those that see it.
    assert (got_sets != sets).any(-1).float().mean() < 2e-3
    assert want.std() > 0.3
    errors_BT = (stock[f"{name}.logits"] - want).norm(dim=-1) / want.norm(dim=-1)
    assert (errors_BT <= 1e-3).float().mean() > 0.9
    # Every token that was generated is the likeliest after those before it, ties apart.
    tokens = stock[f"{name}.tokens"]
    assert tokens.shape == (2, 12 + NEW_TOKENS)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits[:, 11:]
    behind_BT = logits.amax(-1) - logits.gather(-1, tokens[:, 12:, None])[..., 0]
    assert (behind_BT <= 1e-2 * logits.std()).float().mean() > 0.9


@pytest.mark.parametrize("name", CASES)
def test_selection_matters(
    name: str, exported: dict[str, Exported], stock: dict[str, Tensor]
) -> None:
    """The tests above would not pass for the dense model: it is far away."""
    dense = transformers.AutoModelForCausalLM.from_pretrained(
        exported[name].source, dtype=torch.float32
    )
    with torch.no_grad():
        assert relative(stock[f"{name}.logits"], dense(stock["ids"]).logits) > 0.05


@pytest.mark.parametrize("name", CASES)
def test_record_and_files(name: str, exported: dict[str, Exported]) -> None:
    one = exported[name]
    json.dumps(one.record, allow_nan=False)
    record, config = one.record, json.loads((one.out / "config.json").read_text())
    assert record["architecture"] == TARGETS[one.case.to].architecture
    assert record["out"] == str(one.out)
    assert record["experts"] + record["shared_experts"] == 16
    assert record["verification"]["float32"]["tokens"] == 8 * 48
    files = {file.name for file in one.out.iterdir()}
    assert files >= {"config.json", "model.safetensors", "README.md", "tokenizer_config.json"}
    assert files >= {"generation_config.json"}
    assert not files & {"moefy.json", "moefy.safetensors", "records.json"}
    stored = read_header(one.out / "model.safetensors")
    assert record["bytes"] == sum(t.end - t.begin for t in stored.values())
    assert config["head_dim"] == one.case.settings.get("head_dim", 8)
    before = json.loads((one.source / "config.json").read_text())
    for key in ("rms_norm_eps", "rope_parameters", "hidden_act", "eos_token_id", "dtype"):
        assert config[key] == before[key]
    assert config["tie_word_embeddings"] == ("lm_head.weight" not in stored)
    assert config["tie_word_embeddings"] == one.case.settings.get("tie_word_embeddings", False)
    assert config["rope_theta"] == before["rope_parameters"]["rope_theta"]
    gates = [n for n in stored if n.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight"))]
    assert len(gates) == 3
    assert {stored[n].dtype for n in gates} == {"F32"}
    text = (one.out / "README.md").read_text()
    assert record["architecture"] in text
    assert all(warning in text for warning in record["warnings"])


def test_names_on_disk_are_those_of_the_published_checkpoints(
    exported: dict[str, Exported],
) -> None:
    names = {
        name: set(read_header(one.out / "model.safetensors")) for name, one in exported.items()
    }
    layer = "model.layers.2"
    assert {f"{layer}.block_sparse_moe.experts.15.w{i}.weight" for i in (1, 2, 3)} < names["llama"]
    assert f"{layer}.block_sparse_moe.gate.weight" in names["mistral"]
    for role in ("gate_proj", "up_proj", "down_proj"):
        assert f"{layer}.mlp.experts.15.{role}.weight" in names["qwen3"]
        assert f"{layer}.mlp.experts.13.{role}.weight" in names["shared"]
        assert f"{layer}.mlp.experts.14.{role}.weight" not in names["shared"]
        assert f"{layer}.mlp.shared_expert.{role}.weight" in names["shared"]
    assert f"{layer}.mlp.shared_expert_gate.weight" in names["shared"]
    assert not any("shared" in n for n in names["qwen3"] | names["llama"])
    assert f"{layer}.self_attn.q_proj.bias" in names["llama_shared"]


def test_warnings(exported: dict[str, Exported]) -> None:
    def has(name: str, text: str) -> bool:
        return any(text in warning for warning in exported[name].record["warnings"])

    assert has("bf16_three", "no power of two: down projections")
    assert has("bf16_three", "selection.k=2")
    assert not has("bf16", "no power of two")
    assert not has("llama_shared", "down projections")
    assert has("shared", "14 routed experts")
    assert has("llama", "small")
    assert has("llama", "experts_implementation='eager'")
    assert has("qwen2", "zero weights was added")
    assert not has("shared", "zero weights")


def test_loss_in_bf16_is_reported_and_like_that_of_bf16_itself(
    exported: dict[str, Exported],
) -> None:
    for name in ("bf16", "bf16_three"):
        measured = exported[name].record["verification"]
        own = measured["moefy itself, bfloat16 for float32"]["relative_error"]
        assert 0 <= measured["bfloat16"]["relative_error"] < 3 * own + 0.01
    assert exported["bf16"].record["verification"]["float32"]["relative_error"] <= 1e-3
    rounded = exported["bf16_three"].record["verification"]["float32"]
    assert 1e-4 < rounded["relative_error_before_flips"] < 2e-2
    assert "bfloat16" not in exported["llama"].record["verification"]


MUTATIONS = {
    "swapped experts": lambda t, b: (
        {f"{b}.0.w{i}.weight": t[f"{b}.1.w{i}.weight"] for i in (1, 2, 3)}
        | {f"{b}.1.w{i}.weight": t[f"{b}.0.w{i}.weight"] for i in (1, 2, 3)}
    ),
    "unscaled": lambda t, b: {f"{b}.{e}.w2.weight": t[f"{b}.{e}.w2.weight"] / 4 for e in range(16)},
    "gate for up": lambda t, b: {f"{b}.3.w1.weight": t[f"{b}.3.w3.weight"]},
    "an expert of zeros": lambda t, b: {f"{b}.2.w2.weight": 0 * t[f"{b}.2.w2.weight"]},
    "router not scaled down": lambda t, b: {
        (gate := b.replace("experts", "gate.weight")): t[gate] * 2.0**14
    },
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_sees_a_wrong_export(
    mutation: str, exported: dict[str, Exported], stock: dict[str, Tensor], tmp_path: Path
) -> None:
    shutil.copytree(exported["llama"].out, tmp_path / "out")
    held = load_file(tmp_path / "out" / "model.safetensors")
    held |= MUTATIONS[mutation](held, "model.layers.1.block_sparse_moe.experts")
    held = {name: value.clone() for name, value in held.items()}
    save_file(held, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        got = model(stock["ids"]).logits
    assert relative(got, stock["llama.logits"]) > 1e-3


@pytest.mark.parametrize("what", ["unscaled", "swapped", "router"])
def test_export_rejects_its_own_mistakes(
    what: str, exported: dict[str, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    piece, experts = tensors._piece, tensors._experts

    def wrong(source: Any, site: Any, role: str, name: str, rows: slice, gain: float) -> Planned:
        if what == "unscaled":
            return piece(source, site, role, name, rows, 1.0)
        if what == "swapped" and rows.start < 8:
            rows = slice(4, 8) if rows.start == 0 else slice(0, 4)
        return piece(source, site, role, name, rows, gain)

    def flipped(*arguments: Any) -> Any:
        for planned in experts(*arguments):
            make = planned.make
            gate = planned.name.endswith(".gate.weight")
            yield replace(planned, make=lambda m=make: m().flip(0)) if gate else planned

    monkeypatch.setattr(tensors, "_piece", wrong)
    if what == "router":
        monkeypatch.setattr(tensors, "_experts", flipped)
    with pytest.raises(MoefyError, match="verification failed"):
        export(exported["llama"].moefied, tmp_path / "out", to="mixtral")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"router": {"name": "mlp", "hidden": 8}}, ("router 'mlp'", "--recipe export")),
        ({"selection": {"name": "topk", "k": 4}}, ("selection 'topk'", "--recipe export")),
        (
            {"compensation": {"name": "conditional_mean", "rank": 0}},
            ("'conditional_mean'", "--recipe export"),
        ),
        ({"experts": 8}, ("layer 1 has 8 experts, layer 0 has 16",)),
        (
            {"selection": {"name": "softmax_topk", "k": 2, "eps": 2.0**-14}},
            ("layer 1 has 2 experts that run, layer 0 has 4",),
        ),
    ],
)
def test_routing_that_no_stock_model_holds_is_refused(
    changes: dict[str, Any], words: tuple[str, ...], exported: dict[str, Exported]
) -> None:
    folder, target = exported["llama"].moefied, find_target("mixtral")
    made, meta = read_artefact(folder), meta_model(read_config(Checkpoint.open(folder)))
    layers = [made.layers[0], replace(made.layers[1], **changes)]
    assert target is not None
    with pytest.raises(RecipeError) as caught:
        check(target, replace(made, layers=layers), sites(meta), meta)
    for word in words:
        assert word in str(caught.value)


def refused(
    error: type[MoefyError], folder: Path, out: Path, to: str, *words: str, **options: Any
) -> None:
    before = {file.name for file in out.parent.iterdir()}
    with pytest.raises(error) as caught:
        export(folder, out, to=to, **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert {file.name for file in out.parent.iterdir()} == before


def test_models_the_target_does_not_compute_are_refused(
    exported: dict[str, Exported], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refused(UnsupportedModel, exported["qwen2"].moefied, out, "mixtral", "--to qwen2_moe")
    refused(UnsupportedModel, exported["qwen3"].moefied, out, "qwen2_moe", "--to qwen3_moe")
    refused(UnsupportedModel, exported["llama"].moefied, out, "qwen3_moe", "mixtral or qwen2_moe")
    refused(
        RecipeError, exported["llama_shared"].moefied, out, "mixtral",
        "1 shared experts", "--to qwen2_moe", "partition.shared=0",
    )  # fmt: skip
    refused(
        MoefyError, exported["llama"].moefied, out, "mixtrl", "did you mean 'mixtral'?", "dense"
    )
    refused(CheckpointError, exported["llama"].source, out, "mixtral", "not a moefied model")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"attention_bias": True}, ("self_attn.q_proj.bias", "mixtral", "--to dense")),
        ({"mlp_bias": True}, ("biases (down, gate, up)", "--to dense")),
    ],
)
def test_biases_are_refused(
    settings: dict[str, Any], words: tuple[str, ...], tmp_path: Path
) -> None:
    case = Case("Llama", "mixtral", {**settings, "num_hidden_layers": 1}, {})
    made = moefied(source(case, tmp_path / "source"), tmp_path / "moefied", {"router.epochs": "1"})
    refused(UnsupportedModel, made, tmp_path / "out", "mixtral", *words)


def test_other_families_are_refused_except_as_dense(tmp_path: Path) -> None:
    made = moefied(build("gpt2", tmp_path / "source"), tmp_path / "moefied", {"router.epochs": "1"})
    refused(UnsupportedModel, made, tmp_path / "out", "mixtral", "gpt2", "--to dense")
    record = export(made, tmp_path / "out", to="dense")
    assert record["architecture"] == "GPT2LMHeadModel"
    assert record["relative_error"] < 1e-5


def test_mixed_windows_do_not_fit_qwen3_moe(exported: dict[str, Exported]) -> None:
    config = transformers.Qwen3Config(
        **SETTINGS, use_sliding_window=True, sliding_window=8, max_window_layers=1
    )
    artefact = read_artefact(exported["qwen3"].moefied)
    with pytest.raises(UnsupportedModel, match="sliding window"):
        check(TARGETS["qwen3_moe"], artefact, sites(meta_model(config)), meta_model(config))


def test_models_without_a_language_model_head_are_refused(
    exported: dict[str, Exported], tmp_path: Path
) -> None:
    shutil.copytree(exported["llama"].moefied, tmp_path / "moefied")
    config = json.loads((tmp_path / "moefied" / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "moefied" / "config.json").write_text(json.dumps(config))
    rehash(tmp_path / "moefied")
    words = ("LlamaForSequenceClassification", "--to dense")
    refused(UnsupportedModel, tmp_path / "moefied", tmp_path / "out", "mixtral", *words)


def test_an_existing_folder_is_kept_unless_told(
    exported: dict[str, Exported], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    refused(MoefyError, exported["llama"].moefied, out, "mixtral", "--overwrite")
    assert (out / "mine").exists()
    with pytest.raises(OutputError, match="holds mine, which no run of moefy wrote"):
        export(exported["llama"].moefied, out, to="mixtral", overwrite=True)
    (out / "mine").unlink()
    for _ in range(2):
        export(exported["llama"].moefied, out, to="mixtral", overwrite=True)
    same(out / "model.safetensors", exported["llama"].out / "model.safetensors")


def test_what_a_killed_export_left_is_written_over(
    exported: dict[str, Exported], tmp_path: Path
) -> None:
    left = tmp_path / ".out.moefy-unfinished"
    (left / "model").mkdir(parents=True)
    (left / "fingerprint").write_text(digest(["export"]))
    (left / "model" / "junk").touch()
    export(exported["llama"].moefied, tmp_path / "out", to="mixtral")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "junk").exists()


def same(one: Path, other: Path) -> None:
    assert one.read_bytes() == other.read_bytes()


def test_adapter_gives_the_same_bytes_as_the_full_form(
    exported: dict[str, Exported], tmp_path: Path
) -> None:
    llama = exported["llama"]
    adapter = moefied(llama.source, tmp_path / "adapter", {}, adapter=True)
    (llama.source / "README.md").write_text("the card of the source")
    export(adapter, tmp_path / "out", to="mixtral")
    same(tmp_path / "out" / "model.safetensors", llama.out / "model.safetensors")
    assert (tmp_path / "out" / "README.source.md").read_text() == "the card of the source"
    export(adapter, tmp_path / "dense", to="dense")
    assert (tmp_path / "dense" / "README.md").read_text() == "the card of the source"
    same(tmp_path / "dense" / "model.safetensors", llama.moefied / "model.safetensors")


def test_dense_export_is_the_source_in_another_order(
    exported: dict[str, Exported], stock: dict[str, Tensor], tmp_path: Path
) -> None:
    one = exported["qwen2"]
    record = export(one.moefied, tmp_path / "out", to="dense")
    assert record["architecture"] == "Qwen2ForCausalLM"
    assert record["warnings"] == []
    names = {file.name for file in (tmp_path / "out").iterdir()} - {MARK}
    assert names == {file.name for file in one.source.iterdir()} | {"tokenizer_config.json"}
    got, want = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (tmp_path / "out", one.source)
    )
    assert not torch.equal(
        got.model.layers[0].mlp.up_proj.weight, want.model.layers[0].mlp.up_proj.weight
    )
    with torch.no_grad():
        assert relative(got(stock["ids"]).logits, want(stock["ids"]).logits) < 1e-5


def test_exports_after_training(exported: dict[str, Exported], tmp_path: Path) -> None:
    model = load(exported["llama"].moefied)
    with torch.no_grad():
        for module in sparse_mlps(model).values():
            module.down_ND.mul_(-0.5)
    model.save_pretrained(tmp_path / "trained")
    assert read_artefact(tmp_path / "trained").weights_modified
    export(tmp_path / "trained", tmp_path / "dense", to="dense")
    name = "model.layers.1.mlp.down_proj.weight"
    before = load_file(exported["llama"].moefied / "model.safetensors")[name]
    assert torch.equal(load_file(tmp_path / "dense" / "model.safetensors")[name], -0.5 * before)
    export(tmp_path / "trained", tmp_path / "moe", to="mixtral")
    expert = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    got = load_file(tmp_path / "moe" / "model.safetensors")[expert]
    assert torch.equal(got, -2.0 * before[:, 8:12])


def planned_of(one: Exported) -> tuple[list[Planned], Exportable, Any]:
    checkpoint, artefact = Checkpoint.open(one.moefied), read_artefact(one.moefied)
    held = Exportable(checkpoint, artefact)
    target = TARGETS[one.case.to]
    made = stock_config(target, artefact.layers[0], held.config, tied=held.tied, dtype="float32")
    return plan_tensors(target, held, meta_model(made)), held, made


def test_every_tensor_is_read_once_and_one_layer_is_held(
    exported: dict[str, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    plain = Checkpoint.read

    def counted(self: Checkpoint, name: str) -> Tensor:
        read.append(name)
        return plain(self, name)

    monkeypatch.setattr(Checkpoint, "read", counted)
    planned, held, _ = planned_of(exported["shared"])
    assert read == []
    write_shards(tmp_path, planned)
    assert sorted(read) == sorted(held.names.values())
    assert held.read.cache_info().maxsize == 3


def test_shards(exported: dict[str, Exported], stock: dict[str, Tensor], tmp_path: Path) -> None:
    planned, _, config = planned_of(exported["bf16"])
    write_shards(tmp_path, planned, shard_bytes=20_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 3
    assert all(file.stat().st_size < 20_000 + 20_000 for file in shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {tensor.name for tensor in planned}
    for file in shards:
        header = read_header(file)
        assert all((t.begin % (4 if t.dtype == "F32" else 2)) == 0 for t in header.values())
        (length,) = struct.unpack("<Q", file.read_bytes()[:8])
        assert length % 8 == 0
    (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        assert relative(model(stock["ids"]).logits, stock["bf16.logits"]) < 1e-6


def test_a_tensor_that_is_not_what_the_plan_says_is_refused(tmp_path: Path) -> None:
    wrong = Planned("w", (2, 2), torch.float32, lambda: torch.zeros(2, 3))
    with pytest.raises(CheckpointError, match=r"\[2, 3\]"):
        write_shards(tmp_path, [wrong])


def test_overflow_in_fp16_is_refused(exported: dict[str, Exported], tmp_path: Path) -> None:
    shutil.copytree(exported["llama"].moefied, tmp_path / "moefied")
    file = tmp_path / "moefied" / "model.safetensors"
    held = {name: value.half() for name, value in load_file(file).items()}
    held["model.layers.0.mlp.down_proj.weight"][3, 5] = 30000.0
    save_file(held, file, {"format": "pt"})
    one = replace(exported["llama"], moefied=tmp_path / "moefied")
    with pytest.raises(CheckpointError, match="SHA-256"):
        export(one.moefied, tmp_path / "out", to="mixtral")
    rehash(one.moefied)
    with pytest.raises(CheckpointError, match="times 4 it is not finite"):
        export(one.moefied, tmp_path / "out", to="mixtral")


@pytest.mark.parametrize("untied", [False, True])
def test_ties_are_decided_by_the_file(
    untied: bool, exported: dict[str, Exported], tmp_path: Path
) -> None:
    one = exported["llama"]
    shutil.copytree(one.moefied, tmp_path / "moefied")
    file = tmp_path / "moefied" / "model.safetensors"
    held = load_file(file)
    assert "lm_head.weight" not in held
    held["lm_head.weight"] = held["model.embed_tokens.weight"] + (1.0 if untied else 0.0)
    save_file(held, file, {"format": "pt"})
    rehash(tmp_path / "moefied")
    record = export(tmp_path / "moefied", tmp_path / "out", to="mixtral")
    assert record["tied_embeddings"] is not untied
    assert ("lm_head.weight" in read_header(tmp_path / "out" / "model.safetensors")) is untied


def test_configuration_survives_readers_of_both_transformers(tmp_path: Path) -> None:
    for name, case in CASES.items():
        config = getattr(transformers, f"{case.model}Config")(**SETTINGS | case.settings)
        entry = layer_entry(shared=int(case.recipe.get("partition.shared", 0)))
        made = stock_config(TARGETS[case.to], entry, config, tied=False, dtype="bfloat16")
        (tmp_path / "config.json").write_text(json.dumps(config_json(made)))
        again = transformers.AutoConfig.from_pretrained(tmp_path)
        assert again.rope_parameters == config.rope_parameters, name
        assert again.to_dict() | {"_name_or_path": ""} == made.to_dict(), name
        assert again.dtype == torch.bfloat16


def layer_entry(shared: int) -> LayerEntry:
    return LayerEntry(
        layer="model.layers.0",
        neurons=64,
        width=32,
        experts=16,
        shared=shared,
        router={"name": "linear", "hidden": 0},
        selection={"name": "softmax_topk", "k": 4, "eps": 2.0**-14},
        compensation="none",
    )


def test_targets_by_name() -> None:
    assert find_target("dense") is None
    assert find_target("mixtral") is TARGETS["mixtral"]
    with pytest.raises(MoefyError, match="did you mean 'qwen3_moe'"):
        find_target("qwen3moe")
