"""Interventions against the stock model in fp64 whose down projections are given other inputs.

Shapes: B documents, T tokens, N neurons in expert order, E experts.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from moefied_models import inputs_for
from scipy.stats import gaussian_kde
from torch import Tensor, nn
from transformers import PreTrainedModel

import moefy
from moefy.errors import MoefyError
from moefy.evaluation.outputs import values_of
from moefy.experts import interventions
from moefy.experts import means as neuron_statistics
from moefy.experts.interventions import ExpertStatistics, expert_pairs, neuron_mask, statistics
from moefy.experts.loading import load_dense, moefied
from moefy.experts.sparse_mlp import all_experts, sparse_mlps
from moefy.models.checkpoint import Checkpoint
from moefy.models.locate import sites

EXACT = ["demo_llama", "demo_opt", "shared", "encoder"]
Edit = Callable[[int, Tensor], Tensor]


@torch.no_grad()
def run(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    return values_of(model, model(**inputs))


def stock(folder: Path, inputs: dict[str, Tensor], edit: Edit) -> Tensor:
    """The dense model that the folder also is, neurons in expert order, each layer's `[B, T, N]`
    edited before the down projection."""
    model = load_dense(Checkpoint.open(folder), dtype=torch.float64)
    shape = inputs["input_ids"].shape
    for site in sites(model):

        def before(_, args, layer=site.index):
            value = edit(layer, args[0].view(*shape, -1))
            return (value.view(args[0].shape),)

        model.get_submodule(site.path("down")).register_forward_pre_hook(before)
    return run(model, inputs)


def masks_of(model: PreTrainedModel, shape: torch.Size) -> dict[int, Tensor]:
    """Filled by the next pass: which neurons ran `[B, T, N]` in every layer."""
    seen: dict[int, Tensor] = {}
    for layer, module in sparse_mlps(model).items():

        def observer(_, mask_TE, layer=layer, size=module.expert_size):
            seen[layer] = mask_TE.repeat_interleave(size, 1).view(*shape, -1)

        module.observer = observer
    return seen


def columns(model: PreTrainedModel, pairs) -> dict[int, list[int]]:
    """Neurons of these experts, by layer, counted out."""
    found: dict[int, list[int]] = {}
    for layer, expert in pairs:
        size = sparse_mlps(model)[layer].expert_size
        found.setdefault(layer, []).extend(range(expert * size, (expert + 1) * size))
    return found


def drawn(model: PreTrainedModel, dense: bool) -> ExpertStatistics:
    """Constants that no neuron shares with another."""
    g = torch.Generator().manual_seed(4)
    sizes = [m.expert_size * m.experts for m in sparse_mlps(model).values()]
    mean, peak = ([torch.randn(n, generator=g) for n in sizes] for _ in range(2))
    return ExpertStatistics(mean, peak, [1] * len(sizes), dense)


@pytest.mark.parametrize("dense", [False, True], ids=["moefied", "dense"])
@pytest.mark.parametrize("mode", interventions.MODES)
@pytest.mark.parametrize("kind", EXACT)
def test_an_ablation_is_the_stock_model_with_other_neurons(kind, mode, dense, load, made):
    model, inputs = load(kind), inputs_for(kind)
    if mode == "resample":
        inputs = {"input_ids": inputs["input_ids"][:, :8]}
    means = drawn(model, dense)
    pairs = [(0, 1), (1, 0), (1, 3)]
    gone, ran = columns(model, pairs), masks_of(model, inputs["input_ids"].shape)

    def edit(layer: int, h: Tensor) -> Tensor:
        h = h if dense else h * ran[layer]
        value = {
            "zero": torch.zeros_like(h),
            "mean": means.mean_LN[layer].double().expand(h.shape),
            "peak": means.peak_LN[layer].double().expand(h.shape),
            "resample": h[[1, 0]],
        }[mode]
        h = h.clone()
        at = gone.get(layer, [])
        h[..., at] = value[..., at]
        return h

    plain = run(model, inputs)
    with all_experts(model) if dense else nullcontext():
        with model.experts(ablate=pairs, mode=mode, means=means):
            got = run(model, inputs)
        want = stock(made(kind), inputs, edit)
        assert (got - want).abs().max() < 1e-6 * want.abs().max()
        unchanged = run(model, inputs)
        assert (unchanged - got).abs().max() > 1e-3 * want.abs().max()
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("kind", EXACT)
def test_ablating_every_expert_removes_the_mlps_and_keeps_their_bias(kind, load, made):
    model, inputs = load(kind), inputs_for(kind)
    modules = sparse_mlps(model)
    every = [(layer, e) for layer, module in modules.items() for e in range(module.experts)]
    want = stock(made(kind), inputs, lambda _, h: torch.zeros_like(h))
    for dense in (False, True):
        with (
            model.experts(ablate=every, mode="zero"),
            all_experts(model) if dense else nullcontext(),
        ):
            assert (run(model, inputs) - want).abs().max() < 1e-9 * want.abs().max()
    assert (run(model, inputs) - want).abs().max() > 1e-3 * want.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["compensated", "centred", "bloom"])
def test_one_layer_by_the_definition(kind, load):
    """`y' = y + sum_j (c_j - r_e h_j) d_j`, whatever is compensated or added besides."""
    model = load(kind)
    module, means = sparse_mlps(model)[1], drawn(model, dense=False)
    x_TD = torch.randn(24, module.weights.width, dtype=torch.float64)
    rest = (torch.randn_like(x_TD),) if kind == "bloom" else ()
    y_TD, mask_TE = module(x_TD[None], *[r[None] for r in rest])[0], module.mask(x_TD)
    h_TN = module.running.hidden(x_TD)
    want_TD = y_TD.clone()
    for token in range(24):
        for j in columns(model, [(1, 2)])[1]:
            runs = mask_TE[token, j // module.expert_size]
            change = means.mean_LN[1][j].double() - (h_TN[token, j] if runs else 0)
            want_TD[token] += change * module.down_ND[j]
    assert mask_TE[:, 2].any() and not mask_TE[:, 2].all()
    with model.experts(ablate=[(1, 2)], means=means):
        got_TD = module(x_TD[None], *[r[None] for r in rest])[0]
    assert (got_TD - want_TD).abs().max() < 1e-6  # compensations add in fp32
    assert (want_TD - y_TD).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["demo_llama", "shared"])
def test_keep_is_to_ablate_the_others_of_the_layers_named(kind, load):
    model, inputs = load(kind), inputs_for(kind)
    count, means = sparse_mlps(model)[1].experts, drawn(model, dense=False)
    with model.experts(keep=[(1, 3), (1, 5)], means=means):
        kept = run(model, inputs)
    others = [(1, e) for e in range(count) if e not in (3, 5)]
    with model.experts(ablate=others, means=means):
        assert torch.equal(run(model, inputs), kept)
    assert not torch.equal(run(model, inputs), kept)


def test_scale_multiplies_what_an_expert_adds(load, made):
    model, inputs = load("demo_opt"), inputs_for("demo_opt")
    ran, columns_of = masks_of(model, inputs["input_ids"].shape), columns(model, [(2, 4)])

    def edit(layer: int, h: Tensor) -> Tensor:
        h = h * ran[layer]
        h[..., columns_of.get(layer, [])] *= -1.5
        return h

    with model.experts(scale={(2, 4): -1.5}):
        got = run(model, inputs)
    want = stock(made("demo_opt"), inputs, edit)
    assert (got - want).abs().max() < 1e-9 * want.abs().max()
    assert (run(model, inputs) - want).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["demo_llama", "shared"])
def test_masks_of_neurons_are_pairs_of_experts(kind, load):
    model, inputs = load(kind), inputs_for(kind)
    pairs = [(0, 1), (1, 0), (1, 2)]
    mask = neuron_mask(model, pairs)
    found = {layer: mask[layer].nonzero().flatten().tolist() for layer in (0, 1)}
    assert found == columns(model, pairs)
    assert sorted(expert_pairs(model, mask)) == pairs
    for way in ("ablate", "keep"):
        with model.experts(**{way: pairs}, mode="zero"):
            want = run(model, inputs)
        for form in (mask, list(mask)):
            with model.experts(**{way: form}, mode="zero"):
                assert torch.equal(run(model, inputs), want)

    single = torch.zeros_like(mask)
    single[1, 5] = True
    with model.experts(ablate=single, mode="zero"):
        got = run(model, inputs)
    down_ND = sparse_mlps(model)[1].down_ND
    with torch.no_grad():
        down_ND[5] = 0
    assert (run(model, inputs) - got).abs().max() < 1e-6
    with pytest.raises(MoefyError, match=r"holds 1 of the .* neurons of expert 0"):
        expert_pairs(model, single)


def test_layers_that_differ_in_their_neurons(load):
    model = load("shared")
    module = sparse_mlps(model)[1]
    half = len(module.up_ND) // 2
    for name in ("up_ND", "down_ND", "gate_ND"):
        setattr(module, name, nn.Parameter(getattr(module, name)[:half].detach()))
    module.experts //= 2
    masks = neuron_mask(model, [(0, 7), (1, 3)])
    assert isinstance(masks, list) and [len(mask) for mask in masks] == [2 * half, half]
    assert expert_pairs(model, masks) == [(0, 7), (1, 3)]
    with pytest.raises(MoefyError, match="layer 1 has experts 0 to 3"):
        neuron_mask(model, [(1, 4)])


def test_nested_contexts_compose_and_all_is_given_back(load):
    model, inputs = load("shared"), inputs_for("shared")
    means = drawn(model, dense=False)
    plain = run(model, inputs)
    with model.experts(ablate=[(0, 1), (1, 2)], means=means):
        want = run(model, inputs)
    with model.experts(ablate=[(0, 1)], means=means):
        outer = run(model, inputs)
        with model.experts(ablate=[(1, 2)], means=means):
            assert torch.equal(run(model, inputs), want)
        with pytest.raises(ZeroDivisionError), model.experts(ablate=[(1, 2)], mode="zero"):
            raise ZeroDivisionError
        assert torch.equal(run(model, inputs), outer)
    assert torch.equal(run(model, inputs), plain)

    # The inner one acts on what the outer one leaves: twice half of a constant.
    halved = ExpertStatistics([m / 2 for m in means.mean_LN], means.peak_LN, [1, 1], False)
    with model.experts(ablate=[(1, 2)], means=halved), model.experts(scale={(1, 2): 2.0}):
        inner = run(model, inputs)
    with model.experts(ablate=[(1, 2)], means=means):
        assert (run(model, inputs) - inner).abs().max() < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("kind", ["demo_llama", "demo_opt", "shared"])
def test_generation_runs_under_an_intervention(kind, load):
    model = load(kind)
    ids = inputs_for(kind)["input_ids"][:, :6]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(ids, **options)
    with model.experts(keep=[(0, 1), (1, 1)], mode="zero"):
        got, own = model.generate(ids, **options), ids
        for _ in range(6):
            own = torch.cat([own, model(own).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, own) and not torch.equal(got, plain)


def test_offloaded_layers(made, load, tmp_path):
    here = load("shared")
    away = load("shared", device_map={"": "disk"}, offload_folder=tmp_path)
    inputs, means = inputs_for("shared"), drawn(here, dense=False)
    with here.experts(ablate=[(0, 1), (1, 6)], means=means):
        want = run(here, inputs)
    with away.experts(ablate=[(0, 1), (1, 6)], means=means):
        assert torch.equal(run(away, inputs), want)
    assert all(m.up_ND.is_meta for m in sparse_mlps(away).values())


@pytest.mark.parametrize("kind", ["demo_opt", "shared", "encoder"])
def test_resampling_takes_the_next_document_with_a_token_there(kind, load, made):
    model = load(kind)
    ids = torch.randint(5, 90, (3, 10), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    gone, ran = columns(model, [(0, 2), (1, 3)]), masks_of(model, ids.shape)
    source = torch.tensor([[1] * 7 + [2] * 3, [2] * 10, [0] * 10])

    def edit(layer: int, h: Tensor) -> Tensor:
        h = h * ran[layer]
        other, at = h[source, torch.arange(10)], gone.get(layer, [])
        h[..., at] = other[..., at]
        return h

    with model.experts(ablate=[(0, 2), (1, 3)], mode="resample"):
        got = run(model, inputs)[mask.bool()]
        for module in sparse_mlps(model).values():
            module.observer = None
        with pytest.raises(MoefyError, match="this batch holds one; batch two"):
            run(model, {"input_ids": ids[:1]})
        mask[2, 7:] = 0
        with pytest.raises(MoefyError, match=r"document 0 .* only one with a token at position 7"):
            run(model, inputs)
        mask[2, 7:] = 1
    want = stock(made(kind), inputs, edit)[mask.bool()]
    assert (got - want).abs().max() < 1e-6 * want.abs().max()


@pytest.mark.parametrize("dense", [False, True], ids=["moefied", "dense"])
@pytest.mark.parametrize("kind", ["demo_opt", "shared", "encoder"])
def test_statistics_are_those_of_the_neurons_that_ran(kind, dense, load, made):
    model, inputs = load(kind), inputs_for(kind)
    ran, seen = masks_of(model, inputs["input_ids"].shape), {}
    keep = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()

    def edit(layer: int, h: Tensor) -> Tensor:
        h = h * ran[layer]
        seen[layer] = h[keep]
        return h

    with all_experts(model) if dense else nullcontext():
        got = statistics(model, [inputs, inputs])
        stock(made(kind), inputs, edit)
    assert got.dense == dense and got.tokens_L == [2 * int(keep.sum())] * len(seen)
    for layer, h_TN in seen.items():
        want = h_TN.mean(0)
        assert (got.mean_LN[layer].double() - want).norm() < 1e-5 * want.norm()
        often_N = (h_TN == 0).sum(0) > len(h_TN) / 2
        assert dense or often_N.any()
        assert (got.peak_LN[layer][often_N] == 0).all()


def test_the_peak_is_where_the_density_is_highest(load):
    g = np.random.default_rng(0)
    tokens = 6000
    values = {
        "normal": g.normal(3.0, 0.5, tokens),
        "skewed": -g.gamma(3.0, 2.0, tokens),
        "two": np.where(g.random(tokens) < 0.7, g.normal(-4, 1, tokens), g.normal(6, 1, tokens)),
        "rest": np.where(g.random(tokens) < 0.6, 0.0, g.normal(2, 1, tokens)),
        "rare": np.where(g.random(tokens) < 0.999, 0.0, 1.0),
        "far": np.where(g.random(tokens) < 0.99, g.normal(0.1, 0.01, tokens), 1e4),
        "one": np.full(tokens, -0.17),
    }
    value_TN = torch.tensor(np.stack(list(values.values()), 1))
    tally = neuron_statistics._Tally()
    for part in value_TN.split(1500):
        places = torch.ones(2, len(part) // 2, dtype=torch.bool)
        assert torch.equal(tally(part, places), part)
    peak = dict(zip(values, tally.peak_N().tolist(), strict=True))
    assert peak["rest"] == peak["rare"] == 0.0
    assert peak["one"] == pytest.approx(-0.17, rel=1e-3)
    for name in ("normal", "skewed", "two"):
        density = gaussian_kde(values[name])
        most = density(np.linspace(values[name].min(), values[name].max(), 800)).max()
        assert density(peak[name])[0] > 0.9 * most, name
    assert peak["far"] == pytest.approx(0.1, abs=0.005)
    mean = tally.mean_N().double()
    assert torch.allclose(mean, value_TN.mean(0), rtol=1e-6)


def test_means_of_the_bundled_corpus_are_measured_once(made, monkeypatch):
    monkeypatch.setattr(interventions, "OWN_TOKENS", 600)
    model = moefy.load(made("demo_llama"), dtype=torch.float32)
    inputs = inputs_for("demo_llama")
    with pytest.warns(UserWarning, match="tokens of the bundled corpus") as said:
        with model.experts(ablate=[(1, 3)]):
            means = run(model, inputs)
        with model.experts(ablate=[(1, 3)], mode="peak"):
            assert not torch.equal(run(model, inputs), means)
    assert len(said) == 1
    # Nested, they are those of the whole model.
    again = moefy.load(made("demo_llama"), dtype=torch.float32)
    outer = again.experts(ablate=[(0, e) for e in range(8)], mode="zero")
    with pytest.warns(UserWarning), outer, again.experts(ablate=[(1, 3)]):
        pass
    first, second = (m.moefy.means[False] for m in (model, again))
    assert all(map(torch.equal, first.mean_LN, second.mean_LN))
    assert first.tokens_L[0] >= 600

    with (
        model.hooks([("blocks.0.mlp.hook_expert_mask", lambda mask, hook: None)]),
        all_experts(model),
        pytest.raises(MoefyError, match="measured without hooks"),
        model.experts(ablate=[(1, 3)]),
    ):
        pass


def test_what_cannot_be_had_is_refused(load, made):
    model, inputs = load("shared"), inputs_for("shared")
    means = drawn(model, dense=True)
    refused = [
        ({"ablate": [(0, 1)], "mode": "meen"}, "unknown mode 'meen'; did you mean 'mean'"),
        ({"ablate": [(2, 0)]}, r"expert \(2, 0\): the model has layers 0 to 1"),
        ({"ablate": [(0, 8)]}, r"expert \(0, 8\): layer 0 has experts 0 to 7"),
        ({"ablate": [(0, 1)], "keep": [(0, 1)]}, "layer 0: ablate and keep"),
        ({"ablate": [(1, 1)], "scale": {(1, 1): 2.0}}, "layer 1: .* both scaled and ablated"),
        ({"ablate": torch.ones(2, 64)}, "the model takes 2 bool masks"),
        ({"ablate": torch.ones(2, 32).bool()}, "the model takes 2 bool masks"),
        ({"ablate": [(0, 1)]}, "no tokenizer.*give means=moefy.experts.interventions.statistics"),
        (
            {"ablate": [(0, 1)], "means": drawn(load("demo_opt"), dense=False)},
            "which is another model",
        ),
    ]
    for arguments, message in refused:
        with pytest.raises(MoefyError, match=message), model.experts(**arguments):
            pass
    with (
        model.experts(ablate=[(0, 1)], means=means),
        pytest.raises(
            MoefyError, match="means measured with all_experts were given to the moefied"
        ),
    ):
        run(model, inputs)
    with pytest.raises(MoefyError, match="no batch"):
        statistics(model, [])
    bare = load_dense(Checkpoint.open(made("demo_opt")), dtype=torch.float32)
    moefied(bare, moefy.load(made("demo_opt")).moefy.artefact, permute=False)
    with pytest.raises(MoefyError, match="not loaded from a folder"), bare.experts(ablate=[(0, 1)]):
        pass
