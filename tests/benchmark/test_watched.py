"""Whether a bench tells rounding, which swaps experts where a router cuts, from engines that are wrong."""

import sys
from dataclasses import replace

import pytest
import torch
from tiny_conversion import convert_tiny
from tiny_models import build
from torch import nn

from moefy.benchmark import checks
from moefy.benchmark.checks import (
    check_layers,
    checked,
    compare,
    exact,
    no_copy,
    recording,
    widened,
)
from moefy.benchmark.engines import choose
from moefy.benchmark.engines import mlp as dense_mlp
from moefy.benchmark.engines.base import Models, Unavailable
from moefy.benchmark.layers import Prompt
from moefy.benchmark.levels import Sweep
from moefy.benchmark.levels.model import bench_model
from moefy.experts.backends import BACKENDS
from moefy.experts.loading import load, load_dense
from moefy.experts.sparse_mlp import sparse_mlps, use_backend
from moefy.methods.tables import SELECTIONS
from moefy.models.checkpoint import Checkpoint
from moefy.models.mlp import DenseMlp, activation_function
from moefy_kernels import masked_mlp

DTYPES = (torch.float32, torch.bfloat16)
IDS = torch.arange(3, 27).view(2, 12)


def layer(dtype, width, neurons, activation="silu", gated=True):
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return (torch.randn(*size, generator=generator) / size[-1] ** 0.5).to(dtype)

    return DenseMlp(
        gate_ND=random(neurons, width) if gated else None,
        up_ND=random(neurons, width),
        down_ND=random(neurons, width),
        up_bias_N=None if gated else random(neurons),
        down_bias_D=random(width),
        activation=activation,
    )


def tokens(dtype, width, count=5):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(("width", "neurons"), [(16, 32), (768, 2048)])
@pytest.mark.parametrize(("activation", "gated"), [("silu", True), ("relu", False)])
def test_stock_dense_torch_is_within_the_bound(dtype, width, neurons, activation, gated):
    mlp, x = layer(dtype, width, neurons, activation, gated), tokens(dtype, width)
    want = exact(mlp, x, torch.ones(len(x), 1, dtype=torch.bool))
    act = activation_function(activation)
    got = dense_mlp(
        x, act, mlp.up_ND, mlp.gate_ND, mlp.down_ND.T, mlp.up_bias_N, None, mlp.down_bias_D
    )
    assert checked(got, want) < 0.02
    # The bound is no wider than a bound has to be: a thousandth of the output in fp32.
    share = float((want.bound_T / want.y_TD.norm(dim=1)).max())
    assert share < {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.2}[dtype]


def test_the_exact_output_is_that_of_the_formula():
    mlp, x = layer(torch.float32, 16, 32), tokens(torch.float32, 16)
    mask = torch.rand(5, 8, generator=torch.Generator().manual_seed(2)) < 0.4
    wide = mlp.to(torch.float64)
    h = wide.hidden(x.double()) * mask.repeat_interleave(4, 1)
    extra = torch.ones(5, 16)
    want = h @ wide.down_ND + wide.down_bias_D + 1
    torch.testing.assert_close(exact(mlp, x, mask, extra).y_TD, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["masked", "views", "native"])
def test_backends_are_within_the_bound_and_faults_are_not(dtype, name):
    mlp, x = layer(dtype, 64, 1024), tokens(dtype, 64, 6)
    mask = torch.rand(6, 16, generator=torch.Generator().manual_seed(2)) < 0.4
    want = exact(mlp, x, mask)
    run = BACKENDS[name].compute
    got = run(x, mlp, mask)
    checked(got, want)
    dropped = got.clone()
    dropped[-1] = 0
    swapped = mask.clone()
    swapped[2] = swapped[2].roll(1)  # of one token alone
    for wrong in (torch.zeros_like(got), dropped, run(x, mlp, swapped), got * torch.nan):
        with pytest.raises(Unavailable, match="computes something else: relative error"):
            checked(wrong, want)


class Sharp(nn.Module):
    """A router made to cut: the last digit of an input decides which experts run."""

    computes_gate, reads_input_alone = False, False

    def __init__(self, experts):
        super().__init__()
        self.register_buffer("turn_E", torch.arange(1.0, experts + 1))

    def forward(self, x, _):
        return torch.sin(x.double().sum(1, keepdim=True) * 1e4 * self.turn_E)

    def weights_read(self, _):
        return 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    source = build("llama", folder / "source")
    settings = {"selection.name": "topk", "compensation.name": "none"}
    convert_tiny("llama", source, folder / "out", settings=settings)
    return folder


def moefied(folder, dtype=torch.float32, *, sharp=False):
    model = load(folder / "out", dtype=dtype)
    for module in sparse_mlps(model).values():
        if sharp:
            module.router = Sharp(module.experts - module.shared)
    return model


def dense(folder, dtype):
    return load_dense(Checkpoint.open(folder / "source"), dtype=dtype)


def ran(model, run=None):
    with torch.no_grad(), recording(model) as seen:
        for ids in (IDS, IDS[:, :1]):
            (model if run is None else run)(ids)
            seen.next_pass()
    return seen.passes


def rolled(x, weights, mask):
    return masked_mlp(x, weights, mask.roll(1, 1))


def zeros(x, weights, mask):
    return torch.zeros_like(masked_mlp(x, weights, mask))


def dropped(x, weights, mask):
    y = masked_mlp(x, weights, mask)
    return torch.cat([torch.zeros_like(y[:1]), y[1:]])


@pytest.fixture(params=[rolled, zeros, dropped], ids=lambda f: f.__name__)
def wrong(request, monkeypatch):
    monkeypatch.setitem(BACKENDS, "wrong", replace(BACKENDS["masked"], compute=request.param))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sharp", [False, True])
def test_layers_are_checked_on_their_own_input(folder, dtype, sharp):
    model = moefied(folder, dtype, sharp=sharp)
    own = [module.selection for module in sparse_mlps(model).values()]
    for name in ("masked", "views", "native", "auto"):
        use_backend(model, name)
        assert check_layers(model, ran(model)) < 0.05
    assert [module.selection for module in sparse_mlps(model).values()] == own
    assert not any("forward" in vars(module) for module in sparse_mlps(model).values())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_engines_are_refused_also_in_a_graph(folder, dtype, compiled, wrong):
    model = moefied(folder, dtype)
    torch.compiler.reset()
    # Traced like any graph; what inductor would make of it takes a minute.
    run = torch.compile(model, backend="eager", dynamic=False) if compiled else model
    use_backend(model, "masked")
    check_layers(model, ran(model, run))
    use_backend(model, "wrong")
    with pytest.raises(Unavailable, match="layer 0 computes something else"):
        check_layers(model, ran(model, run))


def test_what_a_router_would_not_choose_is_refused_and_what_rounding_flips_is_not(folder):
    model = moefied(folder)
    passes = ran(model)
    check_layers(model, passes)
    first = passes[0][0]
    first.mask_TE[0] = first.mask_TE[0].roll(1)
    with pytest.raises(Unavailable, match="chooses experts that its router does not: 1 of"):
        checks._check_choice(sparse_mlps(model)[0], first, first)
    # Of two experts whose scores tie, sums in another order choose the other one.
    module = sparse_mlps(model)[0]
    module.selection = SELECTIONS["topk"](k=1)
    module.router.weight.data[1] = module.router.weight.data[0]
    module.router.weight.data[0] *= 1 + 1e-7
    (first, *_), *_ = ran(model)
    top = first.mask_TE[:, 0] | first.mask_TE[:, 1]
    assert bool(top.any())
    first.mask_TE[top] = first.mask_TE[top][:, [1, 0, *range(2, first.mask_TE.shape[1])]]
    checks._check_choice(module, first, first)


def bench(folder, dtype, *engines, sharp=False, **variants):
    model = moefied(folder, dtype, sharp=sharp)
    sweep = Sweep(engines=choose(engines, **variants), samples=5)
    given = Prompt(IDS.repeat(1, 2), "ids")
    return bench_model(Models(dense(folder, dtype), model), given, sweep, what="tiny", generated=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_engines_pass_though_the_router_cuts(folder, monkeypatch, dtype):
    """Here no two engines choose alike behind the first layer, and swapped experts are seen all the same."""
    monkeypatch.setattr("moefy.benchmark.costs.BYTES", 4 << 20)
    monkeypatch.setitem(BACKENDS, "wrong", replace(BACKENDS["masked"], compute=rolled))
    right = ("eager", "masked", "views", "native", "auto")
    record = bench(folder, dtype, *right, "wrong", sharp=True, linears=True)
    for cell in record["cells"]:
        assert set(cell["engines"]) == {*right, *(f"{name}+linears" for name in right)}
        assert "layer 0 computes something else" in cell["refused"]["wrong"]
        assert cell["rounding"]["why_not"] == ""
        assert cell["engines"]["native"]["kl"]["median"] <= cell["rounding"]["allowed"]


def test_faults_between_the_layers_are_seen_in_the_logits(folder, monkeypatch):
    monkeypatch.setattr("moefy.benchmark.costs.BYTES", 4 << 20)
    real = torch.nn.functional.linear
    monkeypatch.setattr(
        sys.modules["moefy.experts.backends.cpu"], "linear", lambda *a: real(*a).roll(1, -1)
    )
    record = bench(folder, torch.bfloat16, "auto", linears=True)
    for cell in record["cells"]:
        assert set(cell["engines"]) == {"eager", "auto"}
        assert "computes something else: KL" in cell["refused"]["auto+linears"]
        assert "computes something else: KL" in cell["refused"]["eager+linears"]


def test_without_memory_for_a_copy_layers_decide_and_the_record_says_so(folder, monkeypatch):
    monkeypatch.setattr("moefy.benchmark.costs.BYTES", 4 << 20)
    monkeypatch.setattr("moefy.benchmark.checks.free_memory", lambda: 1000)
    cell = bench(folder, torch.bfloat16, "masked")["cells"][0]
    assert set(cell["engines"]) == {"eager", "masked"}
    assert "an fp32 copy takes" in cell["rounding"]["why_not"]
    assert cell["rounding"]["dense"] is None


def test_a_widened_model_computes_in_fp32_and_gets_its_tensors_back(folder):
    model = moefied(folder, torch.bfloat16)
    assert no_copy(model) == ""
    held = {name: value.data_ptr() for name, value in model.named_parameters()}
    with torch.no_grad():
        before = model(IDS).logits
        with widened(model):
            wide = model(IDS).logits
        assert torch.equal(model(IDS).logits, before)
    assert (wide.dtype, before.dtype) == (torch.float32, torch.bfloat16)
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == held


def test_the_kl_is_that_of_the_definition():
    got, want = torch.randn(2, 3, 2, 7, generator=torch.Generator().manual_seed(0))
    p, q = want.double().softmax(-1), got.double().softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    found = compare(got, want)
    assert found.mean == pytest.approx(float(kl.mean()))
    assert found.largest == pytest.approx(float(kl.max()))
    assert compare(want, want).largest == 0
