"""The decode kernel, interpreted, against its twin in fp64; wrong results must fail."""

import pytest
import torch
from expert_cases import TOLERANCE, case, cases, error, far_apart
from hypothesis import given, settings

from moefy_kernels.decode import decode
from moefy_kernels.expert_mlp import ACTIVATIONS


def run(c, **changes):
    given = {"expert_TK": c.expert, "weight_TK": c.weight, "bias_D": c.bias, **changes}
    return decode(c.x, c.mlp, **given)


@settings(deadline=None, max_examples=15)
@given(cases(tokens=4))
def test_any_shape(c):
    assert error(run(c), c.wanted) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dtypes_and_mutations(dtype, activation):
    c = case(0, 3, 64, 6, 16, 3, dtype, activation)
    limit, got = TOLERANCE[dtype], run(c)
    assert got.dtype == dtype
    assert error(got, c.wanted) < limit
    assert error(torch.zeros_like(got), c.wanted) > 10 * limit
    dropped = got.clone()
    dropped[-1] = 0
    assert error(dropped, c.wanted) > 10 * limit
    assert error(run(c, expert_TK=(c.expert + 1) % 6), c.wanted) > 10 * limit
    assert error(run(c, weight_TK=None), c.wanted) > 5 * limit


def test_many_splits_give_the_same_sum(monkeypatch):
    c = case(1, 2, 24, 8, 40, 6, biased=True)
    for parts in (1, 2, 4, 32):
        monkeypatch.setattr("moefy_kernels.decode.splits", lambda *_, parts=parts: parts)
        assert error(run(c), c.wanted) < 1e-6
    assert torch.equal(run(c), run(c))


def test_sentinels_counts_and_repeated_ids():
    c = case(2, 4, 40, 6, 12, 4, biased=True)
    ids = c.expert.clone()
    ids[0] = 6  # no expert at all
    ids[1, 1:] = -1
    ids[2] = 3  # one expert four times
    c = c.without(expert=ids)
    assert error(run(c), c.wanted) < 1e-5
    assert torch.equal(run(c)[0], c.bias)
    counts = torch.tensor([0, 1, 4, 2], dtype=torch.int32)
    shorter = ids.clone()
    shorter[3, 2:] = 6
    assert error(run(c, count_T=counts), c.without(expert=shorter).wanted) < 1e-5
    none = run(c, expert_TK=ids[:, :0], weight_TK=None)
    assert torch.equal(none, c.bias.expand(4, -1))


def test_views_are_read_as_they_lie():
    c = case(3, 3, 32, 4, 8, 2, biased=True)
    fused = torch.cat([c.mlp.gate_EFD, c.mlp.up_EFD], 1)
    stock_down = c.mlp.down_EFD.transpose(1, 2).contiguous()
    mlp = c.mlp._replace(
        gate_EFD=fused[:, :8], up_EFD=fused[:, 8:], down_EFD=stock_down.transpose(1, 2)
    )
    x = torch.stack([c.x, c.x], 1)[:, 0]
    ids = torch.stack([c.expert.long(), c.expert.long()], 2)[..., 0]
    assert error(decode(x, mlp, ids, c.weight, None, c.bias), c.wanted) < 1e-5


def test_a_down_projection_of_another_dtype():
    c = case(4, 2, 32, 4, 8, 2, torch.float16)
    wide = c.without(mlp=c.mlp._replace(down_EFD=c.mlp.down_EFD.float()))
    got = run(wide)
    assert got.dtype == torch.float32
    assert error(got, wide.wanted) < 3e-3


def test_offsets_beyond_int32():
    c = case(5, 2, 32, 3, 4, 2, torch.float16, gated=False)
    far = far_apart(c.mlp.up_EFD), far_apart(c.mlp.down_EFD)
    mlp = c.mlp._replace(up_EFD=far[0], down_EFD=far[1])
    last = c.without(expert=torch.full_like(c.expert, 2))
    assert error(decode(c.x, mlp, last.expert, c.weight), last.wanted) < 3e-3


def test_compiles_whole_and_passes_opcheck():
    c = case(6, 2, 32, 4, 8, 2)

    def twice(x, ids, weight):
        return decode(decode(x, c.mlp, ids, weight), c.mlp, ids, weight)

    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")
    want = twice(c.x, c.expert, c.weight)
    assert torch.equal(compiled(c.x, c.expert, c.weight), want)
    torch.library.opcheck(
        torch.ops.moefy.decode.default, (c.x, *c.mlp, c.expert, c.weight, None, None)
    )
