"""What the decode kernel alone does, interpreted, against its twin; the rest: `test_kernel_parity.py`."""

import torch
from expert_cases import case, error

from moefy_kernels.decode import decode


def run(c, **changes):
    given = {"expert_TK": c.expert, "weight_TK": c.weight, "bias_D": c.bias, **changes}
    return decode(c.x, c.mlp, **given)


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
