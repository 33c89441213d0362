"""Routing kernels, interpreted, against torch; ties, caps and empty lists included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefy.methods.tables import SELECTIONS
from moefy_kernels.routing import listed, route, select


def mask_of(lists, experts):
    """The mask that lists and counts stand for; checks their form."""
    expert, count = lists
    assert expert.dtype == count.dtype == torch.int32
    mask = torch.zeros(len(expert), experts, dtype=torch.bool)
    for t, row in enumerate(expert.tolist()):
        real, rest = row[: count[t]], row[count[t] :]
        assert real == sorted(set(real)) and all(e < experts for e in real)
        assert all(e == experts for e in rest)
        mask[t, real] = True
    return mask


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 5),
    experts=st.integers(1, 70),
    distinct=st.integers(1, 50),
    kind=st.sampled_from(["k", "threshold", "tau"]),
    data=st.data(),
)
def test_selects_as_sorting_does(seed, tokens, experts, distinct, kind, data):
    g = torch.Generator().manual_seed(seed)
    # Few distinct values: ties are what goes wrong.
    score = torch.randint(-distinct, distinct, (tokens, experts), generator=g) / 8
    score = score.abs() if kind == "tau" else score
    most = data.draw(st.integers(1, experts))
    if kind == "k":
        got = mask_of(select(score, k=most), experts)
        passed = torch.ones_like(got)
    elif kind == "threshold":
        value = data.draw(st.integers(-distinct, distinct)) / 8
        got = mask_of(select(score, threshold=value, most=most), experts)
        passed = score > value
    else:
        value = data.draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]))
        got = mask_of(select(score, tau=value, most=most), experts)
        passed = score >= (1 - value) * score.amax(1, keepdim=True)
    for t in range(tokens):
        order = sorted(passed[t].nonzero()[:, 0].tolist(), key=lambda e: (-score[t, e], e))
        assert got[t].nonzero()[:, 0].tolist() == sorted(order[:most])


@pytest.mark.parametrize(
    ("name", "settings_", "given_"),
    [
        ("topk", {"k": 5}, {"k": 5}),
        ("threshold", {"threshold": 0.2, "most": 7}, {"threshold": 0.2, "most": 7}),
        ("dynamic_k", {"tau": 0.4}, {"tau": 0.4}),
    ],
)
def test_the_same_experts_as_the_selections_of_moefy(name, settings_, given_):
    score = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).abs()
    want = SELECTIONS[name](**settings_)(score)
    assert torch.equal(mask_of(select(score, **given_), 40), want)
    strided = torch.stack([score, score], 2)[..., 0]
    assert torch.equal(mask_of(select(strided, **given_), 40), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given_", [{"k": 3}, {"threshold": 0.3}, {"tau": 0.5, "most": 4}])
def test_routes_in_one_launch_as_in_two(dtype, given_):
    g = torch.Generator().manual_seed(1)
    x, router = (
        torch.randn(3, 50, generator=g).to(dtype),
        torch.randn(21, 50, generator=g).to(dtype),
    )
    bias = torch.randn(21, generator=g)
    score = x.float() @ router.float().T + bias
    if "tau" in given_:
        bias, score = bias + 20, score + 20
    got = mask_of(route(x, router, bias, **given_), 21)
    assert torch.equal(got, mask_of(select(score, **given_), 21))
    wider = torch.cat([router, router], 1)[:, 50:]
    assert torch.equal(mask_of(route(x, wider, bias, **given_), 21), got)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 70), st.booleans(), st.booleans())
def test_lists_what_is_on(seed, tokens, experts, weights, together):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(tokens, experts, generator=g) < 0.3
    given_ = mask * torch.randn(tokens, experts, generator=g) if weights else mask
    want = mask.any(0, keepdim=True) if together else mask
    assert torch.equal(mask_of(listed(given_, together=together), experts), want)
    assert torch.equal(mask_of(listed(given_.T.contiguous().T, together=together), experts), want)


def test_a_list_that_is_too_short_keeps_its_first():
    expert, count = listed(torch.tensor([[True, False, True, True]]), 2)
    assert expert.tolist() == [[0, 2]] and count.tolist() == [2]


def test_one_setting_is_given():
    with pytest.raises(ValueError, match="one of"):
        select(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="one of"):
        select(torch.zeros(1, 2), k=1, tau=0.5)


def test_compiles_whole_and_passes_opcheck():
    x, router = torch.randn(2, 16), torch.randn(5, 16)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: (route(x, router, k=2), select(x, threshold=0.0), listed(x > 0)),
        fullgraph=True,
        backend="aot_eager",
    )
    for got, want in zip(
        compiled(x), (route(x, router, k=2), select(x, threshold=0.0), listed(x > 0)), strict=True
    ):
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    ops = torch.ops.moefy
    torch.library.opcheck(ops.route.default, (x, router, None, 0.5, 2, False))
    torch.library.opcheck(ops.select.default, (x, 0.5, 2, True))
    torch.library.opcheck(ops.listed.default, (x > 0, 2, False))
