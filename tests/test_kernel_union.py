"""The union kernel, interpreted, against its twin in fp64; wrong results must fail."""

import pytest
import torch
from expert_cases import TOLERANCE, bf16_dots, case, cases, error, far_apart
from hypothesis import given, settings

from moefy_kernels.expert_mlp import ACTIVATIONS
from moefy_kernels.union import union


def run(c, **changes):
    return union(c.x, c.mlp, **{"weight_TE": c.matrix, "bias_D": c.bias, **changes})


@settings(deadline=None, max_examples=15)
@given(cases(tokens=20))
def test_any_shape(c):
    assert error(run(c), c.wanted) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dtypes_and_mutations(dtype, activation):
    c = case(0, 5, 64, 8, 16, 3, dtype, activation)
    limit = TOLERANCE[dtype]
    with bf16_dots():
        got = run(c)
        swapped = run(c, weight_TE=c.matrix.roll(1, 1))
        unmasked = run(c, weight_TE=torch.ones_like(c.matrix))
    assert got.dtype == dtype
    assert error(got, c.wanted) < limit
    assert error(torch.zeros_like(got), c.wanted) > 10 * limit
    dropped = got.clone()
    dropped[-1] = 0
    assert error(dropped, c.wanted) > 10 * limit
    assert error(swapped, c.wanted) > 10 * limit
    assert error(unmasked, c.wanted) > 10 * limit


def test_a_mask_counts_as_ones_and_no_expert_leaves_the_bias():
    c = case(1, 6, 40, 7, 10, 3, biased=True)
    mask = c.matrix != 0
    mask[2] = False
    got = run(c, weight_TE=mask)
    ones = c.without(weight=torch.ones_like(c.weight)).wanted
    ones[2] = c.bias.double()
    assert error(got, ones) < 1e-5 and error(got, c.wanted) > 0.01
    assert torch.equal(got[2], c.bias)
    assert torch.equal(run(c, weight_TE=mask & False), c.bias.expand(6, -1))


def test_one_expert_for_all_and_all_for_one(monkeypatch):
    c = case(2, 4, 40, 6, 12, 2)
    one = torch.zeros(4, 6)
    one[:, 3] = 1
    monkeypatch.setattr("moefy_kernels.union.splits", lambda *_: 4)
    for matrix in (one, torch.ones(4, 6)):
        ids = torch.arange(6).expand(4, -1)
        assert error(run(c, weight_TE=matrix), c.without(expert=ids, weight=matrix).wanted) < 1e-5
    assert torch.equal(run(c), run(c))


def test_views_are_read_as_they_lie():
    c = case(3, 3, 32, 4, 8, 2)
    fused = torch.cat([c.mlp.gate_EFD, c.mlp.up_EFD], 1)
    stock_down = c.mlp.down_EFD.transpose(1, 2).contiguous()
    mlp = c.mlp._replace(
        gate_EFD=fused[:, :8], up_EFD=fused[:, 8:], down_EFD=stock_down.transpose(1, 2)
    )
    x = torch.stack([c.x, c.x], 1)[:, 0]
    assert error(union(x, mlp, c.matrix.T.contiguous().T), c.wanted) < 1e-5


def test_a_down_projection_of_another_dtype():
    c = case(4, 2, 32, 4, 8, 2, torch.float16)
    wide = c.without(mlp=c.mlp._replace(down_EFD=c.mlp.down_EFD.float()))
    got = run(wide)
    assert got.dtype == torch.float32
    assert error(got, wide.wanted) < 3e-3


def test_offsets_beyond_int32():
    c = case(5, 2, 32, 3, 4, 2, torch.float16, gated=False)
    mlp = c.mlp._replace(up_EFD=far_apart(c.mlp.up_EFD), down_EFD=far_apart(c.mlp.down_EFD))
    last = c.without(expert=torch.full_like(c.expert, 2))
    assert error(union(c.x, mlp, last.matrix), last.wanted) < 3e-3


def test_compiles_whole_and_passes_opcheck():
    c = case(6, 2, 32, 4, 8, 2)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w: union(union(x, c.mlp, w), c.mlp, w), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(c.x, c.matrix), union(run(c), c.mlp, c.matrix))
    torch.library.opcheck(torch.ops.moefy.union.default, (c.x, *c.mlp, c.matrix, None))
