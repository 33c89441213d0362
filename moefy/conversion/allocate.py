"""The density of each layer, chosen for all layers at once.

`allocate` measures, for every layer and several densities, what the model loses when that layer
alone is sparse, and lets `moefy.methods.budget` choose; the choice is kept only where it measures
better than the same density everywhere. It looks at the router shard and its hold-out, never at evaluation
documents.

Shapes: T tokens, D width, E routed experts, K experts that run.
"""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.conversion.backward import stream_metric
from moefy.conversion.fit import (
    LayerTokens,
    SeenInputs,
    cap,
    fit_compensation,
    planned_active,
    recalibrate,
    recalibrate_on,
    refit_compensation,
    varies,
)
from moefy.conversion.layer import Captured, LayerSample, layer_sample, tokens_of
from moefy.conversion.task import Conversion
from moefy.conversion.threshold import one_threshold
from moefy.data.corpus import Batch
from moefy.evaluation.outputs import (
    Outputs,
    distances,
    judge,
    run_outputs,
)
from moefy.experts.passes import Listener, observing
from moefy.experts.routed import Routed
from moefy.experts.sparse_mlp import SparseMlp, all_experts, sparse_mlps
from moefy.methods.base import Selection
from moefy.methods.budget import Table, greedy, solve
from moefy.methods.compensations import missing
from moefy.models.mlp import DenseMlp
from moefy.recipe import Recipe
from moefy.run.memory import give_back

FACTORS = (0.4, 0.6, 0.8, 1.0, 1.25, 1.6, 2.2, 3.2)
"""Candidate densities of a layer, over the mean density."""

BISECTIONS = 8
TRIAL_TOKENS = 1024
"""Tokens on which the compensation of a candidate is fitted and its output error measured."""


@dataclass(frozen=True)
class Candidate:
    """One layer at one density."""

    active: int
    selection: Selection
    compensation: dict[str, Tensor]
    cost: float
    loss: float


class HeldOut:
    """Held-out documents and what the dense model says of them."""

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, batches: list[Batch], dense: list[Outputs] | None = None
    ) -> None:
        self.model, self.batches = model, batches
        if dense is None:
            with all_experts(model):
                dense = [run_outputs(model, batch) for batch in batches]
        self.dense = dense

    def distance(self, *listeners: Listener, only: Routed | None = None) -> float:
        """What distillation minimises, per token; with `only`, every other layer is dense."""

        def run(batch: Batch) -> Outputs:
            with observing(self.model, batch, *listeners):
                return run_outputs(self.model, batch)

        with nullcontext() if only is None else all_experts(self.model):
            if only is not None:
                only.all_on = False
            judgement = judge(run, self.batches, self.dense, distances)
        give_back()
        return judgement.mean("distance")


@torch.no_grad()
def allocate(
    model: PreTrainedModel,
    task: Conversion,
    samples: dict[str, Captured],
    held: HeldOut,
    metric: list[Tensor] | None,
) -> dict[str, Any]:
    """Choose the density of every layer and set it; returns densities and measured KL.

    `metric`, of every layer, is what its output error costs (`moefy.conversion.backward`); the greedy budget
    takes the residual stream's if there is none.
    """
    recipe, modules = task.recipe, sparse_mlps(model)
    planned = [planned_active(task.todo, index, m.shared) for index, m in modules.items()]
    if recipe.budget.weighs_errors and metric is None:
        metric = stream_metric(model, task.todo.sites, held.batches)
    if recipe.budget.name == "one_threshold":
        assert metric is not None
        main = task.processes.main
        return one_threshold(model, task, samples, held.distance, metric) if main else {}
    rows = _measured(task, modules, planned, samples, held, metric)
    if not task.processes.main:
        return {}
    uniform = [nearest(row, k) for row, k in zip(rows, planned, strict=True)]
    pick = greedy if recipe.budget.name == "greedy" else solve
    densities = _Densities(model, recipe, held, rows)
    if recipe.budget.target_kl is None:
        kl_uniform, kl, chosen = densities.better(spread(rows, uniform, pick), uniform)
    else:
        kl_uniform = densities.recalibrated(uniform)
        kl, chosen = densities.cheapest(pick, recipe.budget.target_kl)
    for index, module in modules.items():
        refit_compensation(
            module, tokens_of(samples["router"], task.todo, task.todo.sites[index], module.device)
        )
        give_back()
    return budget_record(recipe, rows, chosen, uniform, kl, kl_uniform)


def budget_record(
    recipe: Recipe,
    rows: list[list[Candidate]],
    chosen: list[int],
    uniform: list[int],
    kl: float,
    kl_uniform: float,
) -> dict[str, Any]:
    """What was chosen, and what it measures on held-out documents."""
    return {
        "name": recipe.budget.name,
        "per": recipe.budget.per,
        "active": [row[at].active for row, at in zip(rows, chosen, strict=True)],
        "held_out_kl": kl,
        "held_out_kl_uniform": kl_uniform,
        "kept": "uniform" if chosen == uniform else recipe.budget.name,
    }


def _measured(
    task: Conversion,
    modules: dict[int, SparseMlp],
    planned: list[int],
    samples: dict[str, Captured],
    held: HeldOut,
    metric: list[Tensor] | None,
) -> list[list[Candidate]]:
    """The candidates of every layer, measured by all processes together."""
    own: list[tuple[int, list[Candidate]]] = []
    mine = task.processes.mine([*modules.items()])
    for index, module in task.report.track(mine, "measure densities"):
        sample = layer_sample(samples, task.todo, task.todo.sites[index])
        sample = sample.on(module.device)
        loss_of = partial(_loss, held=held, metric=None if metric is None else metric[index])
        own.append((index, candidates(module, planned[index], task.recipe, sample, loss_of)))
        give_back()
    return task.processes.in_order(own)


@dataclass(frozen=True)
class _Densities:
    """A model whose layers are set to one or the other of their candidates; a choice is their numbers."""

    model: PreTrainedModel
    recipe: Recipe
    held: HeldOut
    rows: list[list[Candidate]]

    def put(self, chosen: list[int]) -> dict[int, float]:
        """Set a choice; experts that run in every layer."""
        modules = sparse_mlps(self.model).values()
        for module, row, at in zip(modules, self.rows, chosen, strict=True):
            set_density(module, row[at])
        return {i: self.rows[i][at].active for i, at in enumerate(chosen)}

    def recalibrated(self, chosen: list[int]) -> float:
        """What a choice measures with thresholds set anew: a promise is measured on what will run."""
        active = self.put(chosen)
        if varies(self.recipe):
            recalibrate(self.model, self.recipe, self.held.batches, active)
        return self.held.distance()

    def better(self, chosen: list[int], uniform: list[int]) -> tuple[float, float, list[int]]:
        """KL at uniform density and of the better of two choices, which is set; and which that is."""
        seen, seen_uniform = SeenInputs(), SeenInputs()
        self.put(chosen)
        kl = self.held.distance(seen)
        self.put(uniform)
        kl_uniform = self.held.distance(seen_uniform)
        if kl_uniform < kl:
            chosen, kl, seen = uniform, kl_uniform, seen_uniform
        active = self.put(chosen)
        if varies(self.recipe):
            recalibrate_on(seen, self.model, self.recipe, active)
        return kl_uniform, kl, chosen

    def cheapest(
        self, pick: Callable[[Table, Table, float], list[int]], target: float
    ) -> tuple[float, list[int]]:
        """KL of the cheapest choice within the target, which is set; and which that is."""
        costs, losses = tables(self.rows)
        low, high = sum(min(row) for row in costs), sum(max(row) for row in costs)
        chosen = [len(row) - 1 for row in self.rows]
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            trial = pick(costs, losses, middle)
            if self.recalibrated(trial) <= target:
                chosen, high = trial, middle
            else:
                low = middle
        return self.recalibrated(chosen), chosen


def tables(rows: list[list[Candidate]]) -> tuple[Table, Table]:
    """Costs and losses of every candidate of every layer, as `moefy.methods.budget` takes them."""
    return [[c.cost for c in row] for row in rows], [[c.loss for c in row] for row in rows]


def spread(
    rows: list[list[Candidate]],
    uniform: list[int],
    pick: Callable[[Table, Table, float], list[int]],
) -> list[int]:
    """The candidate of each layer that `pick` takes for what the candidates `uniform` cost together."""
    costs, losses = tables(rows)
    total = sum(row[at] for row, at in zip(costs, uniform, strict=True))
    return pick(costs, losses, total * (1 + 1e-9))


def candidates(
    module: SparseMlp,
    planned: int,
    recipe: Recipe,
    sample: LayerSample,
    loss_of: Callable[[SparseMlp, "Trial"], float],
) -> list[Candidate]:
    """One layer at several densities, cheapest first, each with its own selection and means.

    `planned` routed experts run at the mean density; `loss_of` says what the module, as it is set,
    costs the model.
    """
    experts, routed = module.experts - module.shared, module.routed.to(torch.float32)
    # A target for KL may need every expert of a layer, a mean density never does.
    factors = FACTORS if recipe.budget.target_kl is None else (*FACTORS, experts / planned)
    actives = sorted({min(experts, max(1, round(f * planned))) for f in factors})
    tokens, held = (t.some(TRIAL_TOKENS) for t in (sample.router, sample.held))
    trial = Trial(module, routed, held)
    found = []
    for active in actives:
        selection = type(module.selection).fit(trial.scores_TE, active, cap(recipe, active))
        fit_compensation(module.compensation, module.router, selection, routed, tokens)
        state = {n: v.clone() for n, v in module.compensation.state_dict().items()}
        module.selection = selection
        share = (active + module.shared) / module.experts
        if recipe.budget.per == "time":
            cost = _seconds(module, held)
        else:
            weights = module.weights
            cost = share * weights.matrices * weights.neurons * weights.width
        found.append(Candidate(active, selection, state, cost, loss_of(module, trial)))
    return found


def _loss(module: SparseMlp, trial: "Trial", *, held: HeldOut, metric: Tensor | None) -> float:
    """By measurement on the whole model, or as the metric of the layer's output error says."""
    return held.distance(only=module) if metric is None else trial.output_error(module, metric)


def set_density(module: SparseMlp, candidate: Candidate) -> None:
    """Let a layer run at the density of one of its candidates."""
    module.selection = candidate.selection
    module.compensation.load_state_dict(candidate.compensation)


def nearest(row: list[Candidate], active: int) -> int:
    """The candidate whose number of experts is nearest to `active`."""
    return min(range(len(row)), key=lambda at: abs(row[at].active - active))


class Trial:
    """What is the same for every density of a layer: activations and scores of held-out tokens."""

    def __init__(self, module: SparseMlp, routed: DenseMlp, tokens: LayerTokens) -> None:
        self.routed = routed
        self.x_TD = torch.cat([x_TD for x_TD, _ in tokens.chunks()])
        self.h_TN = torch.cat(list(tokens.activations(routed)))
        self.scores_TE = torch.cat([module.router(x, routed) for _, x in tokens.chunks()])

    def output_error(self, module: SparseMlp, metric: Tensor) -> float:
        """What the layer's output error `e` costs per token: `e^T G e` for a metric `[D, D]`, or
        `w |e|^2` for a number (`moefy.conversion.backward`)."""
        mask_TE = module.selection(self.scores_TE, module.context)
        error_TD = -missing(self.h_TN, mask_TE, self.routed)
        extra_TD = module.compensation(self.x_TD, mask_TE)
        if extra_TD is not None:
            error_TD += extra_TD
        metric = metric.to(error_TD.device)
        weighed_TD = error_TD @ metric if metric.ndim else error_TD * metric
        return (weighed_TD * error_TD).sum().item() / len(error_TD)


def _seconds(module: SparseMlp, tokens: LayerTokens, samples: int = 15) -> float:
    """Median time of one token, router and compensation included."""
    times = []
    for row in range(samples):
        at = row % len(tokens.mlp_TD)
        x_TD, read_TD = (
            t[at : at + 1].to(module.device, module.dtype)
            for t in (tokens.mlp_TD, tokens.router_TD)
        )
        module.context.previous_TD = read_TD
        begin = time.perf_counter()
        module(x_TD)
        if x_TD.is_cuda:
            torch.cuda.synchronize(x_TD.device)
        times.append(time.perf_counter() - begin)
    return sorted(times)[samples // 2]
