"""The main flow: a dense checkpoint goes in, a moefied one comes out. Read it top to bottom.

    plan     which MLPs there are and how they split, from config.json alone
    measure  run the dense model once and keep a sample of every MLP's input
    fit      for each layer: partition, router, selection, compensation; for attention heads as well
    tune     all layers together: density per layer, distillation
    write    the weights in expert order (or the side files alone), and what was fitted
    verify   with every expert on, the result is the dense model; then its quality is measured

Every stage leaves its result in a hidden folder beside the output, so that a run that was killed
goes on where it stopped; the output appears by rename when all is done.

Shapes: T tokens, D width, N neurons, E experts.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy import recipe as recipes
from moefy.conversion.allocate import needs_tuning, tune
from moefy.conversion.capture import Captured, capture
from moefy.conversion.card import model_card
from moefy.conversion.job import Converted, Job, Reading, collect, keep
from moefy.conversion.layer import fit_heads, fit_layer, layer_sample
from moefy.conversion.plan import Plan, describe, plan
from moefy.conversion.streamed import stream as streaming
from moefy.data.corpus import Batch, Corpus, load_corpus
from moefy.data.inputs import read_batches
from moefy.data.shards import EVALUATED_DOCUMENTS, by_role, tokens_of_roles
from moefy.errors import CheckpointError, MoefyError
from moefy.evaluation.evaluate import evaluate
from moefy.evaluation.outputs import difference, run_outputs
from moefy.experts.loading import load, load_dense, moefied, with_routing_of
from moefy.experts.placement import memory_of, placement, running_dtype, stored_dtype
from moefy.experts.sparse_mlp import all_experts
from moefy.models.artefact import FULL, Artefact, write_side_files
from moefy.models.checkpoint import Checkpoint, copy_folder, sha256
from moefy.models.config import read_config
from moefy.models.heads import read_heads
from moefy.models.locate import Place, disk_names, meta_model, read_mlp
from moefy.models.mlp import HeadOutputs
from moefy.models.reorder import reorder
from moefy.recipe import Recipe
from moefy.run.clock import Clock
from moefy.run.computing import asked, now
from moefy.run.console import Reporter
from moefy.run.memory import free_memory, give_back, map_large_blocks, peak_memory
from moefy.run.output import OutputFolder
from moefy.run.processes import launched
from moefy.run.provenance import machine, versions
from moefy.run.stages import digest

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest relative error of the outputs with every expert on; the error itself is recorded."""


@asked
def convert(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    *,
    recipe: Recipe | str | Path = "default",
    corpus: Any = None,
    adapter: bool = False,
    stream: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    batch_size: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Convert the checkpoint `model` (folder, Hub id, or a model in memory) into the folder `out`.

    `recipe` is a `Recipe`, a shipped name or a YAML file; `corpus` is anything `load_corpus` reads.
    With `adapter` only the side files are written and the source stays where it is. `stream` holds
    one layer in memory at a time (`moefy.conversion.streamed`, docs/streaming.md). `resume` takes up a run that
    was interrupted and ends with the same tensors; `overwrite` replaces `out`.

    Under `accelerate launch` documents and layers are shared out over all processes.

    Returns the records that are also in `out/records.json`: `conversion` and `evaluation` (nothing
    in processes other than the first). Raises `MoefyError` for anything that is the user's to mend;
    `out` then is as it was.
    """
    recipe = recipe if isinstance(recipe, Recipe) else recipes.load(recipe)
    processes, clock = launched(), Clock()
    map_large_blocks()
    report = Reporter(quiet=quiet or not processes.main)
    with _on_disk(model, adapter) as folder:
        with clock.stage("plan"):
            checkpoint = Checkpoint.open(folder)
            text = load_corpus(corpus)
            texts = by_role(text, recipe.seed)
            todo = plan(checkpoint, recipe, text.name, adapter=adapter)
            if stream:
                streaming.refuse(checkpoint, todo, recipe, adapter, processes)
            else:
                _require_memory(checkpoint)
            report.say(describe(todo, recipe, stream=stream))
            reading = _reading(checkpoint, todo, recipe, texts)
            held = texts["evaluation"].take(EVALUATED_DOCUMENTS)
            limit = streaming.EVALUATED_TOKENS if stream else None
            evaluated = read_batches(checkpoint, todo.kind, held, recipe.context, limit)
        with clock.stage("hash the source"):
            hashes = processes.once(checkpoint.hashes)
            source = {"name": _lasting_name(folder, adapter), "sha256": hashes}
        output = OutputFolder(Path(out))
        fingerprint = _fingerprint(recipe, source, text, adapter, stream)

        def begin() -> None:
            if not output.begin(fingerprint, resume=resume, overwrite=overwrite):
                output.need(streaming.disk(todo, reading, evaluated) if stream else todo.disk)

        processes.once(begin)
        job = Job(
            checkpoint=checkpoint, todo=todo, recipe=recipe, corpus=text, source=source,
            adapter=adapter, reading=reading, evaluated=evaluated, work=output.work, report=report,
            clock=clock, processes=processes,
        )  # fmt: skip

        with output.full_disk():
            made = streaming.stream(job) if stream else _in_memory(job)
            if made is None:
                return {}
            # Streamed states are rounded to what the weights are stored in.
            dtype = stored_dtype(checkpoint) if stream else running_dtype(checkpoint)
            _require_equal(made.error, dtype)
            report.say(f"with every expert on, equal to the dense model up to {made.error:.1e}")
            with clock.stage("hash the result"):
                _seal(job.finished, made.artefact)
            records = {"conversion": _record(job, made, stream), "evaluation": made.evaluation}
            _describe_output(job, made.artefact, records)
    output.commit(job.finished)
    processes.wait()
    return records


def _in_memory(job: Job) -> Converted | None:
    """Every stage on the whole model, one after the other; None in processes that have only helped."""
    clock = job.clock
    with clock.stage("measure"):
        samples = _measure(job)
        give_back()

    with clock.stage("fit"):
        _fit(job, samples)

    with clock.stage("tune"):
        artefact, fits, head_fits = collect(job)
        artefact, tuning = _tune(job, artefact, samples)
        give_back()

    if not job.processes.main:
        job.processes.wait()
        return None

    with clock.stage("write"):
        _write(job, artefact)

    with clock.stage("verify"):
        sparse = load(job.finished, verify=False, **placement())
        error = _verify(job.checkpoint, sparse, job.evaluated[0])
        give_back()
        quality = evaluate(sparse, job.evaluated, report=job.report)
    return Converted(artefact, error, quality, tuning, fits, head_fits)


@contextmanager
def _on_disk(model: str | Path | PreTrainedModel, adapter: bool) -> Iterator[str | Path]:
    """Where the source lies; a model in memory is saved for as long as the conversion lasts."""
    if isinstance(model, str | Path):
        yield model
        return
    if adapter:
        raise MoefyError("an adapter names the folder of its source: save the model first")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        yield folder


def _require_memory(checkpoint: Checkpoint) -> None:
    """Raise `MoefyError` where running the whole model is hopeless."""
    needed, free = memory_of(checkpoint), free_memory()
    if needed > free and not now().on_gpu:
        raise MoefyError(
            f"{checkpoint.folder}: takes {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are "
            "free; pass --stream, which holds one layer at a time"
        )


def _fingerprint(
    recipe: Recipe, source: dict[str, Any], corpus: Corpus, adapter: bool, streamed: bool
) -> str:
    """Digest of all that decides the result: an unfinished run is only resumed with the same."""
    settings = [
        recipes.to_dict(recipe),
        source,
        corpus.sha256,
        adapter,
        streamed,
        versions(),
        *now().record(),
    ]
    return digest(settings)


def _lasting_name(folder: str | Path, adapter: bool) -> str:
    """A Hub id or, for an adapter, the full path; the folder's name is enough for the full form."""
    path = Path(folder)
    if not path.exists():
        return str(folder)
    return str(path.resolve()) if adapter else path.resolve().name


def _reading(
    checkpoint: Checkpoint, todo: Plan, recipe: Recipe, texts: dict[str, Corpus]
) -> Reading:
    """Batches, and how many of their tokens to keep: for the partition, for the router, and for the
    router's early stopping. A corpus the model cannot read is found here, before anything is made.
    """
    return {
        role: (read_batches(checkpoint, todo.kind, texts[role], recipe.context, limit), limit)
        for role, limit in tokens_of_roles(recipe).items()
    }


def _measure(job: Job) -> dict[str, Captured]:
    """Run the dense model once over all that is to be read and keep a sample of what layers see."""
    folder, todo = job.work / "activations", job.todo
    folder.mkdir(exist_ok=True)
    samples = {name: Captured(folder, name) for name in job.reading}
    missing = [name for name in job.reading if not samples[name].complete]
    model = load_dense(job.checkpoint, **placement()) if missing else None
    places: list[Place] = [*todo.sites]
    for site in todo.head_sites:
        places += site.places(len(todo.sites))
    for name in missing:
        assert model is not None
        batches, limit = job.reading[name]
        capture(
            model, places, batches, samples[name],
            limit=limit, seed=job.recipe.seed, report=job.report, processes=job.processes,
        )  # fmt: skip
    return samples


def _fit(job: Job, samples: dict[str, Captured]) -> None:
    """Fit every layer that is not there yet, each from its own weights and sample alone."""
    checkpoint, todo, recipe = job.checkpoint, job.todo, job.recipe
    mine = job.processes.mine
    stored = disk_names(meta_model(read_config(checkpoint)), checkpoint.tensors)
    get = _reader(checkpoint, {name: disk for disk, name in stored.items()})
    for site in job.report.track(mine(todo.sites), "fit layers"):
        name = f"layers/{site.index}"
        if not job.stages.has(name):
            mlp = read_mlp(site, get).to(torch.float32)
            keep(
                job.stages,
                name,
                fit_layer(mlp, todo, site, recipe, layer_sample(samples, todo, site)),
            )
    for block in job.report.track(mine(todo.head_sites), "fit heads") if todo.head_sites else ():
        name = f"heads/{block.index}"
        if not job.stages.has(name):
            heads = HeadOutputs.behind(read_heads(block, get).down_ND.float())
            keep(job.stages, name, fit_heads(heads, todo, block, recipe, samples))
    job.processes.wait()


def _reader(checkpoint: Checkpoint, names: dict[str, str]) -> Callable[[str], Tensor]:
    """How parameters of the model are had straight from disk, by their names in the model."""

    def get(name: str) -> Tensor:
        if name not in names:
            raise CheckpointError(f"{checkpoint.folder}: no tensor on disk is {name}")
        tensor = checkpoint.read(names[name])
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"{checkpoint.folder}: {names[name]} holds NaN or infinity; the checkpoint is damaged"
            )
        return tensor

    return get


def _tune(
    job: Job, artefact: Artefact, samples: dict[str, Captured]
) -> tuple[Artefact, dict[str, Any]]:
    """Tune the moefied model in memory, where the recipe asks for it, and take back its routing."""
    if not needs_tuning(job.recipe):
        return artefact, {}
    name = "tuned/record"
    if not job.stages.has(name):
        model = load_dense(job.checkpoint, **placement())
        moefied(model, artefact, permute=True)
        training, held = (job.reading[name][0] for name in ("router", "held-out"))
        record = tune(
            model, job.todo, job.recipe, samples, training, held, job.report, job.processes
        )
        if job.processes.main:
            artefact = with_routing_of(model)
            record["selections"] = [entry.selection for entry in artefact.layers]
            job.stages.keep(name, record, artefact.tensors)
    job.processes.wait()
    record = job.stages.read(name)
    layers = [
        replace(entry, selection=selection)
        for entry, selection in zip(artefact.layers, record.pop("selections"), strict=True)
    ]
    return replace(artefact, layers=layers, tensors=job.stages.tensors(name)), record


def _write(job: Job, artefact: Artefact) -> None:
    """Write the result; a folder from a run that was killed here is made anew."""
    shutil.rmtree(job.finished, ignore_errors=True)
    job.finished.mkdir()
    if artefact.form == FULL:
        weights = {file.name for file in job.checkpoint.files}
        copy_folder(job.checkpoint.folder, job.finished, skip=weights)
        reorder(job.checkpoint, job.finished, job.todo.sites, artefact, job.report)
    write_side_files(job.finished, artefact)


def _seal(finished: Path, artefact: Artefact) -> None:
    """Write the side files with the hashes of the weights that lie beside them."""
    hashes = {}
    if artefact.form == FULL:
        hashes = {file.name: sha256(file) for file in Checkpoint.open(finished).files}
    write_side_files(finished, replace(artefact, sha256=hashes))


@torch.no_grad()
def _verify(checkpoint: Checkpoint, sparse: PreTrainedModel, batch: Batch) -> float:
    """Relative error of the written model with every expert on, against the source itself."""
    with all_experts(sparse):
        got = run_outputs(sparse, batch, keep_BT=batch.mask())
    want = run_outputs(load_dense(checkpoint, **placement()), batch, keep_BT=batch.mask())
    error, size, _ = difference(got, want)
    return error / size


def _require_equal(error: float, dtype: torch.dtype) -> None:
    limit = TOLERANCE[dtype]
    if not error <= limit:
        raise MoefyError(
            f"verification failed: with every expert on the outputs differ by {error:.1e} "
            f"(relative; at most {limit:.0e} for {dtype}); nothing was written; please "
            "report this with the model's config.json"
        )


def _record(job: Job, made: Converted, streamed: bool) -> dict[str, Any]:
    """What is told of a conversion afterwards."""
    return {
        "kind": "conversion",
        "source": job.source["name"],
        "model_class": job.todo.model_class,
        "form": made.artefact.form,
        "streamed": streamed,
        "all_experts_relative_error": made.error,
        "routers": made.fits,
        "head_routers": made.head_fits,
        "tuning": made.tuning,
        "seconds": job.clock.seconds,
        "bytes_read": job.clock.read,
        "bytes_written": job.clock.written,
        "peak_memory": peak_memory(),
        "peak_memory_after": job.clock.peak,
        "machine": machine(),
    }


def _describe_output(job: Job, artefact: Artefact, records: dict[str, Any]) -> None:
    """Records and model card; a card that the source has is kept beside it."""
    finished, card = job.finished, job.checkpoint.folder / "README.md"
    (finished / "records.json").write_text(json.dumps(records, indent=1) + "\n")
    if card.exists() and artefact.form == FULL:
        shutil.copyfile(card, finished / "README.source.md")
    (finished / "README.md").write_text(model_card(artefact, records), encoding="utf-8")
