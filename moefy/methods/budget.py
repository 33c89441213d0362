"""Spread a density over layers: which number of experts each layer runs, under one total.

Every layer offers candidates, each with a cost and a loss; one candidate per layer is chosen so that
the losses add up to least while the costs stay within the total. `solve` is exact for sums (a
multiple-choice knapsack, by scipy's mixed-integer solver); `greedy` gives up, one step at a time,
what hurts least for what it saves, as TEAL does (Liu et al. 2024).

Shapes: L layers, C candidates of a layer, in order of rising cost.
"""

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

Table = list[list[float]]
"""`[L][C]`: a number for every candidate of every layer."""


def solve(costs: Table, losses: Table, total: float) -> list[int]:
    """The candidate `[L]` of each layer with the least sum of losses at a sum of costs <= `total`.

    The solver's tolerances are absolute, so both are scaled: the costs may exceed the total, and the
    losses the least sum, by a millionth of the total and of the largest loss.

    Raises `ValueError` where even the cheapest candidates cost more.
    """
    _affordable(costs, total)
    cost, loss = np.concatenate(costs) / total, np.concatenate(losses)
    loss = loss / max(np.abs(loss).max(), 1e-300)
    layer = np.repeat(np.arange(len(costs)), [len(row) for row in costs])
    one_each = (layer == np.arange(len(costs))[:, None]).astype(float)
    result = milp(
        loss,
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(cost[None], -np.inf, 1),
        ],
        integrality=np.ones(len(cost), dtype=np.int64),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    chosen = np.asarray(result.x)
    return [int(chosen[layer == row].argmax()) for row in range(len(costs))]


def greedy(costs: Table, losses: Table, total: float) -> list[int]:
    """The candidate `[L]` of each layer, by steps down from the last ones.

    A step goes to the next candidate below that costs less. Raises `ValueError` where even the cheapest candidates
    cost more.
    """
    _affordable(costs, total)
    chosen = [len(row) - 1 for row in costs]
    while sum(row[c] for row, c in zip(costs, chosen, strict=True)) > total:
        rates = []
        for layer, at in enumerate(chosen):
            now = costs[layer][at]
            to = next((c for c in range(at - 1, -1, -1) if costs[layer][c] < now), None)
            if to is not None:
                hurts = losses[layer][to] - losses[layer][at]
                rates.append((hurts / (now - costs[layer][to]), layer, to))
        _, layer, to = min(rates)
        chosen[layer] = to
    return chosen


def _affordable(costs: Table, total: float) -> None:
    least = sum(min(row) for row in costs)
    if least > total:
        raise ValueError(f"the cheapest candidates cost {least:.4g}, the budget is {total:.4g}")
