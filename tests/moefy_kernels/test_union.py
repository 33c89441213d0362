"""What the union kernel alone does, interpreted, against its twin; the rest: `test_kernel_parity.py`."""

import torch
from expert_cases import case, error

from moefy_kernels.union import union


def run(c, **changes):
    return union(c.x, c.mlp, **{"weight_TE": c.matrix, "bias_D": c.bias, **changes})


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


def test_compiles_whole_and_passes_opcheck():
    c = case(6, 2, 32, 4, 8, 2)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w: union(union(x, c.mlp, w), c.mlp, w), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(c.x, c.matrix), union(run(c), c.mlp, c.matrix))
    torch.library.opcheck(torch.ops.moefy.union.default, (c.x, *c.mlp, c.matrix, None))
