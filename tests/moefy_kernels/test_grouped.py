"""What the grouped kernels alone do, gradients above all; what others do too: `test_kernel_parity.py`."""

import pytest
import torch
from expert_cases import TF32, TOLERANCE, case, cases, error, far_apart, matrix_units, tf32, views
from hypothesis import given, settings
from hypothesis import strategies as st

from moefy_kernels import reference
from moefy_kernels.configs import analytic, chosen
from moefy_kernels.expert_mlp import ACTIVATIONS, ExpertMlp
from moefy_kernels.grouped import grouped


def run(c, weight=None, most=None):
    return grouped(c.x, c.mlp, c.matrix if weight is None else weight, c.bias, most)


@pytest.fixture
def small_blocks(monkeypatch):
    """Several tiles of every expert and several blocks of every side, of sides of a few dozens."""

    def small(kernel, x, size):
        sides = {"BLOCK_T": 16, "BLOCK_F": 16, "BLOCK_D": 16}
        return {name: sides.get(name, value) for name, value in chosen(kernel, x, size).items()}

    monkeypatch.setattr("moefy_kernels.tiles.SEEN", 16)
    monkeypatch.setattr("moefy_kernels.tiles.chosen", small)
    monkeypatch.setattr("moefy_kernels.grouped_backward.chosen", small)


@settings(deadline=None, max_examples=10)
@given(c=cases(tokens=140))
def test_any_shape_with_a_promise(c):
    assert error(run(c, most=c.expert.shape[1]), c.wanted) < 1e-5


@pytest.mark.parametrize("most", [None, 2])
def test_many_tiles_and_blocks(small_blocks, most):
    c = case(1, 40, 36, 4, 20, 2, biased=True, centred=True)
    assert error(run(c, most=most), c.wanted) < 1e-5


def test_lists_of_every_length():
    c = case(2, 140, 24, 6, 12, 2, biased=True)
    one = torch.zeros(140, 6)
    one[:, 4] = 1.5  # all on one expert, five have none
    none = c.matrix.clone()
    none[[0, 77]] = 0  # tokens without an expert
    for weight in (one, none, torch.zeros(140, 6)):
        wanted = reference.weighted(c.x, c.mlp, weight, c.bias)
        assert error(run(c, weight), wanted.double()) < 1e-5
    assert torch.equal(run(c, none)[77], c.bias)
    assert error(run(c, c.matrix > 0), reference.weighted(c.x, c.mlp, c.matrix > 0, c.bias)) < 1e-5


def test_more_experts_than_promised_write_nothing_outside():
    c = case(3, 40, 24, 4, 8, 3, biased=True)
    assert run(c, most=1).isfinite().all()
    assert error(run(c, most=1), c.wanted) > 0.01
    assert torch.equal(run(c, most=0), c.bias.expand(40, -1))


def test_more_experts_than_one_search_sees(small_blocks):
    c = case(4, 20, 16, 21, 1, 2)
    assert error(run(c, most=2), c.wanted) < 1e-5


def test_gradients_of_a_down_projection_of_another_dtype():
    c = case(6, 20, 32, 4, 8, 2, torch.float16)
    wide = c.without(mlp=c.mlp._replace(down_EFD=c.mlp.down_EFD.float().requires_grad_()))
    (gradient,) = torch.autograd.grad(run(wide).sum(), wide.mlp.down_EFD)
    (wanted,) = torch.autograd.grad(wide.wanted.sum(), wide.mlp.down_EFD)
    assert error(gradient, wanted) < 3e-3


def test_gradients_with_offsets_beyond_int32():
    c = case(7, 20, 32, 3, 4, 2, torch.float16)
    names = ("up_EFD", "down_EFD", "gate_EFD")
    mlp = c.mlp._replace(**{name: far_apart(getattr(c.mlp, name)) for name in names})
    x = c.x.requires_grad_()
    (gradient,) = torch.autograd.grad(grouped(x, mlp, c.matrix).sum(), x)
    (wanted,) = torch.autograd.grad(c.wanted.sum(), x)
    assert error(gradient, wanted) < 3e-3


def gradients(function, x, mlp, weight, bias, dy):
    """Of everything that is a float, by name."""
    given = {"x": x, **mlp._asdict(), "weight": weight, "bias": bias}
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in given.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    given |= leaves
    x, weight, bias = (given.pop(name) for name in ("x", "weight", "bias"))
    y = function(x, ExpertMlp(**given), weight, bias)
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


def wanted_gradients(c, weight, dy):
    wide = ExpertMlp(*(v.double() if isinstance(v, torch.Tensor) else v for v in c.mlp))
    bias = None if c.bias is None else c.bias.double()
    weight = weight if weight.dtype == torch.bool else weight.double()
    wanted = gradients(reference.weighted, c.x.double(), wide, weight, bias, dy.double())
    if "weight" in wanted:  # what is off has none
        wanted["weight"] = wanted["weight"] * (weight != 0)
    return wanted


def check_gradients(c, weight, dy, limit):
    got = gradients(grouped, c.x, c.mlp, weight, c.bias, dy)
    wanted = wanted_gradients(c, weight, dy)
    assert got.keys() == wanted.keys()
    errors = {name: error(value, wanted[name]) for name, value in got.items()}
    assert max(errors.values()) < limit, errors
    return got, wanted


@pytest.mark.parametrize(
    ("activation", "gated"), [*((name, True) for name in ACTIVATIONS), ("relu2", False)]
)
def test_gradients(activation, gated):
    c = case(8, 33, 40, 5, 12, 2, torch.float32, activation, gated, True, True)
    dy = torch.randn(33, 40, generator=torch.Generator().manual_seed(1))
    got, wanted = check_gradients(c, c.matrix, dy, 1e-5)
    assert len(got) == (9 if gated else 7)
    for name, value in wanted.items():  # each is what it is, not another one, not nothing
        assert value.norm() > 0
        assert error(got[name].roll(1, 0), value) > 0.1


@settings(deadline=None, max_examples=4)
@given(c=cases(tokens=40), boolean=st.booleans())
def test_gradients_of_any_shape(c, boolean):
    c = c.without(mlp=c.mlp._replace(activation="silu"))  # ReLU jumps where rounding decides
    weight = c.matrix != 0 if boolean else c.matrix
    check_gradients(c, weight, torch.ones_like(c.x).cumsum(1) / c.mlp.width, 1e-5)


def test_gradients_over_many_tiles_and_blocks(small_blocks):
    c = case(9, 40, 36, 2, 20, 1, torch.float32, "gelu", True, True, True)
    check_gradients(c, c.matrix, c.x.flip(0), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_in_16_bits(dtype):
    c = case(10, 40, 48, 4, 16, 2, dtype, biased=True)
    dy = torch.randn(40, 48, generator=torch.Generator().manual_seed(2)).to(dtype)
    with matrix_units():
        check_gradients(c, c.matrix, dy, 2 * TOLERANCE[dtype])


def test_gradients_in_tf32():
    c = case(15, 40, 48, 4, 16, 2, biased=True)
    dy = torch.randn(40, 48, generator=torch.Generator().manual_seed(3))
    with tf32(), matrix_units():
        got, wanted = check_gradients(c, c.matrix, dy, 2 * TF32)
    for name in ("x", "up_EFD", "down_EFD", "gate_EFD"):
        assert error(got[name], wanted[name]) > 1e-4


def test_gradients_of_views_and_empty_experts():
    c = case(11, 30, 32, 4, 8, 2)
    weight = c.matrix.clone()
    weight[:, 1] = 0
    seen = views(c)
    dy = torch.ones(()).expand(30, 32)
    got = gradients(grouped, seen.x, seen.mlp, weight.T.contiguous().T, None, dy)
    wanted = wanted_gradients(c, weight, dy)
    assert max(error(got[name], wanted[name]) for name in wanted) < 1e-5
    assert not got["up_EFD"][1].any()


def test_only_what_is_wanted():
    c = case(12, 20, 24, 3, 8, 2, biased=True)
    wanted = wanted_gradients(c, c.matrix, torch.ones(20, 24))
    for name in ("x", "weight", "bias", "down_EFD", "gate_bias_EF"):
        given = {"x": c.x, **c.mlp._asdict(), "weight": c.matrix, "bias": c.bias}
        leaf = given[name] = given[name].detach().requires_grad_()
        x, weight, bias = (given.pop(other) for other in ("x", "weight", "bias"))
        grouped(x, ExpertMlp(**given), weight, bias).sum().backward()
        assert error(leaf.grad, wanted[name]) < 1e-5


def test_the_twin_where_no_kernel_runs():
    c = case(13, 5, 24, 3, 8, 2)
    empty = c.x[:0].requires_grad_()
    y = grouped(empty, c.mlp, c.matrix[:0], c.bias)
    assert y.shape == (0, 24)
    y.sum().backward()
    x = c.x.double().requires_grad_()
    wide = ExpertMlp(*(v.double() if isinstance(v, torch.Tensor) else v for v in c.mlp))
    got = grouped(x, wide, c.matrix)
    assert error(got.detach(), c.wanted) < 1e-12
    got.sum().backward()
    assert x.grad is not None


def test_compiles_whole_and_passes_opcheck():
    c = case(14, 20, 32, 4, 8, 2, biased=True, centred=True)
    up = c.mlp.up_EFD.requires_grad_()
    weight = c.matrix.requires_grad_()

    def twice(x, weight):
        return grouped(grouped(x, c.mlp, weight), c.mlp, weight, c.bias, 2)

    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    want, got = twice(c.x, weight), compiled(c.x, weight)
    assert error(got.detach(), want.detach().double()) < 1e-6
    for leaf in (up, weight):
        grads = (torch.autograd.grad(y.sum(), leaf, retain_graph=True)[0] for y in (got, want))
        assert error(*(g.double() for g in grads)) < 1e-6
    ops, mlp = torch.ops.moefy, c.mlp._replace(up_EFD=up.detach())
    torch.library.opcheck(ops.grouped.default, (c.x, *c.mlp, weight, c.bias, 2))
    needed = [True, True, False, True, False, True, True, True]
    torch.library.opcheck(
        ops.grouped_backward.default, (c.x, c.x, *mlp, weight.detach(), None, needed)
    )


@pytest.mark.parametrize("kernel", ["hidden", "scatter", "slopes", "outer"])
@pytest.mark.parametrize("size", [1, 16, 48, 512])
def test_default_blocks_suit_matrix_units(kernel, size):
    for dtype in TOLERANCE:
        config = analytic(f"grouped_{kernel}", 4096, size, dtype)
        sides = [value for name, value in config.items() if name.startswith("BLOCK")]
        assert min(sides) >= 16
        assert all(side & (side - 1) == 0 for side in sides)
