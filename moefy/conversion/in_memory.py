"""Convert in memory: capture what layers read, fit each of them, tune all together.

    model, made = in_memory(Conversion.planned(checkpoint, recipe, corpus, folder, report=report))

`convert` takes the same steps and writes the result; every step takes up what is there of it. `tune` is
what needs all layers at once: densities (`moefy.conversion.allocate`), then distillation
(`moefy.conversion.backward`). It looks at the router shard and its hold-out, never at evaluation documents.

Shapes: T tokens, D width, N neurons, E experts.
"""

from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from moefy.conversion.allocate import HeldOut, allocate
from moefy.conversion.backward import distil_layer, distil_model, sensitivities
from moefy.conversion.fit import (
    planned_active,
    recalibrate,
    varies,
)
from moefy.conversion.layer import (
    Captured,
    LayerSample,
    capture,
    fit_heads,
    fit_layer,
    layer_sample,
    split_layer,
    tokens_of,
)
from moefy.conversion.task import Conversion, Converted
from moefy.data.corpus import Batch, make_batches
from moefy.evaluation.outputs import (
    BACKWARD_TOKENS,
    LOGITS_BYTES,
    Outputs,
    run_outputs,
)
from moefy.experts.loading import moefied
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.experts.stock_names import with_routing_of
from moefy.methods.partition import Partition
from moefy.models.heads import read_heads
from moefy.models.locate import Place, Site, read_mlp
from moefy.models.mlp import DenseMlp, HeadOutputs
from moefy.recipe import Recipe
from moefy.run.memory import free_memory, give_back


def in_memory(task: Conversion) -> tuple[PreTrainedModel, Converted]:
    """The moefied model, and what was found on the way."""
    made = fitted(task)
    model = task.load()
    moefied(model, made.artefact, permute=True)
    return model, made


def fitted(task: Conversion) -> Converted:
    """Capture, fit, tune; the first process's is the result, the others have helped."""
    with task.clock.stage("measure"):
        samples = measure(task)
        give_back()
    with task.clock.stage("fit"):
        _fit(task, samples)
    with task.clock.stage("tune"):
        made = _tuned(task, samples)
        give_back()
    return made


def measure(task: Conversion) -> dict[str, Captured]:
    """Run the dense model once over all that is to be read and keep a sample of what layers see."""
    todo = task.todo
    places: list[Place] = [*todo.sites]
    for site in todo.head_sites:
        places += site.places(len(todo.sites))
    samples: dict[str, Captured] = {}
    for role, (_, limit) in task.reading.items():
        folder = (task.captures or task.work / "activations") / f"{task.recipe.context}-{limit}"
        folder.mkdir(parents=True, exist_ok=True)
        samples[role] = Captured(folder, role)
    missing = [role for role, sample in samples.items() if not sample.complete]
    model = task.load() if missing else None
    for role in missing:
        assert model is not None
        batches, limit = task.reading[role]
        capture(
            model, places, batches, samples[role],
            limit=limit, seed=task.recipe.seed, report=task.report, processes=task.processes,
        )  # fmt: skip
    return samples


def _fit(task: Conversion, samples: dict[str, Captured]) -> None:
    """Fit every layer that is not there yet, each from its own weights and sample alone."""
    todo, recipe, mine = task.todo, task.recipe, task.processes.mine
    weights = task.weights()
    for site in task.report.track(mine(todo.sites), "fit layers"):
        name = f"layers/{site.index}"
        if not task.stages.has(name):
            mlp = read_mlp(site, weights).to(torch.float32)
            sample = layer_sample(samples, todo, site)
            split = _partition(task, mlp, site, sample)
            task.keep(name, fit_layer(mlp, todo, site, recipe, sample, split))
    for block in task.report.track(mine(todo.head_sites), "fit heads") if todo.head_sites else ():
        name = f"heads/{block.index}"
        if not task.stages.has(name):
            heads = HeadOutputs.behind(read_heads(block, weights).down_ND.float())
            task.keep(name, fit_heads(heads, todo, block, recipe, samples))
    task.processes.wait()


def _partition(task: Conversion, mlp: DenseMlp, site: Site, sample: LayerSample) -> Partition:
    """The partition of one layer; every conversion that asks for the same takes it over."""
    recipe, todo = task.recipe, task.todo
    asked = {
        **asdict(recipe.partition), "experts": todo.layers[site.index].experts, "seed": recipe.seed,
        "context": recipe.context, "active": todo.k[site.index] if recipe.partition.shared is None else None,
    }  # fmt: skip

    def make() -> dict[str, Any]:
        split = split_layer(mlp, todo, site, recipe, sample)
        return {"owner": split.owner_N.tolist(), "experts": split.experts, "shared": split.shared}

    part = task.partitions.run(f"partition-{site.index}", asked, make)
    return Partition(torch.tensor(part["owner"]), part["experts"], part["shared"])


def _tuned(task: Conversion, samples: dict[str, Captured]) -> Converted:
    """What was fitted, tuned where the recipe asks for it; the model is made and let go here."""
    made = task.collect()
    if not needs_tuning(task.recipe):
        return made
    name = "tuned/record"
    if not task.stages.has(name):
        model = task.load()
        # What is promised is promised of the source, not of what is left of it when it is rounded.
        source = _outputs(model, _held_out(task)) if task.rounds else None
        moefied(model, made.artefact, permute=True)
        record = tune(model, task, samples, source)
        if task.processes.main:
            artefact = with_routing_of(model)
            record["selections"] = [entry.selection for entry in artefact.layers]
            task.stages.keep(name, record, artefact.tensors)
    task.processes.wait()
    record = task.stages.read(name)
    layers = [
        replace(entry, selection=selection)
        for entry, selection in zip(made.artefact.layers, record.pop("selections"), strict=True)
    ]
    artefact = replace(made.artefact, layers=layers, tensors=task.stages.tensors(name))
    return replace(made, artefact=artefact, tuning=record)


def needs_tuning(recipe: Recipe) -> bool:
    """Whether the recipe asks for more than layer by layer fitting."""
    return recipe.allocates or recipe.distil.steps > 0 or varies(recipe)


def learnable(model: PreTrainedModel) -> bool:
    """Whether distillation has anything to train."""
    modules = sparse_mlps(model).values()
    parts = (part for m in modules for part in (m.router, m.compensation))
    return any(True for part in parts for _ in part.parameters())


def _held_out(task: Conversion) -> list[Batch]:
    """Held-out documents in batches that a backward pass can take."""
    samples = [sample for batch in task.reading["held-out"][0] for sample in batch.samples]
    return make_batches(samples, tokens=BACKWARD_TOKENS)


@torch.no_grad()
def _outputs(model: PreTrainedModel, batches: list[Batch]) -> list[Outputs]:
    return [run_outputs(model, batch) for batch in batches]


def tune(
    model: PreTrainedModel,
    task: Conversion,
    samples: dict[str, Captured],
    source: list[Outputs] | None = None,
) -> dict[str, Any]:
    """Allocate and distil as the recipe says, in place; returns what was measured.

    `source` has what the dense model puts out for held-out documents, if `model` is rounded.

    All processes call this: layers are shared out where each is measured by itself; the first process
    does the rest, and its model is the result.
    """
    recipe, held = task.recipe, _held_out(task)
    metric, dense = None, None
    # All are to measure alike, and all at once.
    fits = task.processes.once(lambda: _fits(model, BACKWARD_TOKENS * task.processes.count))
    if recipe.allocates and recipe.budget.weighs_errors and fits:
        metric, dense = sensitivities(model, task.todo.sites, held, seed=recipe.seed)
    check = HeldOut(model, held, source or dense)
    active = {i: planned_active(task.todo, i, m.shared) for i, m in sparse_mlps(model).items()}
    record: dict[str, Any] = {}
    if recipe.allocates:
        record["budget"] = allocate(model, task, samples, check, metric)
        active = dict(enumerate(record["budget"].get("active", [])))
    if not task.processes.main:
        return record
    if not recipe.allocates and varies(recipe):
        recalibrate(model, recipe, held, active)
    if recipe.distil.steps:
        record |= _distilled(model, task, samples, check, active)
    target = recipe.budget.target_kl
    if target is not None:
        known = {} if recipe.distil.steps else record["budget"]
        record["held_out_kl"] = reached = known.get("held_out_kl") or check.distance()
        if reached > target:
            remedy = "; store weights in more bits (--bits 8)" if task.rounds else ""
            task.report.say(f"held-out KL {reached:.4g} is over the target of {target:g}{remedy}")
    return record


def _distilled(
    model: PreTrainedModel,
    task: Conversion,
    samples: dict[str, Captured],
    check: HeldOut,
    active: dict[int, int],
) -> dict[str, Any]:
    """Distil, and set thresholds anew; what it brought, as `distillation`."""
    recipe, report = task.recipe, task.report
    if not learnable(model):
        report.say("nothing to distil: neither routers nor compensations have parameters")
        return {}
    before, scope = check.distance(), recipe.distil.scope
    if scope == "auto":
        scope = "model" if _fits(model, BACKWARD_TOKENS) else "layer"
    if scope == "model":
        batches = task.distilled_on or task.reading["router"][0]
        distil_model(model, batches, recipe.distil, report=report, seed=recipe.seed)
    else:
        for index, module in sparse_mlps(model).items():
            tokens = tokens_of(samples["router"], task.todo, task.todo.sites[index], module.device)
            distil_layer(module, tokens, recipe.distil, report=report, seed=recipe.seed)
    if varies(recipe):
        recalibrate(model, recipe, check.batches, active)
    record = {"scope": scope, "steps": recipe.distil.steps, "held_out_before": before}
    return {"distillation": {**record, "held_out_after": check.distance()}}


def _fits(model: PreTrainedModel, tokens: int) -> bool:
    """Whether a backward pass over so many tokens fits in the memory that is free now.

    Counted per token: what autograd keeps of every MLP and attention block; and a chunk of logits
    with softmax and gradient.
    """
    per_token = sum(
        6 * m.weights.neurons + 16 * m.weights.width for m in sparse_mlps(model).values()
    )
    needed = 4 * tokens * per_token + 6 * LOGITS_BYTES
    if model.device.type == "cuda":
        return needed < torch.cuda.mem_get_info(model.device)[0]
    return needed < free_memory()
