"""Conversions whose MLP weights are rounded: what is stored is what is computed with, whatever happens to it."""

import copy
import json
import pickle
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_conversion import RECIPE, convert_tiny, kill_conversion, rehash
from tiny_models import build, example_inputs

import moefy
from moefy import recipe as recipes
from moefy.errors import CheckpointError, MoefyError
from moefy.evaluation.folder import evaluate
from moefy.experts.loading import load_dense
from moefy.experts.saving import save
from moefy.experts.sparse_mlp import all_experts, sparse_mlps
from moefy.models.artefact import META, SIDE, read_artefact
from moefy.models.checkpoint import Checkpoint, sha256
from moefy.models.locate import read_mlp, sites
from moefy.models.reorder import revert

NAMES = ["llama", "opt", "gpt2", "phi3", "bert", "t5_gated"]
"""Gated and plain, fused, transposed, an encoder, both sides."""
BITS = {"storage.bits": 4}


def bytes_of(folder: Path) -> dict[str, str]:
    files = [f for f in folder.iterdir() if f.suffix == ".safetensors" or f.name == META]
    return {f.name: sha256(f) for f in files}


def rounded(w_ND: torch.Tensor, along: int, bits: int, scale_bits: int) -> torch.Tensor:
    """Every group of 32 by itself, as docs/format.md says; fp64."""
    w = (w_ND if along else w_ND.T).double()
    out = torch.empty_like(w)
    scales = [
        [(max(float(g.max()), 0) - min(float(g.min()), 0)) / (2**bits - 1) for g in row.split(32)]
        for row in w
    ]
    offsets = [[-min(float(g.min()), 0) for g in row.split(32)] for row in w]

    def eighth(values: list[float], least: int) -> list[float]:
        most = float(torch.tensor(max(max(values), 6e-8)).half())
        return [min(max(round(v / (most / 255)), least), 255) * most / 255 for v in values]

    def half(values: list[float], _: int) -> list[float]:
        return [float(torch.tensor(v).half()) for v in values]

    kept = eighth if scale_bits == 8 else half
    for n, row in enumerate(w):
        for g, (s, o) in enumerate(zip(kept(scales[n], 1), kept(offsets[n], 0), strict=True)):
            part = row[32 * g : 32 * g + 32]
            codes = ((part + o) / s).round().clamp(0, 2**bits - 1)
            out[n, 32 * g : 32 * g + 32] = codes * s - o
    return out if along else out.T


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Source and conversion in four bits of a tiny model, made once."""
    folder, done = tmp_path_factory.mktemp("stored"), {}

    def get(name: str, **options) -> tuple[Path, Path]:
        key = name + "".join(options)
        if key not in done:
            source = build(name, folder / key / "source", dtype=torch.float32)
            records = convert_tiny(name, source, folder / key / "out", settings=BITS, **options)
            done[key] = source, folder / key / "out", records
        return done[key]

    return get


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_is_computed_with_is_the_rounded_source_in_expert_order(made, name):
    source, out, records = made(name)
    artefact, dense = read_artefact(out), load_dense(Checkpoint.open(source))
    model, stock = moefy.load(out), load_dense(Checkpoint.open(out))
    for site, module in zip(sites(dense), sparse_mlps(model).values(), strict=True):
        order_N = artefact.permutation(site.index)
        want = read_mlp(site, dense.get_parameter).take(order_N)
        plain = read_mlp(site, stock.get_parameter)
        for what, along in {"up_ND": 1, "gate_ND": 1, "down_ND": 0}.items():
            if getattr(want, what) is None:
                assert getattr(module, what) is None
                continue
            values = rounded(getattr(want, what), along, 4, 8)
            own = getattr(module, what).double()
            assert (own - values).abs().max() <= 1e-6 * values.abs().max()  # fp32
            assert (values - getattr(want, what)).abs().max() > 1e-3 * values.abs().max()
            # Plain transformers reads the same numbers from the weight files.
            assert torch.equal(getattr(plain, what), getattr(module, what))
        for what in ("up_bias_N", "gate_bias_N", "down_bias_D"):
            if getattr(want, what) is not None:
                assert torch.equal(getattr(module, what), getattr(want, what))
    assert records["conversion"]["all_experts_relative_error"] < 1e-5
    assert records["conversion"]["rounding_kl"] > 0
    assert "not rounded" in records["evaluation"]["dense"]


@pytest.mark.parametrize("form", ["full", "adapter", "stream"])
def test_every_form_holds_the_same_codes(made, form, tmp_path):
    source, out, records = made("llama")
    other, options = tmp_path / "other", {} if form == "full" else {form: True}
    again = convert_tiny("llama", source, other, settings=BITS, **options)
    first, second = load_file(out / SIDE), load_file(other / SIDE)
    for name in [n for n in first if ".weights." in n or n.endswith("permutation")]:
        assert torch.equal(first[name], second[name]), name
    if form == "adapter":
        assert not list(other.glob("model*"))
        assert again["evaluation"]["total"] == records["evaluation"]["total"]
    else:
        assert sha256(other / "model.safetensors") == sha256(out / "model.safetensors")
    assert again["conversion"]["rounding_kl"] == pytest.approx(
        records["conversion"]["rounding_kl"], rel=0.3 if form == "stream" else 1e-6
    )


@pytest.mark.parametrize("options", [{}, {"adapter": True}])
def test_loading_and_saving_changes_no_byte(made, options, tmp_path):
    _, out, _ = made("llama", **options)
    moefy.load(out).save_pretrained(tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(out)


def test_a_killed_conversion_ends_with_the_same_bytes(made, tmp_path):
    source, out, _ = made("llama")
    kill_conversion("llama", source, tmp_path / "out", "layers", settings=BITS)
    convert_tiny("llama", source, tmp_path / "out", settings=BITS, resume=True)
    assert bytes_of(tmp_path / "out") == bytes_of(out)


@torch.no_grad()
def test_changed_weights_are_rounded_anew(made, tmp_path):
    _, out, _ = made("llama")
    model = moefy.load(out)
    module = sparse_mlps(model)[1]
    assert module.stored is not None
    untouched = module.stored.tensors["up.codes"]
    module.gate_ND.mul_(1 + torch.rand(module.gate_ND.shape))
    assert module.stored is None  # nobody computes with stale codes
    save(model, tmp_path / "new")
    again = moefy.load(tmp_path / "new")
    artefact = read_artefact(tmp_path / "new")
    assert artefact.weights_modified
    gate_ND = sparse_mlps(again)[1].gate_ND
    want = rounded(module.gate_ND, 1, 4, 8)
    assert (gate_ND - want).abs().max() <= 1e-6 * want.abs().max()
    assert torch.equal(artefact.tensors["layers.1.weights.up.codes"], untouched)
    stock = load_dense(Checkpoint.open(tmp_path / "new"))
    assert torch.equal(read_mlp(sites(stock)[1], stock.get_parameter).gate_ND, gate_ND)


@torch.no_grad()
def test_codes_that_no_longer_belong_to_the_weights_are_seen_past_autograd_too(made, tmp_path):
    _, out, _ = made("llama")
    model = moefy.load(out)
    module = sparse_mlps(model)[0]
    module.down_ND.data[0] += 1  # counts for nobody
    save(model, tmp_path / "new")
    again = sparse_mlps(moefy.load(tmp_path / "new"))[0]
    assert (again.down_ND[0] - module.down_ND[0]).abs().max() < 0.5


def test_copies_share_the_codes_and_know_when_theirs_are_stale(made):
    _, out, _ = made("llama")
    model = moefy.load(out)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(sparse_mlps(model)[0]))):
        module = sparse_mlps(other)[0]
        assert module.stored is not None
        assert torch.equal(module.stored.matrix("up").values(), module.up_ND)
        with torch.no_grad():
            module.up_ND.add_(1)
        assert module.stored is None
        for late in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert late.stored is None
            assert copy.deepcopy(late).stored is None
    assert sparse_mlps(model)[0].stored is not None
    assert sparse_mlps(model.to(torch.float64))[0].stored is not None


def test_an_adapter_refuses_changed_weights(made, tmp_path):
    _, out, _ = made("llama", adapter=True)
    model = moefy.load(out)
    with torch.no_grad():
        sparse_mlps(model)[0].up_ND.mul_(2)
    with pytest.raises(MoefyError, match="has changed"):
        save(model, tmp_path / "new")


def test_revert_refuses(made, tmp_path):
    _, out, _ = made("llama")
    with pytest.raises(MoefyError, match="rounded to 4 bits"):
        revert(out, tmp_path / "source")


def test_a_running_dtype_narrower_than_the_files_changes_no_byte(made, tmp_path):
    _, out, _ = made("llama")
    model = moefy.load(out, dtype=torch.bfloat16)
    codes = sparse_mlps(model)[0].stored
    assert torch.equal(codes.matrix("up").values(torch.bfloat16), sparse_mlps(model)[0].up_ND)
    save(model, tmp_path / "new")
    assert sha256(tmp_path / "new" / SIDE) == sha256(out / SIDE)


@torch.no_grad()
def test_values_are_not_rounded_twice(tmp_path):
    """Weight files in bf16 hold the values to 8 bits; what is loaded in fp32 is made of the codes."""
    source = build("llama", tmp_path / "source", dtype=torch.bfloat16)
    convert_tiny("llama", source, tmp_path / "out", settings=BITS)
    convert_tiny("llama", source, tmp_path / "streamed", settings=BITS, stream=True)
    for out in (tmp_path / "out", tmp_path / "streamed"):
        module = sparse_mlps(moefy.load(out, dtype=torch.float32))[0]
        values = module.stored.matrix("up").values()
        assert torch.equal(module.up_ND, values)
        assert not torch.equal(values, values.bfloat16().float())
        stock = load_dense(Checkpoint.open(out), dtype=torch.float32)
        plain = read_mlp(sites(stock)[0], stock.get_parameter).up_ND
        assert torch.equal(plain, values.bfloat16().float())


def test_weights_that_lie_on_the_grid_stay_what_they_are(tmp_path):
    """A second conversion, with 16-bit scales and neurons where they were, rounds nothing."""
    source = build("llama", tmp_path / "source")
    single = {**BITS, "storage.scales": 16, "partition.expert_size": 1, "router.name": "largest_inputs",
              "compensation.name": "none"}  # fmt: skip
    convert_tiny("llama", source, tmp_path / "one", settings=single)
    moefy.export(tmp_path / "one", tmp_path / "dense", to="dense")
    record = convert_tiny("llama", tmp_path / "dense", tmp_path / "two", settings=single)
    first, second = load_file(tmp_path / "one" / SIDE), load_file(tmp_path / "two" / SIDE)
    for name in first:
        if name.endswith(".codes"):
            assert torch.equal(first[name], second[name]), name
    assert record["conversion"]["rounding_kl"] < 1e-9


@torch.no_grad()
def test_offloaded_layers_compute_with_the_codes(tmp_path):
    source = build("llama", tmp_path / "source", dtype=torch.bfloat16)
    convert_tiny("llama", source, tmp_path / "out", settings=BITS)
    folder, inputs = tmp_path / "offload", example_inputs("llama")
    here = moefy.load(tmp_path / "out", dtype=torch.float32)
    away = moefy.load(
        tmp_path / "out", dtype=torch.float32, device_map={"": "disk"}, offload_folder=folder
    )
    with all_experts(here), all_experts(away):
        want, got = here(**inputs).logits, away(**inputs).logits
    # Weight files in bf16 would be off by thousandths.
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()
    while_it_runs = []
    module = sparse_mlps(away)[0]
    module.router.register_forward_pre_hook(lambda *_: while_it_runs.append(module.stored))
    away(**inputs)
    assert while_it_runs == [module.stored] and module.stored is not None


def test_evaluation_says_what_it_compares_with(made):
    _, out, records = made("llama")
    record = evaluate(out, corpus=[[5, 6, 7, 8, 9, 10] * 4] * 12, quiet=True)
    assert "rounded to 4 bits" in record["dense"]
    assert record["rounding_kl"] == records["conversion"]["rounding_kl"]


MUTATIONS = {
    "swapped neurons": lambda m: m.take(torch.arange(m.neurons).roll(1)),
    "another size": lambda m: replace(m, down_ND=m.down_ND * 1.05),
}


@pytest.mark.parametrize("how", MUTATIONS)
@pytest.mark.parametrize("stream", [False, True])
def test_verification_sees_codes_that_are_not_the_sources(how, stream, tmp_path, monkeypatch):
    from moefy.conversion import layer
    from moefy.models.mlp import DenseMlp

    source, plain = build("llama", tmp_path / "source"), layer.fit_layer

    def wrong(mlp, *args, **kwargs):
        whole = DenseMlp.quantised
        monkeypatch.setattr(DenseMlp, "quantised", lambda m, b, s: whole(MUTATIONS[how](m), b, s))
        try:
            return plain(mlp, *args, **kwargs)
        finally:
            monkeypatch.setattr(DenseMlp, "quantised", whole)

    for room in ("moefy.conversion.in_memory", "moefy.conversion.streamed.passes"):
        monkeypatch.setattr(f"{room}.fit_layer", wrong)
    with pytest.raises(MoefyError, match="verification failed"):
        convert_tiny("llama", source, tmp_path / "out", settings=BITS, stream=stream)


UP, GATE = "layers.0.weights.up", "layers.0.weights.gate"


def without_gate(tensors):
    for name in [name for name in tensors if name.startswith(GATE)]:
        del tensors[name]


DAMAGE = {
    "missing": (lambda t: t.pop(f"{UP}.scale"), "is missing"),
    "unknown": (lambda t: t.update({f"{UP}.side": t[f"{UP}.codes"].clone()}), "belongs to no"),
    "no gate": (without_gate, "gate.codes is missing"),
    "a plane less": (lambda t: t.update({f"{UP}.codes": t[f"{UP}.codes"][:3].clone()}), "must be"),
    "wide": (lambda t: t.update({f"{UP}.scale": t[f"{UP}.scale"].float()}), "must be"),
    "below zero": (lambda t: t[f"{UP}.most"].neg_(), "below zero"),
    "not finite": (lambda t: t[f"{UP}.most"].fill_(torch.nan), "NaN"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_codes_are_refused_in_one_line(made, how, tmp_path):
    _, out, _ = made("llama", adapter=True)
    folder, (change, message) = tmp_path / "copy", DAMAGE[how]
    moefy.load(out).save_pretrained(folder)
    tensors = {n: t.clone() for n, t in load_file(folder / SIDE).items()}
    change(tensors)
    save_file(tensors, folder / SIDE)
    rehash(folder)
    with pytest.raises(CheckpointError, match=message):
        moefy.load(folder)


@pytest.mark.parametrize("storage", [{"bits": 9, "scales": 8}, {"bits": 4, "scales": 12}, {"bits": 4}, 4,
                                     {"bits": 4, "scales": 8, "groups": 32}, {"bits": "4", "scales": 8}])  # fmt: skip
def test_entries_that_say_something_else_are_refused(made, storage, tmp_path):
    _, out, _ = made("llama", adapter=True)
    folder = tmp_path / "copy"
    moefy.load(out).save_pretrained(folder)
    meta = json.loads((folder / META).read_text())
    meta["layers"][0]["storage"] = storage
    (folder / META).write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match="storage"):
        moefy.load(folder)


def test_sixteen_bits_leave_no_trace(tmp_path):
    source = build("llama", tmp_path / "source")
    convert_tiny("llama", source, tmp_path / "out")
    text = (tmp_path / "out" / META).read_text()
    assert "storage" not in text
    assert not any(".weights." in name for name in load_file(tmp_path / "out" / SIDE))
    assert "storage" not in recipes.to_dict(RECIPE)
    four = recipes.override(RECIPE, BITS)
    assert recipes.from_dict(recipes.to_dict(four)) == four


@pytest.mark.parametrize("settings", [{"storage.bits": 5}, {"storage.scales": 4}])
def test_other_numbers_of_bits_are_refused(settings):
    with pytest.raises(MoefyError, match="must be one of"):
        recipes.override(RECIPE, settings)


def test_a_lora_adapter_of_mlps_is_refused_and_one_of_attention_merged(made, tmp_path):
    source, out, _ = made("llama")
    for name, targets in {"mlp": ["up_proj"], "attention": ["q_proj"]}.items():
        base = load_dense(Checkpoint.open(source))
        config = peft.LoraConfig(target_modules=targets, init_lora_weights=False)
        peft.get_peft_model(base, config).save_pretrained(tmp_path / name)
        file = tmp_path / name / "adapter_config.json"
        named = json.loads(file.read_text()) | {"base_model_name_or_path": str(source)}
        file.write_text(json.dumps(named))
    with pytest.raises(MoefyError, match="holds them in 4 bits"):
        moefy.load(out, adapter=tmp_path / "mlp")
    module = sparse_mlps(moefy.load(out, adapter=tmp_path / "attention"))[0]
    assert torch.equal(module.stored.matrix("up").values(), module.up_ND)


def test_pruning_a_rounded_adapter_is_refused(made, tmp_path):
    _, out, _ = made("llama", adapter=True)
    with pytest.raises(MoefyError, match="prune the base"):
        moefy.prune(out, tmp_path / "pruned", forget="d0", quiet=True)


@pytest.mark.parametrize("form", ["full", "adapter"])
@torch.no_grad()
def test_exports_hold_the_values(made, form, tmp_path):
    source, out, _ = made("llama", **({"adapter": True} if form == "adapter" else {}))
    moefy.export(out, tmp_path / "dense", to="dense")
    stock, model = load_dense(Checkpoint.open(tmp_path / "dense")), moefy.load(out)
    for site, module in zip(sites(stock), sparse_mlps(model).values(), strict=True):
        plain = read_mlp(site, stock.get_parameter)
        assert torch.equal(plain.down_ND, module.down_ND)
        assert torch.equal(plain.gate_ND, module.gate_ND)
    settings = {**BITS, "selection.name": "softmax_topk", "compensation.name": "none"}
    options = {"adapter": True} if form == "adapter" else {}
    convert_tiny("llama", source, tmp_path / "linear", settings=settings, **options)
    # The export compares itself with moefy's own model, and refuses what is another function.
    moefy.export(tmp_path / "linear", tmp_path / "mixtral", to="mixtral")


def test_the_card_says_what_is_rounded(made):
    _, out, records = made("llama")
    card = " ".join((out / "README.md").read_text().split())
    assert "rounded to 4 bits (8-bit scales and offsets for 32)" in card
    assert f"Rounding alone costs KL {records['conversion']['rounding_kl']:.4f}" in card
