import copy
import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_conversion import RECIPE, convert_tiny, corpus_for
from tiny_models import FAMILIES_TINY, SEARCHED_TINY, build, example_inputs, tiny_model
from torch import nn
from torch.nn.functional import linear
from transformers import AutoConfig, DynamicCache

import moefy
from moefy.conversion.fit import MEASURED, LayerTokens, fit_router
from moefy.conversion.plan import describe, plan
from moefy.data.corpus import load_corpus, make_batches
from moefy.data.inputs import read_batches
from moefy.errors import CheckpointError, MoefyError, RecipeError, UnsupportedModel
from moefy.evaluation.evaluate import evaluate
from moefy.evaluation.outputs import values_of
from moefy.experts.loading import load_dense
from moefy.experts.sparse_heads import sparse_heads
from moefy.experts.sparse_mlp import all_experts, sparse_mlps
from moefy.exporting.export import export
from moefy.methods.tables import COMPENSATIONS, ROUTERS
from moefy.models.artefact import read_artefact
from moefy.models.checkpoint import Checkpoint, sha256
from moefy.models.entries import part_of
from moefy.models.heads import head_sites
from moefy.models.library import passing
from moefy.models.locate import meta_model, sites
from moefy.models.mlp import HeadOutputs
from moefy.models.reorder import revert
from moefy.recipe import RouterRecipe, override

DENSE_MLPS = {
    "density": 1.0,
    "partition.method": "contiguous",
    "router.name": "random",
    "compensation.name": "none",
}
HEADS = {**DENSE_MLPS, "attention.density": 0.5, "attention.hidden": 16}
NAMES = ("llama", "gpt2", "opt", "bert", "t5")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Source and conversion of a tiny model with these attention settings, made once."""
    folder, done = tmp_path_factory.mktemp("heads"), {}

    def get(name: str, **attention) -> tuple[Path, Path]:
        key = f"{name}-{attention}"
        if key not in done:
            source, out = folder / name, folder / f"out{len(done)}"
            if not source.exists():
                build(name, source)
            settings = {f"attention.{k}": v for k, v in attention.items()}
            convert_tiny(name, source, out, settings={**HEADS, **settings})
            done[key] = (source, out)
        return done[key]

    return get


@torch.no_grad()
def run(model, inputs):
    return values_of(model, model(**inputs))


def naive(source: Path, out: Path, *, rolled: int = 0):
    """The stock model in fp64 whose output projections see zeros for heads that are off.

    Written from the definition, token by token and head by head; `rolled` switches the wrong heads.
    """
    model = load_dense(Checkpoint.open(source), dtype=torch.float64)
    artefact = read_artefact(out)
    modules = dict(model.named_modules())
    for index, (entry, site) in enumerate(zip(artefact.heads, head_sites(model), strict=True)):
        tensors = artefact.tensors_of(index, "heads")
        router = {k: v.double() for k, v in part_of(tensors, "router").items()}
        means = tensors.get("compensation.mean_ED")
        seen = {}

        def before(_, args, kwargs, seen=seen):
            seen["x"] = (args[0] if args else kwargs["hidden_states"]).double()

        def mask(_, args, router=router, entry=entry, seen=seen):
            z, size = args[0].clone(), entry.heads // entry.experts * entry.head_dim
            flat, x = z.view(-1, entry.experts * size), seen["x"].reshape(-1, entry.width)
            seen["off"] = []
            for t in range(len(flat)):
                hidden = linear(x[t], router["hidden.weight"], router["hidden.bias"]).relu()
                scores = linear(hidden, router["output.weight"], router["output.bias"])
                best = sorted(range(entry.experts), key=lambda e: -scores[e].item())
                off = [(e + rolled) % entry.experts for e in best[entry.selection["k"] :]]
                for e in off:
                    flat[t, e * size : (e + 1) * size] = 0
                seen["off"].append(off)
            return (z,)

        def add(_, args, y, means=means, seen=seen):
            if means is None:
                return y
            y = y.clone()
            rows = y.view(-1, y.shape[-1])
            for t, off in enumerate(seen["off"]):
                for e in off:
                    rows[t] += means[e].double()
            return y

        modules[site.block].register_forward_pre_hook(before, with_kwargs=True)
        modules[site.projection].register_forward_pre_hook(mask)
        modules[site.projection].register_forward_hook(add)
    return model


@pytest.mark.parametrize("compensation", ["none", "conditional_mean"])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_stock_model_with_heads_zeroed(name, compensation, made):
    source, out = made(name, compensation=compensation)
    inputs = example_inputs(name)
    got = run(moefy.load(out, dtype=torch.float64), inputs)
    want = run(naive(source, out), inputs)
    # Means are added in fp32, and llama's and T5's norms are computed in it.
    exact = compensation == "none" and name not in ("llama", "t5")
    assert (got - want).abs().max() < (1e-9 if exact else 2e-5)
    assert (run(naive(source, out, rolled=1), inputs) - want).abs().max() > 1e-2
    dense = run(load_dense(Checkpoint.open(source), dtype=torch.float64), inputs)
    assert (want - dense).abs().max() > 1e-2


def test_groups_of_heads_that_share_keys(made):
    source, out = made("llama", group="kv", compensation="conditional_mean")
    entry = read_artefact(out).heads[0]
    assert (entry.heads, entry.experts, entry.selection["k"]) == (4, 2, 1)
    inputs = example_inputs("llama")
    want = run(naive(source, out), inputs)
    assert (run(moefy.load(out, dtype=torch.float64), inputs) - want).abs().max() < 2e-5
    assert (run(naive(source, out, rolled=1), inputs) - want).abs().max() > 1e-2


@pytest.mark.parametrize("compensation", [n for n, c in COMPENSATIONS.items() if not c.centres])
def test_every_head_on_is_the_dense_model_with_any_compensation(compensation, made):
    source, out = made("opt", compensation=compensation)
    model = moefy.load(out, dtype=torch.float64)
    inputs = example_inputs("opt")
    dense = run(load_dense(Checkpoint.open(source), dtype=torch.float64), inputs)
    with all_experts(model):
        assert (run(model, inputs) - dense).abs().max() < 1e-9
    assert (run(model, inputs) - dense).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_every_head_on_is_the_dense_model_of_other_families(name, made):
    source, out = made(name, compensation="conditional_mean")
    model, dense = (
        moefy.load(out, dtype=torch.float64),
        load_dense(Checkpoint.open(source), dtype=torch.float64),
    )
    inputs = example_inputs(name)
    with all_experts(model):
        assert (run(model, inputs) - run(dense, inputs)).abs().max() < 1e-9
    assert not any(module.all_on for module in sparse_heads(model).values())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_decoding_with_a_cache_is_the_whole_pass(name, made):
    _, out = made(name, compensation="conditional_mean")
    model = moefy.load(out, dtype=torch.float64)
    ids = example_inputs(name)["input_ids"][:1]
    whole = model(input_ids=ids, use_cache=False).logits
    cache, steps = passing(model, DynamicCache(config=model.config)), []
    for piece in (ids[:, :5], *ids[:, 5:].split(1, 1)):
        result = model(input_ids=piece, use_cache=True, **cache)
        steps.append(result.logits)
    assert (torch.cat(steps, 1) - whole).abs().max() < 2e-5
    for batch in (ids, example_inputs(name)["input_ids"][:, :6]):
        options = {
            "do_sample": False,
            "max_new_tokens": 8,
            "attention_mask": torch.ones_like(batch),
        }
        cached = model.generate(batch, use_cache=True, **options)
        assert torch.equal(cached, model.generate(batch, use_cache=False, **options))


@torch.no_grad()
def test_an_encoder_decoder_decodes_with_a_cache(made):
    _, out = made("t5", compensation="conditional_mean")
    model = moefy.load(out, dtype=torch.float64)
    blocks = [site.block.rpartition(".")[2] for site in model.moefy.heads]
    assert blocks == ["SelfAttention"] * 3 + ["EncDecAttention", "SelfAttention", "EncDecAttention"]
    inputs = {k: v for k, v in example_inputs("t5").items() if k != "decoder_input_ids"}
    model.generation_config.decoder_start_token_id = 0
    options = {"do_sample": False, "max_new_tokens": 8, "num_beams": 2}
    cached = model.generate(**inputs, use_cache=True, **options)
    assert torch.equal(cached, model.generate(**inputs, use_cache=False, **options))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padding_changes_nothing(name, made):
    _, out = made(name, compensation="conditional_mean")
    model = moefy.load(out, dtype=torch.float64)
    inputs = example_inputs(name)
    padded = run(model, inputs)[1, :8]
    alone = run(model, {"input_ids": inputs["input_ids"][1:, :8]})[0]
    assert (padded - alone).abs().max() < 2e-5


def test_a_copy_routes_by_itself_and_gradients_pass(made):
    _, out = made("llama", compensation="conditional_mean")
    model, inputs = moefy.load(out), example_inputs("llama")
    want = run(model, inputs)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        sparse_heads(model)[0].router.output.bias.add_(torch.tensor([9.0, 0.0, 0.0, -9.0]))
    assert torch.equal(run(copied, inputs), want)
    assert not torch.equal(run(model, inputs), want)

    model.train()
    model.gradient_checkpointing_enable()
    model(**inputs, use_cache=False).logits.sum().backward()
    for site in model.moefy.heads:
        assert model.get_submodule(site.projection).weight.grad.abs().sum() > 0
    with pytest.raises(MoefyError, match="without its attention module"):
        sparse_heads(model)[0](torch.zeros(1, 1, 32))


def test_head_density_and_budget_count_real_tokens(made):
    source, out = made("llama", compensation="residual", selection="threshold", rank=4)
    model = moefy.load(out)
    batches = read_batches(Checkpoint.open(source), "decoder", load_corpus(corpus_for("llama")), 32)
    record = evaluate(model, batches)
    assert record["ffn_density"] == 1.0

    ran = [[] for _ in range(2)]
    for index, module in sparse_heads(model).items():
        module.observer = lambda _, mask_TE, index=index: ran[index].append(mask_TE)
    for sample in (sample for batch in batches for sample in batch.samples):
        run(model, make_batches([sample])[0].inputs)
    shares = [torch.cat(masks).double().mean().item() for masks in ran]
    assert record["head_density_by_block"]["all"] == pytest.approx(shares, abs=1e-4)
    assert record["head_density"] == pytest.approx(sum(shares) / 2, abs=1e-4)
    assert 0.3 < record["head_density"] < 0.7

    read = whole = 0.0
    for block, share in zip([layer.self_attn for layer in model.model.layers], shares, strict=True):
        q, k, v, o = (getattr(block, f"{n}_proj").weight.numel() for n in "qkvo")
        parts = block.o_proj
        extra = sum(p.numel() for m in (parts.router, parts.compensation) for p in m.parameters())
        read += share * (q + o) + k + v + extra
        whole += q + k + v + o
    assert record["attention_budget"] == pytest.approx(read / whole, rel=1e-4)

    with all_experts(model):
        assert all(module.mask(torch.randn(3, 32)).all() for module in sparse_heads(model).values())
    plain = evaluate(moefy.load(out), batches)
    assert "head_density" in plain and "attention_budget" in plain


def test_without_routed_heads_nothing_is_different(tmp_path):
    source = build("opt", tmp_path / "source")
    record = convert_tiny("opt", source, tmp_path / "out")
    assert record["conversion"]["head_routers"] == []
    assert not {name for name in record["evaluation"] if "head" in name or "attention" in name}
    model = moefy.load(tmp_path / "out")
    assert sparse_heads(model) == {} and len(sparse_mlps(model)) == 2
    assert read_artefact(tmp_path / "out").heads == []

    # What an earlier moefy wrote has no such field.
    meta = tmp_path / "out" / "moefy.json"
    old = {k: v for k, v in json.loads(meta.read_text()).items() if k != "heads"}
    meta.write_text(json.dumps({**old, "format": 2}))
    assert sparse_heads(moefy.load(tmp_path / "out")) == {}


def test_saved_and_loaded_again_byte_for_byte(made, tmp_path):
    source, out = made("gpt2", compensation="mean_residual")
    moefy.load(out).save_pretrained(tmp_path / "again")
    for name in ("moefy.json", "moefy.safetensors", "model.safetensors"):
        assert sha256(out / name) == sha256(tmp_path / "again" / name)
    revert(out, tmp_path / "back")
    assert sha256(source / "model.safetensors") == sha256(tmp_path / "back" / "model.safetensors")
    stock = tiny_model("gpt2").auto.from_pretrained(out).eval()
    want = tiny_model("gpt2").auto.from_pretrained(source).eval()
    assert torch.allclose(
        run(stock, example_inputs("gpt2")), run(want, example_inputs("gpt2")), atol=1e-5
    )


def test_trained_routing_of_heads_is_saved(made, tmp_path):
    _, out = made("gpt2", compensation="mean_residual")
    model = moefy.load(out)
    with torch.no_grad():
        sparse_heads(model)[1].router.output.bias.add_(torch.tensor([5.0, -5.0]))
    model.save_pretrained(tmp_path / "again")
    inputs = example_inputs("gpt2")
    assert torch.equal(run(moefy.load(tmp_path / "again"), inputs), run(model, inputs))
    assert not torch.equal(run(moefy.load(out), inputs), run(model, inputs))
    assert not read_artefact(tmp_path / "again").weights_modified


def test_the_same_seed_gives_the_same_bytes_and_an_adapter_the_same_routing(made, tmp_path):
    source, out = made("llama", compensation="conditional_mean")
    settings = {**HEADS, "attention.compensation": "conditional_mean"}
    convert_tiny("llama", source, tmp_path / "again", settings=settings)
    convert_tiny("llama", source, tmp_path / "adapter", settings=settings, adapter=True)
    for name in ("moefy.json", "moefy.safetensors"):
        assert sha256(out / name) == sha256(tmp_path / "again" / name)
    inputs = example_inputs("llama")
    got = run(moefy.load(tmp_path / "adapter"), inputs)
    assert torch.equal(got, run(moefy.load(out), inputs))


def test_strict_reading(made, tmp_path):
    _, out = made("gpt2", compensation="mean_residual")
    moefy.load(out).save_pretrained(tmp_path / "copy")
    meta, side = tmp_path / "copy" / "moefy.json", tmp_path / "copy" / "moefy.safetensors"
    good = meta.read_text()

    def refused(word: str) -> None:
        with pytest.raises(CheckpointError, match=word):
            moefy.load(tmp_path / "copy")

    data = json.loads(good)
    data["heads"][1]["surprise"] = 1
    meta.write_text(json.dumps(data))
    refused(r"heads\[1\]: field 'surprise' is unknown")
    data = json.loads(good)
    del data["heads"][0]["experts"]
    meta.write_text(json.dumps(data))
    refused(r"heads\[0\]: field 'experts' is missing")
    data = json.loads(good)
    data["heads"].pop()
    meta.write_text(json.dumps(data))
    refused(r"heads\.1\..* belongs to no layer")

    tensors = load_file(side)
    del tensors["heads.1.router.hidden.weight"]
    save_file(tensors, side)
    data = json.loads(good)
    data["sha256"]["moefy.safetensors"] = sha256(side)
    meta.write_text(json.dumps(data))
    refused("heads.1.router")


def test_a_stock_export_refuses_routed_heads(tmp_path):
    source = build("llama", tmp_path / "source")
    settings = {
        "attention.density": 0.5,
        "selection.name": "softmax_topk",
        "compensation.name": "none",
    }
    convert_tiny("llama", source, tmp_path / "out", settings=settings)
    with pytest.raises(RecipeError, match=r"attention\.density=0\.5"):
        export(tmp_path / "out", tmp_path / "mixtral", to="mixtral")
    assert not (tmp_path / "mixtral").exists()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"attention.router": "self_gating"}, "self_gating.*choose one of: linear, low_rank"),
        ({"attention.router": "oracle"}, "oracle.*choose one of"),
        ({"attention.selection": "prompt_static"}, "prompt_static.*topk"),
        ({"attention.group": "query"}, "attention.group"),
        ({"attention.density": 0.0}, "attention.density"),
        ({"attention.densty": 0.5}, "attention.densty"),
        ({"attention.compensation": "meen"}, "mean"),
    ],
)
def test_recipes_that_heads_cannot_have(settings, word, tmp_path):
    checkpoint = Checkpoint.open(build("opt", tmp_path / "source"))
    with pytest.raises(RecipeError, match=word):
        plan(checkpoint, override(RECIPE, {"attention.density": 0.5, **settings}), "none")


def test_the_plan_says_what_attention_does(tmp_path):
    checkpoint = Checkpoint.open(build("llama", tmp_path / "source"))
    recipe = override(RECIPE, {"attention.density": "0.5", "attention.group": "kv"})
    text = describe(plan(checkpoint, recipe, "none"), recipe)
    assert "1 of 2 groups of 2 heads run in each of 2 blocks, head density 0.500" in text
    assert "attention" not in describe(plan(checkpoint, RECIPE, "none"), RECIPE)


@pytest.mark.parametrize(
    ("router", "selection"),
    [("linear", "topk"), ("low_rank", "threshold"), ("norm_regression", "dynamic_k"),
     ("static", "topk"), ("random", "top_p")],
)  # fmt: skip
def test_routers_and_selections(router, selection, made):
    source, out = made("opt", router=router, selection=selection)
    batches = read_batches(Checkpoint.open(source), "decoder", load_corpus(corpus_for("opt")), 32)
    model = moefy.load(out)
    assert 0.25 < evaluate(model, batches[:2])["head_density"] < 0.75
    masks = torch.cat([m.mask(torch.randn(64, 32)) for m in sparse_heads(model).values()])
    assert (len(masks.unique(dim=0)) <= 2) == (router == "static")


def test_a_router_learns_which_heads_a_token_needs():
    g = torch.Generator().manual_seed(0)
    x, rows, output = (
        torch.randn(n, m, generator=g) for n, m in ((2048, 16), (4, 16), (4 * 8, 16))
    )
    # Head h puts out much where row h of the input says so, and its first number alone counts.
    z = (x @ rows.T).relu().repeat_interleave(8, 1) * torch.tensor([1.0] + [0.0] * 7).repeat(4)
    heads = HeadOutputs.behind(output)
    captured = {}
    for name in ("linear", "random"):
        router = ROUTERS[name].make(16, 4, 0, {"hidden": 0})
        router.initialise(HeadOutputs.behind(output, z), x, heads)
        fit = fit_router(
            router, heads, LayerTokens(x[:1536], x[:1536], z[:1536]), LayerTokens(x[1536:], x[1536:], z[1536:]),
            experts=4, k=1, recipe=RouterRecipe(batch_size=256), seed=0,
        )  # fmt: skip
        captured[name] = fit.captured
    assert captured["linear"] > 0.9 and captured["random"] < 0.7


def test_a_router_that_is_not_fitted_is_measured_on_every_so_many_held_out_tokens():
    g = torch.Generator().manual_seed(0)
    x, z, output = (
        torch.randn(n, m, generator=g) for n, m in ((3 * MEASURED, 16), (3 * MEASURED, 8), (8, 16))
    )
    heads, router = HeadOutputs.behind(output), ROUTERS["random"].make(16, 4, 0, {"hidden": 0})
    router.initialise(HeadOutputs.behind(output, z), x, heads)
    fits = [
        fit_router(
            router, heads, held, held, experts=4, k=2, recipe=RouterRecipe(), seed=0
        )
        for held in (LayerTokens(x, x, z), LayerTokens(x[::3], x[::3], z[::3]))
    ]  # fmt: skip
    assert fits[0] == fits[1] and fits[0].epochs == 0


def test_static_scores_are_those_of_the_heads_that_were_seen():
    g = torch.Generator().manual_seed(0)
    z, output = torch.randn(50, 6, generator=g), torch.randn(6, 5, generator=g)
    heads = HeadOutputs.behind(output, z)
    router = ROUTERS["static"](5, 3)
    router.initialise(heads, torch.zeros(50, 5), heads)
    want = [
        (z[:, 2 * h : 2 * h + 2] @ output[2 * h : 2 * h + 2]).square().sum(1).mean().sqrt()
        for h in range(3)
    ]
    assert torch.allclose(router.score_E, torch.stack(want), rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES_TINY)
def test_every_family_says_where_its_heads_are(name):
    model = meta_model(tiny_model(name).make_config())
    found = head_sites(model)
    assert len(found) == len(sites(model)) * (1.5 if name.startswith("t5") else 1)
    for site in found:
        block = model.get_submodule(site.block)
        # Four projections, separate or fused, and nothing else with two axes.
        weights = [
            m.weight for m in block.modules()
            if hasattr(m, "weight") and m.weight.ndim == 2 and not isinstance(m, nn.Embedding)
        ]  # fmt: skip
        assert sum(weight.numel() for weight in weights) == site.parameters
        assert model.get_submodule(site.projection).weight.shape.numel() == (
            site.neurons * site.width
        )


def test_a_type_without_a_row_is_refused_only_when_heads_are_asked_for(tmp_path):
    name = next(iter(SEARCHED_TINY))
    checkpoint = Checkpoint.open(build(name, tmp_path / "source"))
    assert plan(checkpoint, RECIPE, "none").heads == []
    with pytest.raises(UnsupportedModel, match=rf"{name}: where its attention heads are"):
        plan(checkpoint, override(RECIPE, {"attention.density": 0.5}), "none")


def test_a_config_that_contradicts_the_weights_is_refused():
    config = AutoConfig.for_model("llama", **tiny_model("llama").settings)
    model = meta_model(config)
    model.config.num_attention_heads = 3
    with pytest.raises(UnsupportedModel, match="3 heads"):
        head_sites(model)


def test_the_table_of_the_documentation_is_that_of_the_records(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(str(root / "experiments"))
    table = runpy.run_path(str(root / "experiments" / "heads.py"))["table"]()
    assert table in (root / "docs" / "attention.md").read_text(encoding="utf-8")
