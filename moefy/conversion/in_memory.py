"""Convert in memory: capture what layers read, fit each of them, tune all together.

    model, made = in_memory(Conversion.planned(checkpoint, recipe, corpus, folder, report=report))

`convert` takes the same steps and writes the result; every step takes up what is there of it.

Shapes: T tokens, D width, N neurons, E experts.
"""

from dataclasses import asdict, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from moefy.conversion.allocate import needs_tuning, tune
from moefy.conversion.capture import Captured, capture
from moefy.conversion.layer import LayerSample, fit_heads, fit_layer, layer_sample, split_layer
from moefy.conversion.task import Conversion, Converted
from moefy.experts.loading import moefied, with_routing_of
from moefy.methods.partition import Partition
from moefy.models.heads import read_heads
from moefy.models.locate import Place, Site, read_mlp
from moefy.models.mlp import DenseMlp, HeadOutputs
from moefy.run.memory import give_back


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
        moefied(model, made.artefact, permute=True)
        record = tune(model, task, samples)
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
