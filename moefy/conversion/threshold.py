"""One threshold for all layers, on scores that say what leaving a neuron out is expected to cost.

Routers that can `weigh` contributions score in the same unit in every layer (the root of nats); which
layer is worth how much, and which token, then needs no search: the same threshold everywhere spends what is
read where it saves most. What is left to find is one number: from the density that is wanted, or from
the KL that may be lost.

Shapes: T tokens, D width, E routed experts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from moefy.conversion.fit import refit_compensation
from moefy.conversion.layer import Captured, tokens_of
from moefy.conversion.task import Conversion
from moefy.evaluation.routing import bits_read
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.methods.selections import Threshold
from moefy.run.memory import give_back

SCORED_TOKENS = 1024
"""Held-out tokens of every layer whose scores set the threshold."""
FITTED_TOKENS = 1024
"""Tokens on which a compensation is fitted while the threshold is looked for."""
LEAST, MOST = 0.02, 0.98
"""Densities between which a target for KL is looked for."""
TRIALS = 5
"""Densities that are measured at most."""
OTHERS = (0.1, 0.02, 0.01)
"""Targets of which is said what they would take."""
NEAR = 0.08
"""How near to the target, as a share of it, ends the search."""


@dataclass(frozen=True)
class _Scores:
    """Scores of the routed experts of all layers on held-out tokens."""

    rows: list[NDArray[np.float32]]
    """Of every layer, in rising order."""
    weight: list[float]
    """Share of every layer in the weights of all MLPs."""
    experts: list[int]
    """Experts of every layer, and how many of them always run."""
    shared: list[int]

    def threshold(self, density: float) -> float:
        """The score under which a share `density` of all neurons runs, by bisection over all layers."""
        low, high = min(float(r[0]) for r in self.rows), max(float(r[-1]) for r in self.rows)
        low = max(low, high * 1e-9)
        for _ in range(60):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if self.density(middle) > density else (low, middle)
        return high

    def density(self, threshold: float) -> float:
        """The share of all neurons that run: those of shared experts, and whose score exceeds a threshold."""
        layers = zip(self.weight, self.active(threshold), self.shared, self.experts, strict=True)
        return sum(w * (active + shared) / experts for w, active, shared, experts in layers)

    def active(self, threshold: float) -> list[float]:
        """Routed experts of every layer that run on average under a threshold."""
        layers = zip(self.rows, self.experts, self.shared, strict=True)
        return [
            (experts - shared) * (1 - float(np.searchsorted(row, threshold, "right")) / len(row))
            for row, experts, shared in layers
        ]


@torch.no_grad()
def one_threshold(
    model: PreTrainedModel,
    task: Conversion,
    samples: dict[str, Captured],
    distance: Callable[[], float],
    metric: list[Tensor],
) -> dict[str, Any]:
    """Set the threshold of all layers, and fit what stands in for the rest; what was measured.

    `distance` measures KL (nats a token) on held-out documents, `metric` is what an error of each layer's output
    costs: `[D, D]`, or a number. With `budget.target_kl` the least density is taken that keeps to it.
    """
    modules, recipe = list(sparse_mlps(model).values()), task.recipe
    for module, metric_DD in zip(modules, metric, strict=True):
        module.router.weigh(module.routed, metric_DD)
    scores = _scores(task, modules, samples)
    trials: list[dict[str, float]] = []

    def measured(density: float, tokens: int) -> float:
        _set(task, modules, samples, scores.threshold(density), tokens)
        trials.append({"density": density, "held_out_kl": distance()})
        task.report.say(f"density {density:.3f}: held-out KL {trials[-1]['held_out_kl']:.4g}")
        return trials[-1]["held_out_kl"]

    density = recipe.density
    if recipe.budget.target_kl is not None:
        density = _within(recipe.budget.target_kl, density, lambda d: measured(d, FITTED_TOKENS))
    kl, threshold = measured(density, recipe.router.tokens), scores.threshold(density)
    elsewhere = _elsewhere(task, modules, scores, trials)
    return {
        "name": recipe.budget.name, "per": recipe.budget.per, "threshold": threshold, "density": density,
        "active": scores.active(threshold), "held_out_kl": kl, "trials": trials, "elsewhere": elsewhere,
    }  # fmt: skip


def _elsewhere(
    task: Conversion, modules: list[SparseMlp], scores: _Scores, trials: list[dict[str, float]]
) -> list[dict[str, float]]:
    """What other targets would take, along the line through the densities that were tried; it is said as well."""
    tried = {t["density"]: math.log(max(t["held_out_kl"], 1e-12)) for t in trials}
    if len(tried) < 2:
        return []
    slope, start = np.polyfit([*tried], [*tried.values()], 1)
    found = []
    for target in OTHERS if slope < 0 else ():
        density = (math.log(target) - start) / slope
        if LEAST <= density <= MOST:
            bits = _bits(modules, scores, density)
            found.append({"held_out_kl": target, "density": density, "bits_read": bits})
            task.report.say(
                f"a KL of {target:g} would take about {bits:.1f} bits read a weight (density {density:.2f})"
            )
    return found


def _bits(modules: list[SparseMlp], scores: _Scores, density: float) -> float:
    """Bits read per MLP weight at a density."""
    read = weights = 0.0
    for m, active in zip(modules, scores.active(scores.threshold(density)), strict=True):
        mlp, share = m.weights, (active + m.shared) / m.experts
        read += bits_read(mlp, m.router, m.compensation, share, experts=m.experts, shared=m.shared)
        weights += mlp.matrices * mlp.neurons * mlp.width
    return read / weights


def _within(target: float, start: float, kl_at: Callable[[float], float]) -> float:
    """The least density whose KL is within a target.

    The logarithm of KL falls nearly in proportion to the density: the next trial is where a line through the
    last two meets the target, kept within what is known to be too low and high enough.
    """
    low, high = LEAST, MOST
    at, slope, before = start, -7.0, None
    for _ in range(TRIALS):
        kl = kl_at(at)
        gap = math.log(max(kl, 1e-12) / target)
        if before is not None and at != before[0]:
            slope = min((gap - before[1]) / (at - before[0]), -1.0)
        before = (at, gap)
        if gap > 0:
            low = max(low, at)
        else:
            high = min(high, at)
        if -NEAR <= gap <= 0 or high - low < 0.007:
            break
        # A little on the safe side, so that the last trial is one that keeps to the target.
        at = min(max(at - (gap + NEAR / 2) / slope, low + 0.003), high - 0.003)
    return high


def _scores(task: Conversion, modules: list[SparseMlp], samples: dict[str, Captured]) -> _Scores:
    rows, sizes = [], []
    for index, module in enumerate(task.report.track(modules, "score neurons")):
        tokens = tokens_of(samples["held-out"], task.todo, task.todo.sites[index], module.device)
        routed = module.routed.to(torch.float32)
        chunks = tokens.some(SCORED_TOKENS).chunks()
        scored = torch.cat([module.router(x_TD, routed) for _, x_TD in chunks])
        rows.append(np.sort(scored.flatten().cpu().numpy()))
        sizes.append(module.weights.neurons * module.weights.width)
        give_back()
    shares = [size / sum(sizes) for size in sizes]
    return _Scores(rows, shares, [m.experts for m in modules], [m.shared for m in modules])


def _set(
    task: Conversion,
    modules: list[SparseMlp],
    samples: dict[str, Captured],
    threshold: float,
    tokens: int,
) -> None:
    """Take a threshold in every layer, and fit the compensations to what it leaves out."""
    for index, module in enumerate(modules):
        module.selection = Threshold(threshold)
        if module.compensation.adds:
            seen = tokens_of(samples["router"], task.todo, task.todo.sites[index], module.device)
            refit_compensation(module, seen.some(tokens))
            give_back()
