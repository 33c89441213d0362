"""The router of top bits: its scores by a naive loop, what it reads, and that it reads nothing twice."""

import copy

import pytest
import torch
from torch.nn.functional import silu

from moefy.errors import RecipeError
from moefy.evaluation.routing import bits_read
from moefy.methods.base import NoCompensation
from moefy.methods.routers.bit_planes import BitPlanesRouter
from moefy.models.mlp import DenseMlp
from moefy.models.quantised import quantise

N, D, T = 64, 64, 40


def mlp(*, gated=True, activation="silu", bits=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randn(N, D, generator=generator) / D**0.5 for _ in range(3)]
    dense = DenseMlp(
        up_ND=rows[0], down_ND=rows[1], activation=activation, gate_ND=rows[2] if gated else None
    )
    return dense if bits is None else dense.quantised(bits, 8)


def inputs(seed=1):
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))


def router(dense, bits=2, experts=N, codes=4):
    gated = dense.gate_ND is not None
    made = BitPlanesRouter(D, experts, dense.neurons, bits, gated, codes)
    made.initialise(dense, inputs(), dense)
    return made


def naive(dense, bits, codes, x, j, sample):
    """The score of one neuron and token in fp64, as the definition says."""
    square = float(dense.down_ND[j].double() @ dense.down_ND[j].double())
    first = True
    for name in ("gate", "up") if dense.gate_ND is not None else ("up",):
        row = getattr(dense, f"{name}_ND")[j].double()
        stored = (
            dense.stored.matrix(name)
            if dense.stored
            else quantise(getattr(dense, f"{name}_ND"), codes)
        )
        rough = stored.rough(bits)[j].double()
        errors = sample.double() @ (row - rough)
        value = x.double() @ rough + errors.mean()
        variance = errors.square().mean() - errors.mean() ** 2
        if first and dense.activation == "silu":
            s = torch.sigmoid(value)
            slope = s * (1 + value * (1 - s))
            square *= float(silu(value) ** 2 + slope**2 * variance)
        elif first:  # relu, over one deviation on either side
            deviation = variance.sqrt()
            wide = (value + deviation).clamp_min(0) - (value - deviation).clamp_min(0)
            square *= float(value.clamp_min(0) ** 2 + (wide / 2) ** 2)
        else:
            square *= float(value**2 + variance)
        first = False
    return square**0.5


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize(
    ("gated", "activation", "stored"),
    [(True, "silu", None), (True, "silu", 4), (False, "relu", 4), (True, "silu", 8)],
)
def test_scores_are_the_roots_of_expected_squares(bits, gated, activation, stored):
    dense, codes = mlp(gated=gated, activation=activation, bits=stored), stored or 4
    made, x_TD = router(dense, bits, codes=codes), inputs(2)
    scores_TE = made(x_TD, dense)
    for t, j in ((0, 0), (3, 17), (T - 1, N - 1), (7, 40)):
        want = naive(dense, bits, codes, x_TD[t], j, inputs())
        # The slope is a difference over 0.02, and all of it is in fp32.
        assert scores_TE[t, j].item() == pytest.approx(want, rel=2e-3, abs=1e-6)


def test_planes_of_stored_weights_are_their_own():
    dense = mlp(bits=4)
    made = router(dense, 2)
    for name in ("gate", "up"):
        assert torch.equal(made._rough_rows(name, T), dense.stored.matrix(name).rough(2))


def test_all_planes_are_the_exact_contribution():
    dense = mlp(bits=4)
    made, x_TD = router(dense, 4), inputs(3)
    want_TN = dense.hidden(x_TD).abs() * dense.down_ND.norm(dim=1)
    torch.testing.assert_close(made(x_TD, dense), want_TN, rtol=1e-4, atol=1e-5)


def test_more_planes_choose_better():
    dense, x_TD = mlp(bits=4), inputs(4)
    true_TN = dense.hidden(x_TD).abs() * dense.down_ND.norm(dim=1)
    best = true_TN.square().topk(N // 4, dim=1).values.sum()

    def captured(bits):
        chosen = router(dense, bits)(x_TD, dense).topk(N // 4, dim=1).indices
        return (true_TN.square().gather(1, chosen).sum() / best).item()

    one, two, three = (captured(bits) for bits in (1, 2, 3))
    assert 0.5 < one < two < three <= 1
    assert three > 0.95


def test_experts_score_the_root_of_the_sum_of_squares():
    dense, x_TD = mlp(bits=4), inputs(5)
    single_TN, grouped_TE = router(dense)(x_TD, dense), router(dense, experts=8)(x_TD, dense)
    want_TE = single_TN.view(T, 8, -1).square().sum(-1).sqrt()
    torch.testing.assert_close(grouped_TE, want_TE)


def test_a_metric_weighs_directions_of_the_output():
    dense, made = mlp(bits=4), router(mlp(bits=4))
    half = torch.randn(D, D, generator=torch.Generator().manual_seed(6))
    metric = half @ half.T
    made.weigh(dense, metric)
    want_N = torch.stack([(d @ metric @ d).sqrt() for d in dense.down_ND])
    torch.testing.assert_close(made.size_N, want_N, rtol=1e-4, atol=1e-5)
    made.weigh(dense, torch.tensor(4.0))
    torch.testing.assert_close(made.size_N, 2 * dense.down_ND.norm(dim=1))


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("stored", [4, 8])
def test_what_the_router_reads_is_not_read_again(bits, stored):
    """With every neuron on, all bits are read once, and a few numbers a neuron for the scores."""
    dense = mlp(bits=stored)
    made, none = router(dense, bits, codes=stored), NoCompensation(D, N, 0)
    weights = 3 * N * D
    every = bits_read(dense, made, none, 1.0, experts=N, shared=0) / weights
    assert every == pytest.approx(dense.stored.bits_per_weight + 5 * 16 / (3 * D))
    no_one = bits_read(dense, made, none, 0.0, experts=N, shared=0) / weights
    scales = dense.stored.overhead("up")
    want = 2 / 3 * (bits + scales) + dense.stored.overhead("down") / 3 + 5 * 16 / (3 * D)
    assert no_one == pytest.approx(want)


def test_planes_of_weights_without_codes_are_read_besides():
    dense = mlp()
    made, none = router(dense), NoCompensation(D, N, 0)
    every = bits_read(dense, made, none, 1.0, experts=N, shared=0) / (3 * N * D)
    planes = 2 / 3 * (2 + 16 / 32 + 32 / D)
    assert every == pytest.approx(16 + planes + 5 * 16 / (3 * D))


def test_copies_and_other_weights_make_rows_anew():
    dense, x_TD = mlp(bits=4), inputs(7)
    made = router(dense)
    before = made(x_TD, dense)
    torch.testing.assert_close(copy.deepcopy(made)(x_TD, dense), before)
    made.load_state_dict(router(mlp(bits=4, seed=9)).state_dict())
    assert not torch.allclose(made(x_TD, dense), before, rtol=0.1)


def test_planes_that_codes_do_not_have_are_refused():
    for bits, codes in ((0, 4), (5, 4), (3, 2)):
        with pytest.raises(RecipeError, match="bit_planes reads"):
            BitPlanesRouter.settings({"bits": bits, "settings": {"codes": codes}})


def test_errors_that_do_not_vary_have_no_variance_below_zero():
    dense, same_TD = mlp(), inputs()[:1].expand(3000, -1)
    made = BitPlanesRouter(D, N, N, 2, True, 4)
    made.initialise(dense, same_TD, dense)
    assert made(torch.zeros(1, D), dense).isfinite().all()
    assert all((variance_N >= 0).all() for _, variance_N in made.rough_codes().errors.values())
