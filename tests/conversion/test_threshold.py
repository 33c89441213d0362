"""One threshold for all layers: the density that it makes, and the least density within a KL."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_conversion import corpus_for
from tiny_models import build

import moefy
from moefy import recipe as recipes
from moefy.conversion.threshold import TRIALS, _Scores, _within
from moefy.errors import RecipeError
from moefy.experts.sparse_mlp import sparse_mlps


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.tuples(st.integers(50, 400), st.integers(0, 40)), min_size=1, max_size=5),
    density=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
)
def test_under_a_threshold_runs_the_share_that_was_asked_for(sizes, density, seed):
    """Single neurons, some of which always run, that are scored once; layers differ in size and scale."""
    random, experts, shared = np.random.default_rng(seed), *zip(*sizes, strict=True)
    rows = [
        np.sort(random.lognormal(3 * i, 1, n - s)).astype(np.float32)
        for i, (n, s) in enumerate(sizes)
    ]
    scores = _Scores(rows, [n / sum(experts) for n in experts], [*experts], [*shared])
    threshold = scores.threshold(density)
    run = sum(shared) + (np.concatenate(rows) > threshold).sum()
    if density * sum(experts) > sum(shared):
        assert run / sum(experts) == pytest.approx(density, abs=1.01 / sum(experts))
    else:
        assert run == sum(shared)
    assert sum(scores.active(threshold)) + sum(shared) == pytest.approx(run)


@settings(deadline=None, max_examples=50)
@given(
    slope=st.floats(3, 14), bend=st.floats(-1, 2), start=st.floats(0.2, 0.8),
    target=st.floats(0.02, 0.3),
)  # fmt: skip
def test_the_least_density_within_a_target(slope, bend, start, target):
    tried = []

    def kl_at(density):
        return math.exp(1 - slope * density - bend * density**2)

    density = _within(target, start, lambda d: tried.append(d) or kl_at(d))
    assert len(tried) <= TRIALS
    within = [d for d in tried if kl_at(d) <= target]
    if within:
        assert density == min(within)
        # Near enough: a tenth of the densities below would lose too much.
        assert kl_at(max(density - 0.1, 0.02)) > 0.9 * target or density < 0.13


@pytest.fixture(scope="module")
def small():
    sizes = {"context": 32, "partition.tokens": 128, "router.tokens": 256}
    return recipes.override(recipes.load("default"), sizes)


def test_the_default_keeps_its_promise(small, tmp_path):
    source = build("llama", tmp_path / "source")
    record = moefy.convert(
        source, tmp_path / "out", recipe=small, corpus=corpus_for("llama"), quiet=True
    )
    budget = record["conversion"]["tuning"]["budget"]
    assert budget["name"] == "one_threshold"
    assert budget["held_out_kl"] <= 0.05 or budget["density"] > 0.9
    model = moefy.load(tmp_path / "out")
    thresholds = {m.selection.threshold for m in sparse_mlps(model).values()}
    assert thresholds == {budget["threshold"]}


def test_a_density_takes_the_place_of_the_target(small):
    asked = recipes.override(small, {"density": 0.3})
    assert asked.budget.target_kl is None
    both = recipes.override(small, {"density": 0.3, "budget.target_kl": 0.1})
    assert both.budget.target_kl == 0.1


def test_scores_in_other_units_are_refused(small, tmp_path):
    source = build("llama", tmp_path / "source")
    wanted = recipes.override(small, {"router.name": "largest_inputs"})
    with pytest.raises(RecipeError, match=r"bit_planes.*budget greedy"):
        moefy.convert(
            source, tmp_path / "out", recipe=wanted, corpus=corpus_for("llama"), quiet=True
        )
