"""Recipes at equal budgets: the density that is chosen reads what was asked, and no more.

Shapes: D width, E experts.
"""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_conversion import RECIPE, corpus_for
from tiny_models import build

from moefy.benchmark.compare import Comparison
from moefy.conversion.plan import plan, router_of
from moefy.models.checkpoint import Checkpoint
from moefy.models.locate import Site
from moefy.recipe import load, override


@pytest.fixture(scope="module", params=["llama", "opt"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp(request.param)
    source = build(request.param, folder / "source")
    return Comparison(source, folder / "work", corpus=corpus_for(request.param), documents=6)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Site]:
    """The first MLP of a gated and of a plain model."""
    found = {}
    for gated, name in ((True, "llama"), (False, "opt")):
        source = build(name, tmp_path_factory.mktemp(name) / "source")
        found[gated] = plan(Checkpoint.open(source), RECIPE, "text").sites[0]
    return found


@pytest.mark.parametrize("budget", [0.4, 0.6, 0.75, 0.9])
@pytest.mark.parametrize(
    "chosen",
    [
        {"router.name": "largest_inputs", "partition.expert_size": 1},
        {"router.name": "largest_inputs", "router.inputs": 0.3, "compensation.name": "residual"},
        {"router.name": "low_bit", "partition.expert_size": 1},
        {"router.name": "linear", "partition.shared": 1},
        {"router.name": "self_gating"},
    ],
)
def test_a_recipe_reads_the_budget_that_it_is_given(
    bench: Comparison, chosen: dict[str, Any], budget: float
) -> None:
    # Prompts and thresholds drift; static top-k runs what was planned.
    recipe = override(RECIPE, {"compensation.name": "none", "compensation.rank": 1, **chosen})
    row = bench.at(recipe, budget)
    if "n/a" in row:
        assert row["n/a"] == "cannot go below this budget" or "self_gating" in row["n/a"]
        return
    experts = bench.neurons() // (recipe.partition.expert_size or 8)
    assert budget - 1.5 / experts < row["active_budget"] < budget + 0.2 / experts
    assert row["bits_read"] == pytest.approx(16 * row["active_budget"])
    assert row["active_compute"] >= row["ffn_density"] / 3


@pytest.mark.parametrize("name", ["teal", "default"])
def test_a_budget_above_one_is_bits(bench: Comparison, name: str) -> None:
    recipe = load(name)
    assert bench.density_at(recipe, 8.0) == bench.density_at(recipe, 0.5)
    assert bench.density_at(recipe, 8.0) != bench.density_at(recipe, 6.0)


@given(density=st.floats(0.01, 1.0), gated=st.booleans())
def test_inputs_grow_with_the_density_and_never_cost_more_than_all(
    density: float, gated: bool, first: dict[bool, Site]
) -> None:
    site = first[gated]
    m = 3 if gated else 2
    reads = router_of(site, RECIPE, density)["inputs"]
    assert 1 <= reads <= site.width
    part, exact = reads / site.width / m + density, 1 / m + density * (m - 1) / m
    if reads < site.width:
        # The router is as large a share of its matrix as the budget is of all.
        assert reads / site.width == pytest.approx(part, abs=2 / site.width)
        assert part <= exact + 2 / site.width
    else:
        assert exact <= density * m / (m - 1) + 2 / site.width


def test_a_share_of_the_inputs_that_was_asked_for_is_kept(first: dict[bool, Site]) -> None:
    recipe = override(RECIPE, {"router.inputs": 0.5})
    for site in first.values():
        assert router_of(site, recipe, 0.1)["inputs"] == round(0.5 * site.width)


def test_the_oracle_is_a_bound(bench: Comparison) -> None:
    """Of what single neurons can reach without anything in place of the others."""
    oracle = bench.oracle(0.5)
    single = {"partition.expert_size": 1, "compensation.name": "none"}
    routed, drawn = (
        bench.run(override(RECIPE, {"router.name": name, **single}))
        for name in ("largest_inputs", "random")
    )
    assert oracle["ffn_density"] == pytest.approx(0.5, abs=0.01)
    assert oracle["active_budget"] == pytest.approx(oracle["ffn_density"])
    # Without a gate and with all inputs read, the router is the oracle.
    assert 0 < oracle["kl"] <= routed["kl"] * (1 + 1e-6)
    assert oracle["kl"] < 0.7 * drawn["kl"]
