"""Convert a checkpoint that is larger than memory: one layer at a time, and all tokens through it.

    first pass    every layer of the source is read once, measured, fitted and written
    allocate      the density of every layer, from what each was measured to lose
    second pass   every layer of the result is read: thresholds are set, quality is measured

Memory holds one layer and the tokens that are looked at, whatever the size of the model.
"""

from dataclasses import replace
from typing import Any

from moefy.conversion.allocate import Candidate, budget_record, nearest, spread
from moefy.conversion.fit import planned_active
from moefy.conversion.streamed.layerwise import require_a_chain
from moefy.conversion.streamed.passes import SOURCE, FirstPass, SecondPass, with_density
from moefy.conversion.streamed.states import States
from moefy.conversion.task import Conversion, Converted, Reading
from moefy.errors import RecipeError
from moefy.methods.budget import greedy
from moefy.methods.tables import ROUTERS, SELECTIONS, choose
from moefy.models.artefact import Artefact

EVALUATED_TOKENS = 1024
"""Tokens of the evaluation shard that the result is measured on; `moefy eval` reads more."""


def refuse(task: Conversion) -> None:
    """Raise `RecipeError` for what needs the whole model in memory, and `UnsupportedModel` for models
    that do not run layer by layer."""
    recipe, processes = task.recipe, task.processes.count
    require_a_chain(task.checkpoint)
    needs = {
        "an adapter": task.adapter,
        f"{processes} processes": processes > 1,
        f"budget.name={recipe.budget.name}": recipe.allocates and recipe.budget.name != "greedy",
        "a target for KL": recipe.budget.target_kl is not None,
        f"distil.steps={recipe.distil.steps}": recipe.distil.steps > 0,
        "attention.density": bool(task.todo.heads),
        "router.look_ahead": recipe.router.look_ahead,
        f"selection.name={recipe.selection.name}": not choose(
            SELECTIONS, "selection", recipe.selection.name
        ).by_score,
    }
    for what, wanted in needs.items():
        if wanted:
            raise RecipeError(
                f"{what}: needs the whole model in memory, which streaming avoids; leave it out (the "
                "recipes fast and largest_inputs can be streamed), or convert without --stream"
            )


def states_of(task: Conversion) -> Reading:
    """What goes through the layers: documents for routers only if something is fitted on them."""
    fits = any(
        choose(ROUTERS, "router", entry.router["name"]).trainable
        or entry.compensation["name"] != "none"
        for entry in task.todo.layers
    )
    return {role: group for role, group in task.reading.items() if fits or role != "router"}


def disk(task: Conversion) -> int:
    """Bytes of disk that streaming needs: the result, and the states before and after one layer."""
    groups = [*states_of(task).values(), (task.evaluated, 0)]
    if task.rounds:
        groups.append((task.evaluated, 0))
    positions = sum(b.inputs["input_ids"].numel() for batches, _ in groups for b in batches)
    width = max(site.width for site in task.todo.sites)
    # Dense and sparse, in at most 4 bytes.
    return task.todo.weights + task.todo.other + 2 * 2 * 4 * positions * width


def stream(task: Conversion, *, follow: bool = True) -> Converted:
    """Convert layer by layer into `task.finished`; a run that was killed goes on at the layer it was in.

    `follow` fits routers on what arrives through the experts before them; without it on what the
    dense layers send, as conversion in memory does.
    """
    reading = states_of(task)
    with task.clock.stage("stream"):
        dense, sparse = FirstPass(task, reading, follow=follow).run()
    made = task.collect()
    with task.clock.stage("verify"):
        if task.recipe.allocates:
            held = dense["held-out"], sparse["held-out"]
            second, tuning = _allocate(task, made.artefact, reading, *held)
        else:
            second, tuning = SecondPass(task, made.artefact, {}), {}
            second.run(None)
        source = dense.get(SOURCE)
        evaluation, error = second.record(source), second.error(dense["probe"])
        rounding = None if source is None else second.distance(source, second.dense)
    return replace(
        made, artefact=second.artefact, tuning=tuning, error=error, evaluation=evaluation,
        rounding=rounding,
    )  # fmt: skip


def _allocate(
    task: Conversion, fitted: Artefact, reading: Reading, dense: States, sparse: States
) -> tuple[SecondPass, dict[str, Any]]:
    """The model with the better of two densities on held-out documents: by layer, or the same for all.

    `dense` and `sparse` are the states behind the last layer, at equal densities.
    """
    rows = _candidates(task)
    planned = [
        planned_active(task.todo, site.index, entry.shared)
        for site, entry in zip(task.todo.sites, fitted.layers, strict=True)
    ]
    uniform = [nearest(row, k) for row, k in zip(rows, planned, strict=True)]
    chosen = spread(rows, uniform, greedy)

    def checked(picked: list[int]) -> SecondPass:
        taken = [row[at] for row, at in zip(rows, picked, strict=True)]
        second = SecondPass(task, with_density(fitted, taken), reading)
        second.run([one.active for one in taken])
        return second

    second = checked(chosen)
    kl = second.distance(dense, second.sparse["held-out"])
    kl_uniform = kl if chosen == uniform else second.distance(dense, sparse)
    better = chosen if kl < kl_uniform else uniform
    if better != chosen:
        del second  # before another one is made
        second = checked(uniform)
    least = min(kl, kl_uniform)
    return second, {"budget": budget_record(task.recipe, rows, better, uniform, least, kl_uniform)}


def _candidates(task: Conversion) -> list[list[Candidate]]:
    """What the first pass has found of every layer at several densities; compensations are not kept."""
    kind = choose(SELECTIONS, "selection", task.recipe.selection.name)
    parts = (task.stages.read(f"layers/{site.index}") for site in task.todo.sites)
    return [
        [
            Candidate(one["active"], kind(**one["selection"]), {}, one["cost"], one["loss"])
            for one in part["candidates"]
        ]
        for part in parts
    ]
