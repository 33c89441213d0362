"""Neurons that stand at a centre when off, against plain loops in fp64.

Shapes: T tokens, D width, S shared and E routed experts, F neurons per expert, N routed neurons.
"""

from pathlib import Path

import pytest
import torch
from tiny_conversion import corpus_for
from tiny_models import build, example_inputs
from torch import Tensor
from torch.nn.functional import gelu

import moefy
from moefy import recipe as recipes
from moefy.conversion.convert import convert
from moefy.errors import RecipeError
from moefy.evaluation.outputs import values_of
from moefy.experts.backends import BACKENDS
from moefy.experts.sparse_mlp import SparseMlp, all_experts, sparse_mlps
from moefy.methods.base import Compensation
from moefy.methods.compensations import ROUNDS
from moefy.methods.tables import COMPENSATIONS, ROUTERS, SELECTIONS
from moefy.models.mlp import DenseMlp

T, D, E, F, S = 300, 10, 6, 8, 2
N = E * F


def make_mlp(neurons: int = N, *, bias: bool = True) -> DenseMlp:
    """A GELU layer whose neurons rest below zero, as trained ones do."""
    g = torch.Generator().manual_seed(0)
    return DenseMlp(
        up_ND=torch.randn(neurons, D, generator=g) / 3,
        down_ND=torch.randn(neurons, D, generator=g),
        up_bias_N=torch.rand(neurons, generator=g) - 1.2,
        down_bias_D=torch.randn(D, generator=g) if bias else None,
        activation="gelu",
    )


def inputs(tokens: int = T, seed: int = 1) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed))


def activations(mlp: DenseMlp, x_TD: Tensor) -> Tensor:
    return gelu(x_TD.double() @ mlp.up_ND.double().T + mlp.up_bias_N.double())  # type: ignore[union-attr]


def fitted(mlp: DenseMlp, experts: int, active: int, name: str = "centred") -> Compensation:
    compensation = COMPENSATIONS[name].make(D, experts, mlp.neurons, 3)
    compensation.initialise(mlp, inputs(), active)
    return compensation


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def on(h_TN: Tensor, centre_N: Tensor, down_ND: Tensor, experts: int, active: int) -> Tensor:
    """The experts whose output is farthest from their centre's, `active` a token on average."""
    away_TEF = (h_TN - centre_N).view(len(h_TN), experts, -1)
    away = torch.einsum("tef,efd->ted", away_TEF, down_ND.view(experts, -1, D)).norm(dim=-1)
    return away > away.flatten().sort(descending=True).values[active * len(h_TN)]


def naive_centres(mlp: DenseMlp, experts: int, active: int) -> Tensor:
    h_TN = activations(mlp, inputs())
    centre_N = h_TN.mean(0)
    for _ in range(ROUNDS):
        off_TE = ~on(h_TN, centre_N, mlp.down_ND.double(), experts, active)
        size = mlp.neurons // experts
        for j in range(mlp.neurons):
            rows = [h_TN[t, j] for t in range(T) if off_TE[t, j // size]]
            if rows:
                centre_N[j] = torch.stack(rows).mean()
    return centre_N


@pytest.mark.parametrize("experts", [E, N])
def test_centres_are_the_means_of_what_is_off(experts: int) -> None:
    mlp = make_mlp()
    want_N = naive_centres(mlp, experts, experts // 3)
    compensation = fitted(mlp, experts, experts // 3)
    assert relative(compensation.centre_N, want_N) < 1e-3
    assert relative(compensation.constant_D, want_N @ mlp.down_ND.double()) < 1e-3
    assert relative(activations(mlp, inputs()).mean(0), want_N) > 0.1


def test_off_neurons_at_their_centres_leave_less_error_than_at_zero_or_the_mean() -> None:
    mlp = make_mlp()
    h_TN, down_ND = activations(mlp, inputs(T, 7)), mlp.down_ND.double()
    dense_TD = h_TN @ down_ND

    def error(centre_N: Tensor) -> float:
        on_TN = on(h_TN, centre_N, down_ND, N, N // 3)
        return relative(torch.where(on_TN, h_TN, centre_N) @ down_ND, dense_TD)

    centred = error(fitted(mlp, N, N // 3).centre_N.double())
    assert centred < 0.9 * error(activations(mlp, inputs()).mean(0))
    assert centred < 0.6 * error(torch.zeros(N, dtype=torch.float64))


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shared", [0, S])
@pytest.mark.parametrize("router", ["oracle", "largest_inputs"])
@pytest.mark.parametrize("bias", [True, False])
def test_output_is_that_of_standing_at_the_centres(
    backend: str, shared: int, router: str, bias: bool
) -> None:
    mlp, x_TD = make_mlp((shared + E) * F, bias=bias), inputs(9, 4)
    routed = mlp.take(slice(shared * F, None))
    compensation = fitted(routed, E, 2)
    centred = compensation.centred(routed)
    # With all inputs the router hands on the gates that it computed.
    made = ROUTERS[router].make(D, E, N, {"inputs": D, "hidden": 0})
    made.initialise(centred, x_TD, mlp)
    module = SparseMlp(
        mlp, experts=shared + E, shared=shared, router=made,
        selection=SELECTIONS["topk"](2), compensation=compensation,
    ).eval()  # fmt: skip
    module.backend = backend
    mask_TE = module.mask(x_TD)
    assert (mask_TE.sum(1) == shared + 2).all()
    h_TN, down_ND = activations(mlp, x_TD), mlp.down_ND.double()
    centre_N = torch.cat([torch.zeros(shared * F), compensation.centre_N]).double()
    want_TD, zero_TD = torch.zeros(9, D).double(), torch.zeros(9, D).double()
    for t in range(9):
        for j in range(mlp.neurons):
            h = h_TN[t, j] if mask_TE[t, j // F] else centre_N[j]
            want_TD[t] += h * down_ND[j]
            zero_TD[t] += h * down_ND[j] * mask_TE[t, j // F]
    if bias:
        want_TD += mlp.down_bias_D.double()  # type: ignore[union-attr]
        zero_TD += mlp.down_bias_D.double()  # type: ignore[union-attr]
    assert relative(module(x_TD), want_TD) < 1e-5
    assert relative(zero_TD, want_TD) > 0.05
    with all_experts(module):
        assert relative(module(x_TD), mlp(x_TD)) < 1e-6
    if router == "oracle":
        best_TE = on(h_TN[:, shared * F :], centre_N[shared * F :], down_ND[shared * F :], E, E - 1)
        assert (mask_TE[:, shared:] <= best_TE).float().mean() > 0.8


@torch.no_grad()
def test_the_router_looks_for_what_is_far_from_its_centre() -> None:
    mlp = make_mlp()
    compensation = fitted(mlp, N, N // 3)
    router = ROUTERS["largest_inputs"].make(D, N, N, {"inputs": D})
    router.initialise(compensation.centred(mlp), inputs(), mlp)
    got_TN = router(inputs(5), compensation.centred(mlp))
    away_TN = activations(mlp, inputs(5)) - compensation.centre_N.double()
    assert relative(got_TN, away_TN.abs() * mlp.down_ND.double().norm(dim=1)) < 1e-5
    assert relative(router(inputs(5), mlp), got_TN) > 0.1


@torch.no_grad()
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("model", ["gpt2", "bert"])
@pytest.mark.parametrize(
    ("recipe", "name"), [("fast", "centred"), ("largest_inputs", "centred_residual")]
)
def test_models_without_a_gate_are_centred_and_come_back_from_disk(
    recipe: str, name: str, model: str, adapter: bool, tmp_path: Path
) -> None:
    source = build(model, tmp_path / "source")
    settings = {"context": 32, "partition.tokens": 128, "router.tokens": 256, "density": 0.5}
    wanted = recipes.override(recipes.load(recipe), settings)
    convert(
        source,
        tmp_path / "out",
        recipe=wanted,
        corpus=corpus_for(model),
        adapter=adapter,
        quiet=True,
    )
    loaded, given = moefy.load(tmp_path / "out"), example_inputs(model)
    for module in sparse_mlps(loaded).values():
        assert module.compensation.centre_N.abs().max() > 0
        assert type(module.compensation) is COMPENSATIONS[name]
    sparse = values_of(loaded, loaded(**given))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(values_of(loaded, moefy.load(tmp_path / "again")(**given)), sparse)
    half = moefy.load(tmp_path / "out", dtype=torch.bfloat16)
    assert relative(values_of(half, half(**given)), sparse) < 0.1


def test_heads_have_no_centres(tmp_path: Path) -> None:
    source = build("llama", tmp_path / "source")
    wanted = recipes.override(
        recipes.load("fast"), {"attention.density": 0.5, "attention.compensation": "centred"}
    )
    with pytest.raises(RecipeError, match="'centred' is made for neurons; choose"):
        convert(source, tmp_path / "out", recipe=wanted, corpus=corpus_for("llama"), quiet=True)
