"""Convert a checkpoint that is larger than memory: one layer at a time, and all tokens through it.

    first pass    every layer of the source is read once, measured, fitted and written
    allocate      the density of every layer, from what each was measured to lose
    second pass   every layer of the result is read once: thresholds are set, quality is measured

Memory holds one layer and the tokens that are looked at, whatever the size of the model.
"""

import json
from typing import Any

from moefy.artefact import Artefact
from moefy.errors import RecipeError
from moefy.fitted import collect
from moefy.job import Converted, Job, Reading
from moefy.plan import Plan
from moefy.processes import Processes
from moefy.recipe import Recipe
from moefy.routing import ROUTERS, SELECTIONS, choose
from moefy.routing.budget import greedy
from moefy.streaming.layers import FirstPass
from moefy.streaming.second_pass import SecondPass, with_density

EVALUATED_TOKENS = 1024
"""Tokens of the evaluation shard that the result is measured on; `moefy eval` reads more."""


def refuse(todo: Plan, recipe: Recipe, adapter: bool, processes: Processes) -> None:
    """Raise `RecipeError` for what needs the whole model in memory."""
    needs = {
        "an adapter": adapter,
        f"{processes.count} processes": processes.count > 1,
        f"budget.name={recipe.budget.name}": recipe.allocates and recipe.budget.name != "greedy",
        "a target for KL": recipe.budget.target_kl is not None,
        f"distil.steps={recipe.distil.steps}": recipe.distil.steps > 0,
        "attention.density": bool(todo.heads),
        "router.look_ahead": recipe.router.look_ahead,
        f"selection.name={recipe.selection.name}": not choose(
            SELECTIONS, "selection", recipe.selection.name
        ).by_score,
    }
    for what, given in needs.items():
        if given:
            raise RecipeError(
                f"{what}: needs the whole model in memory, which streaming avoids; leave it out (the "
                "recipes fast and default can be streamed), or convert without --stream"
            )


def sample_reading(todo: Plan, reading: Reading) -> Reading:
    """What is to be carried: documents for routers only where something is fitted on them."""
    fits = any(
        choose(ROUTERS, "router", entry.router["name"]).trainable
        or entry.compensation["name"] != "none"
        for entry in todo.layers
    )
    return {name: group for name, group in reading.items() if fits or name != "router"}


def stream(job: Job, *, follow: bool = True) -> Converted:
    """Convert layer by layer into `job.finished`; a run that was killed goes on at the layer it was in.

    `follow` fits routers on what arrives through the experts before them; without it on what the
    dense layers send, as conversion in memory does.
    """
    recipe = job.recipe
    reading = sample_reading(job.todo, job.reading)
    with job.clock.stage("stream"):
        first = FirstPass(job, reading, follow=follow)
        first.run()
    fitted, fits, _ = collect(job)
    held_dense, held_sparse = (group["held-out"] for group in (first.dense, first.sparse))

    def checked(artefact: Artefact, active: list[float] | None) -> tuple[Artefact, SecondPass]:
        second = SecondPass(job, artefact, reading)
        return second.run(active), second

    tuning: dict[str, Any] = {}
    with job.clock.stage("verify"):
        if recipe.allocates:
            chosen, uniform = _allocated(job)
            artefact, second = checked(*with_density(fitted, chosen))
            kl, kl_uniform = (
                second.distance(held_dense, sparse)
                for sparse in (second.sparse["held-out"], held_sparse)
            )
            kept = uniform if kl_uniform < kl or chosen == uniform else chosen
            tuning["budget"] = {
                "name": recipe.budget.name,
                "per": recipe.budget.per,
                "active": [one["active"] for one in kept],
                "held_out_kl": min(kl, kl_uniform),
                "held_out_kl_uniform": kl_uniform,
                "kept": recipe.budget.name if kept is chosen else "uniform",
            }
            if kl_uniform < kl:
                artefact, second = checked(fitted, None)
        else:
            artefact, second = checked(fitted, None)
        evaluation = second.record()
        error = second.error(first.dense["probe"])
    return Converted(artefact, error, evaluation, tuning, fits)


def _allocated(job: Job) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The candidate of every layer that the greedy budget takes, and the one that is planned."""
    rows = [
        json.loads((job.work / "layers" / f"{site.index}.json").read_text())["candidates"]
        for site in job.todo.sites
    ]
    planned = [
        min(row, key=lambda one, k=k: abs(one["active"] - k))  # type: ignore[misc]
        for row, k in zip(rows, job.todo.k, strict=True)
    ]
    costs, losses = ([[one[key] for one in row] for row in rows] for key in ("cost", "loss"))
    total = sum(one["cost"] for one in planned) * (1 + 1e-9)
    picked = greedy(costs, losses, total)
    return [row[at] for row, at in zip(rows, picked, strict=True)], planned
