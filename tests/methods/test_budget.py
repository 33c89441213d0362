"""Budgets over layers against every choice there is.

Shapes: L layers, C candidates of a layer.
"""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moefy.methods.budget import Table, greedy, solve

properties = settings(deadline=None, max_examples=25, derandomize=True)

steps = st.lists(st.integers(1, 40), min_size=1, max_size=4)
tables = st.lists(st.tuples(steps, st.integers(0, 10**6)), min_size=1, max_size=4)


def draw(layers: list[tuple[list[int], int]], cost: float, loss: float) -> tuple[Table, Table]:
    """Rising costs and losses that need not fall: a measurement may be out of order."""
    costs, losses = [], []
    for saved, seed in layers:
        rising = list(itertools.accumulate(saved))
        costs.append([cost * value for value in rising])
        values = [(seed * (i + 3) ** 3) % 1009 / 1009 for i in range(len(rising))]
        losses.append([loss * value for value in sorted(values, reverse=seed % 3 > 0)])
    return costs, losses


def spent(table: Table, chosen: list[int]) -> float:
    return math.fsum(row[at] for row, at in zip(table, chosen, strict=True))


def every_choice(costs: Table, losses: Table, total: float) -> float:
    choices = itertools.product(*(range(len(row)) for row in costs))
    return min(spent(losses, list(c)) for c in choices if spent(costs, list(c)) <= total)


@pytest.mark.parametrize("cost", [1e-6, 1.0, 1e8])
@pytest.mark.parametrize("loss", [1e-5, 1.0])
@properties
@given(layers=tables, share=st.floats(0, 1))
def test_solve_is_the_best_of_all_choices(
    cost: float, loss: float, layers: list[tuple[list[int], int]], share: float
) -> None:
    """Costs may be weights by the million or seconds by the microsecond."""
    costs, losses = draw(layers, cost, loss)
    least, most = (spent(costs, [at] * len(costs)) for at in (0, -1))
    total = least + share * (most - least) + 1e-3 * cost
    chosen = solve(costs, losses, total)
    assert spent(costs, chosen) <= total * (1 + 1e-6)
    assert spent(losses, chosen) <= every_choice(costs, losses, total) + 1e-6 * loss


@properties
@given(layers=tables, share=st.floats(0, 1))
def test_greedy_steps_down_where_it_costs_least_for_what_it_saves(
    layers: list[tuple[list[int], int]], share: float
) -> None:
    costs, losses = draw(layers, 1.0, 1.0)
    least, most = (spent(costs, [at] * len(costs)) for at in (0, -1))
    total = least + share * (most - least) + 1e-9
    chosen = greedy(costs, losses, total)
    assert spent(costs, chosen) <= total
    at = [len(row) - 1 for row in costs]
    while spent(costs, at) > total:
        best = None
        for layer, now in enumerate(at):
            if now:
                hurts = losses[layer][now - 1] - losses[layer][now]
                rate = hurts / (costs[layer][now] - costs[layer][now - 1])
                if best is None or rate < best[0]:
                    best = (rate, layer)
        assert best is not None
        at[best[1]] -= 1
    assert chosen == at
    # It stops as soon as it may, and the exact solution is never worse.
    assert spent(losses, solve(costs, losses, total)) <= spent(losses, chosen) + 1e-6


def test_both_agree_where_every_step_hurts_more_than_the_last() -> None:
    costs = [[1.0, 2.0, 3.0, 4.0]] * 4
    losses = [[weight * loss for loss in (9.0, 4.0, 1.0, 0.0)] for weight in (1.0, 3.1, 0.21, 7.3)]
    for total in range(4, 17):
        exact, stepped = solve(costs, losses, total), greedy(costs, losses, total)
        assert exact == stepped
    assert solve(costs, losses, 16) == [3, 3, 3, 3]
    assert solve(costs, losses, 4) == [0, 0, 0, 0]


def test_a_layer_that_matters_keeps_more() -> None:
    costs = [[1.0, 2.0, 3.0]] * 2
    losses = [[5.0, 2.0, 0.0], [0.5, 0.2, 0.0]]
    for choose in (solve, greedy):
        assert choose(costs, losses, 4.0) == [2, 0]


def test_candidates_that_save_nothing_are_stepped_over() -> None:
    """Measured times are not always in order: a smaller candidate may cost as much, or more."""
    costs = [[1.0, 3.0, 3.0, 2.5, 4.0], [1.0, 1.0, 2.0]]
    losses = [[4.0, 3.0, 2.0, 1.0, 0.0], [2.0, 1.0, 0.0]]
    for total in (2.0, 2.5, 3.0, 3.6, 4.5, 6.0):
        for choose in (solve, greedy):
            chosen = choose(costs, losses, total)
            assert spent(costs, chosen) <= total * (1 + 1e-6)
        assert spent(losses, solve(costs, losses, total)) == every_choice(costs, losses, total)


@pytest.mark.parametrize("choose", [solve, greedy])
def test_what_cannot_be_afforded_is_said(choose) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="the cheapest candidates cost 3, the budget is 2"):
        choose([[1.0, 5.0], [2.0]], [[1.0, 0.0], [0.0]], 2)
