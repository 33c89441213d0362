"""Convert a checkpoint that is larger than memory: one layer at a time, and all tokens through it.

    first pass    every layer of the source is read once, measured, fitted and written
    allocate      the density of every layer, from what each was measured to lose
    second pass   every layer of the result is read: thresholds are set, quality is measured

Memory holds one layer and the tokens that are looked at, whatever the size of the model.
"""

import json
from typing import Any

from moefy.conversion.allocate import Candidate, nearest, spread
from moefy.conversion.job import Converted, Job, Reading, collect
from moefy.conversion.plan import Plan
from moefy.conversion.settle import planned_active
from moefy.conversion.streamed.carried import Carried
from moefy.conversion.streamed.first_pass import FirstPass
from moefy.conversion.streamed.second_pass import SecondPass, with_density
from moefy.conversion.streamed.skeleton import require_a_chain
from moefy.data.corpus import Batch
from moefy.errors import RecipeError
from moefy.methods.budget import greedy
from moefy.methods.tables import ROUTERS, SELECTIONS, choose
from moefy.models.artefact import Artefact
from moefy.models.checkpoint import Checkpoint
from moefy.recipe import Recipe
from moefy.run.processes import Processes

EVALUATED_TOKENS = 1024
"""Tokens of the evaluation shard that the result is measured on; `moefy eval` reads more."""


def refuse(
    checkpoint: Checkpoint, todo: Plan, recipe: Recipe, adapter: bool, processes: Processes
) -> None:
    """Raise `RecipeError` for what needs the whole model in memory, and `UnsupportedModel` for models
    that do not run layer by layer."""
    require_a_chain(checkpoint)
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


def disk(todo: Plan, reading: Reading, evaluated: list[Batch]) -> int:
    """Bytes of disk that streaming needs: the result, and the states before and after one layer."""
    groups = [*sample_reading(todo, reading).values(), (evaluated, 0)]
    positions = sum(b.inputs["input_ids"].numel() for batches, _ in groups for b in batches)
    width = max(site.width for site in todo.sites)
    # Dense and sparse, in at most 4 bytes.
    return todo.weights + todo.other + 2 * 2 * 4 * positions * width


def stream(job: Job, *, follow: bool = True) -> Converted:
    """Convert layer by layer into `job.finished`; a run that was killed goes on at the layer it was in.

    `follow` fits routers on what arrives through the experts before them; without it on what the
    dense layers send, as conversion in memory does.
    """
    reading = sample_reading(job.todo, job.reading)
    with job.clock.stage("stream"):
        dense, sparse = FirstPass(job, reading, follow=follow).run()
    fitted, fits, _ = collect(job)
    with job.clock.stage("verify"):
        if job.recipe.allocates:
            second, tuning = _allocate(job, fitted, reading, dense["held-out"], sparse["held-out"])
        else:
            second, tuning = SecondPass(job, fitted, {}), {}
            second.run(None)
        evaluation, error = second.record(), second.error(dense["probe"])
    return Converted(second.artefact, error, evaluation, tuning, fits)


def _allocate(
    job: Job, fitted: Artefact, reading: Reading, dense: Carried, sparse: Carried
) -> tuple[SecondPass, dict[str, Any]]:
    """The model with the better of two densities on held-out documents: by layer, or the same for all.

    `dense` and `sparse` are the states behind the last layer, at equal densities.
    """
    rows = _candidates(job)
    planned = [
        planned_active(job.todo, site.index, entry.shared)
        for site, entry in zip(job.todo.sites, fitted.layers, strict=True)
    ]
    uniform = [nearest(row, k) for row, k in zip(rows, planned, strict=True)]
    chosen = spread(rows, uniform, greedy)

    def checked(picked: list[int]) -> SecondPass:
        taken = [row[at] for row, at in zip(rows, picked, strict=True)]
        second = SecondPass(job, with_density(fitted, taken), reading)
        second.run([one.active for one in taken])
        return second

    second = checked(chosen)
    kl = second.distance(dense, second.sparse["held-out"])
    kl_uniform = kl if chosen == uniform else second.distance(dense, sparse)
    kept = chosen if kl < kl_uniform else uniform
    if kept != chosen:
        del second  # before another one is made
        second = checked(uniform)
    record = {
        "name": job.recipe.budget.name,
        "per": job.recipe.budget.per,
        "active": [row[at].active for row, at in zip(rows, kept, strict=True)],
        "held_out_kl": min(kl, kl_uniform),
        "held_out_kl_uniform": kl_uniform,
        "kept": "uniform" if kept == uniform else job.recipe.budget.name,
    }
    return second, {"budget": record}


def _candidates(job: Job) -> list[list[Candidate]]:
    """What the first pass has found of every layer at several densities; compensations are not kept."""
    kind = choose(SELECTIONS, "selection", job.recipe.selection.name)
    files = (job.work / "layers" / f"{site.index}.json" for site in job.todo.sites)
    return [
        [
            Candidate(one["active"], kind(**one["selection"]), {}, one["cost"], one["loss"])
            for one in json.loads(file.read_text())["candidates"]
        ]
        for file in files
    ]
