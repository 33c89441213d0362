"""The selection of exported models: how flat its softmax is, and what that costs."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from moefy.methods.selections import SoftmaxTopK
from moefy.methods.tables import SELECTIONS


@given(
    seed=st.integers(0, 1000),
    scale=st.floats(1e-3, 1e3),
    offset=st.floats(-10, 10),
    experts=st.sampled_from([4, 16, 64]),
)
def test_eps_is_a_power_of_two_that_follows_the_spread(
    seed: int, scale: float, offset: float, experts: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    scores_TE = torch.randn(200, experts, generator=g) * scale
    common_T1 = torch.randn(200, 1, generator=g) * scale + offset
    selection = SELECTIONS["softmax_topk"].fit(scores_TE, experts // 4)
    assert isinstance(selection, SoftmaxTopK)
    assert math.frexp(selection.eps)[0] == 0.5
    assert 2.0**-16.8 < selection.eps * scale < 2.0**-15.2
    moved = SoftmaxTopK.fit(scores_TE + common_T1, experts // 4)
    assert abs(math.log2(moved.eps / selection.eps)) <= 1
    p_TE = torch.softmax(scores_TE * selection.eps, -1)
    mask_TE = selection(scores_TE)
    assert mask_TE.sum(1).tolist() == [experts // 4] * 200
    weights = p_TE.where(mask_TE, 0) / (p_TE * mask_TE).sum(1, keepdim=True)
    assert ((weights[mask_TE] * (experts // 4) - 1).abs() < 2e-4).all()
    # Sets differ from the exact ones only where scores are within the resolution of fp32.
    k_th = scores_TE.topk(experts // 4, dim=1).values[:, -1:]
    wrong = (scores_TE - k_th).abs()[mask_TE != (scores_TE >= k_th)]
    assert (wrong < 2.0**-6 * scale).all()


def test_scores_without_spread_have_an_eps() -> None:
    for scores_TE in (torch.zeros(5, 4), torch.randn(5, 1), torch.full((3, 8), 7.0)):
        assert SoftmaxTopK.fit(scores_TE, 1).eps == 2.0**-16
