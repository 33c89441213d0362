import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefy.conversion.fit import LayerTokens, fit_compensation, fit_router, fit_selection
from moefy.errors import RecipeError
from moefy.methods.routers.baselines import expert_norms
from moefy.methods.selections import top_mask
from moefy.methods.tables import COMPENSATIONS, ROUTERS, SELECTIONS, choose
from moefy.models.mlp import DenseMlp
from moefy.recipe import RouterRecipe

T, D, N, E = 64, 12, 40, 10


def make_mlp(seed: int = 0, gated: bool = True) -> DenseMlp:
    g = torch.Generator().manual_seed(seed)
    return DenseMlp(
        up_ND=torch.randn(N, D, generator=g),
        down_ND=torch.randn(N, D, generator=g),
        gate_ND=torch.randn(N, D, generator=g) if gated else None,
        activation="silu" if gated else "relu",
    )


def expert_outputs(mlp: DenseMlp, x: torch.Tensor) -> torch.Tensor:
    """[T, E, D] by a plain loop."""
    h = mlp.hidden(x)
    size = N // E
    parts = [
        h[:, e * size : (e + 1) * size] @ mlp.down_ND[e * size : (e + 1) * size] for e in range(E)
    ]
    return torch.stack(parts, 1)


@pytest.mark.parametrize("gated", [True, False])
def test_expert_norms_are_those_of_the_outputs(gated):
    mlp, x = make_mlp(gated=gated), torch.randn(T, D)
    want = expert_outputs(mlp.to(torch.float64), x.double()).norm(dim=-1)
    got = expert_norms(mlp.hidden(x), mlp.down_ND, E)
    assert ((got - want).norm() / want.norm()) < 1e-5
    assert ((got[:, torch.randperm(E)] - want).norm() / want.norm()) > 0.1


@settings(deadline=None, max_examples=50)
@given(st.integers(1, E), st.integers(0, 1000))
def test_selections_choose_the_highest(k, seed):
    scores = torch.randn(T, E, generator=torch.Generator().manual_seed(seed))
    for name in ("topk", "softmax_topk"):
        mask = SELECTIONS[name].fit(scores, k)(scores)
        assert mask.dtype == torch.bool
        assert (mask.sum(1) == k).all()
        lowest = scores.masked_fill(~mask, torch.inf).min(1).values
        highest = scores.masked_fill(mask, -torch.inf).max(1).values
        # The almost flat softmax rounds: scores closer than 2**-8 of their spread may swap.
        assert (lowest >= highest - (0 if name == "topk" else 2e-2)).all()
    chosen = SELECTIONS["threshold"].fit(scores, k)(scores)
    assert abs(chosen.float().sum(1).mean().item() - k) < 0.05
    assert scores[chosen].min() > scores[~chosen].max() if k < E else chosen.all()


@pytest.mark.parametrize("name", list(SELECTIONS))
def test_settings_rebuild_a_selection(name):
    scores = torch.rand(T, E)
    made = SELECTIONS[name].fit(scores, 3)
    assert torch.equal(SELECTIONS[name](**made.settings())(scores), made(scores))


@pytest.mark.parametrize("name", [n for n, kind in ROUTERS.items() if kind.trainable])
def test_fitting_beats_the_start_and_is_reproducible(name):
    mlp = make_mlp()
    g = torch.Generator().manual_seed(1)
    x, held = torch.randn(4096, D, generator=g), torch.randn(1024, D, generator=g)
    recipe = RouterRecipe(name=name, hidden=64, epochs=10, batch_size=256)

    def fitted(epochs: int = 10):
        torch.manual_seed(0)
        router = ROUTERS[name].make(D, E, 0, {"hidden": 64})
        router.initialise(mlp, x, mlp)
        settings = RouterRecipe(**{**vars(recipe), "epochs": epochs})
        return router, fit_router(
            router,
            mlp,
            LayerTokens(x, x),
            LayerTokens(held, held),
            experts=E,
            k=3,
            recipe=settings,
            seed=0,
        )

    router, fit = fitted()
    again, same = fitted()
    assert fit == same
    for key, value in router.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    chance = 3 / E
    assert fit.recall > chance + (0.02 if name == "linear" else 0.15)
    # The reported figures are those of a plain computation on the held-out tokens.
    norms = expert_outputs(mlp, held).norm(dim=-1)
    oracle, chosen = top_mask(norms, 3), top_mask(router(held, mlp).detach(), 3)
    assert fit.recall == pytest.approx(
        (oracle & chosen).sum().item() / oracle.sum().item(), abs=1e-3
    )
    captured = (norms**2 * chosen).sum() / (norms**2 * oracle).sum()
    assert fit.captured == pytest.approx(captured.item(), abs=1e-3)


def test_oracle_captures_everything_and_cannot_be_deployed():
    mlp, held = make_mlp(), torch.randn(200, D)
    router = ROUTERS["oracle"](D, E)
    fit = fit_router(
        router,
        mlp,
        LayerTokens(held, held),
        LayerTokens(held, held),
        experts=E,
        k=3,
        recipe=RouterRecipe(),
        seed=0,
    )
    assert fit.captured == pytest.approx(1.0)
    assert not ROUTERS["oracle"].deployable


def test_centroid_prefers_the_expert_it_points_at():
    mlp = make_mlp(gated=False)
    router = ROUTERS["centroid"](D, E)
    router.initialise(mlp, torch.zeros(0, D), mlp)
    rows = torch.nn.functional.normalize(mlp.up_ND, dim=-1).view(E, -1, D).mean(1)
    assert router(rows, mlp).argmax(1).tolist() == list(range(E))


def test_conditional_mean_is_the_mean_output_given_off():
    mlp, x = make_mlp(), torch.randn(3000, D)
    router = ROUTERS["oracle"](D, E)
    selection = fit_selection(SELECTIONS["topk"], router, mlp, LayerTokens(x, x), 3)
    made = COMPENSATIONS["conditional_mean"](D, E, 0)
    fit_compensation(made, router, selection, mlp, LayerTokens(x, x))
    off = ~selection(router(x, mlp))
    outputs = expert_outputs(mlp.to(torch.float64), x.double())
    want = torch.stack([outputs[off[:, e], e].mean(0) for e in range(E)])
    assert ((made.mean_ED - want).norm() / want.norm()) < 1e-4
    unconditional = outputs.mean(0)
    assert ((unconditional - want).norm() / want.norm()) > 0.1
    added = made(x, ~off)
    assert ((added - off.double() @ want).norm() / added.norm()) < 1e-4
    assert torch.equal(made(x, torch.ones(len(x), E, dtype=torch.bool)), torch.zeros(len(x), D))


def test_dotted_paths_and_unknown_names():
    assert (
        choose(ROUTERS, "router", "moefy.methods.routers.learned:LinearRouter") is ROUTERS["linear"]
    )
    with pytest.raises(RecipeError, match="did you mean 'linear'"):
        choose(ROUTERS, "router", "linaer")
    with pytest.raises(RecipeError, match="cannot be imported"):
        choose(ROUTERS, "router", "moefy.absent:Router")
