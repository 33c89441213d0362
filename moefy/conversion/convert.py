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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from moefy import recipe as recipes
from moefy.conversion import streamed
from moefy.conversion.in_memory import fitted
from moefy.conversion.plan import describe
from moefy.conversion.task import UNROUNDED, Conversion, Converted
from moefy.conversion.verification import AsRouted, require_equal
from moefy.data.corpus import Batch, Corpus, load_corpus
from moefy.data.inputs import read_batches
from moefy.data.shards import EVALUATED_DOCUMENTS, by_role
from moefy.errors import MoefyError
from moefy.evaluation.evaluate import evaluate
from moefy.evaluation.outputs import (
    Outputs,
    difference,
    distances,
    judge,
    outputs_of_all,
    run_outputs,
)
from moefy.evaluation.tables import model_card
from moefy.experts.loading import load, load_dense
from moefy.experts.moefied import of
from moefy.experts.passes import walk
from moefy.experts.placement import memory_of, placement, running_dtype, stored_dtype
from moefy.experts.sparse_mlp import all_experts
from moefy.models.artefact import FULL, Artefact, write_side_files
from moefy.models.checkpoint import Checkpoint, copy_folder, is_there
from moefy.models.refusals import refuse_adapted
from moefy.models.reorder import put_back, reorder, rounded_mlp
from moefy.recipe import Recipe
from moefy.run.computing import asked, machine, now
from moefy.run.folder import write_whole
from moefy.run.job import Job
from moefy.run.memory import free_memory, give_back, map_large_blocks, peak_memory
from moefy.run.processes import launched

ROUNDED = (8, 4, 3, 2)
"""Bits that a result is compared with; a scale and an offset in 16 bits for 32 weights make one more."""
LARGE = 50_000_000
"""Parameters from which on a conversion judges its result on `EVALUATED_TOKENS`; `moefy eval` reads on."""
EVALUATED_TOKENS = 8192


@asked
def convert(
    model: str | Path | nn.Module,
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

    `recipe` is a `Recipe`, a shipped name or a YAML file; of a stream `largest_inputs` stands for the default.
    `corpus` is anything `load_corpus` reads.
    With `adapter` only the side files are written and the source stays where it is. `stream` holds
    one layer in memory at a time (`moefy.conversion.streamed`, docs/streaming.md). `resume` takes up a run that
    was interrupted and ends with the same tensors; `overwrite` replaces `out`.

    Under `accelerate launch` documents and layers are shared out over all processes.

    Returns the records that are also in `out/records.json`: `conversion` and `evaluation` (nothing
    in processes other than the first). Raises `MoefyError` for anything that is the user's to mend;
    `out` then is as it was.
    """
    recipe = recipes.for_stream(recipe) if stream else recipe
    recipe = recipe if isinstance(recipe, Recipe) else recipes.load(recipe)
    reads = [model] if isinstance(model, str | Path) else _behind(model)
    job = Job(
        "convert", out, resume=resume, overwrite=overwrite, quiet=quiet, processes=launched(),
        reads=reads,
    )  # fmt: skip
    with _on_disk(model, adapter) as folder:
        task = _planned(job, folder, recipe, load_corpus(corpus), adapter, stream)
        disk = streamed.disk(task) if stream else task.todo.disk
        with job.running([*task.decided, stream], disk=disk):
            made = streamed.stream(task) if stream else _in_memory(task)
            records = {} if made is None else _sealed(task, made, stream)
    if job.processes.main:
        job.commit()
    job.processes.wait()
    return records


def _planned(
    job: Job, folder: str | Path, recipe: Recipe, corpus: Corpus, adapter: bool, stream: bool
) -> Conversion:
    """The plan, what is going to be read, and the hashes of the source.

    Raises what `plan` raises, and `MoefyError` where it cannot be done in this way.
    """
    map_large_blocks()
    with job.clock.stage("plan"):
        checkpoint = Checkpoint.open(folder)
        job.output.apart_from(checkpoint.folder)
        task = Conversion.planned(
            checkpoint, recipe, corpus, job.work, report=job.report, clock=job.clock,
            processes=job.processes, adapter=adapter,
        )  # fmt: skip
        if stream:
            streamed.refuse(task)
        else:
            _require_memory(checkpoint)
        job.report.say(describe(task.todo, recipe, stream=stream))
        text = by_role(corpus, recipe.seed)["evaluation"].take(EVALUATED_DOCUMENTS)
        limit = streamed.EVALUATED_TOKENS if stream else _evaluated(task)
        evaluated = read_batches(checkpoint, task.todo.kind, text, recipe.context, limit)
    with job.clock.stage("hash the source"):
        hashes = job.processes.once(checkpoint.hashes)
        source = {"name": _lasting_name(folder, adapter), "sha256": hashes}
        if adapter and checkpoint.revision is not None and not is_there(Path(folder)):
            source["revision"] = checkpoint.revision
    return replace(task, evaluated=evaluated, source=source)


def _in_memory(task: Conversion) -> Converted | None:
    """Every stage on the whole model, one after the other; None in processes that have only helped."""
    made = fitted(task)
    if not task.processes.main:
        return None
    with task.clock.stage("write"):
        _write(task, made.artefact)
    with task.clock.stage("verify"):
        # What it names is what the recipe names.
        sparse = load(task.finished, verify=False, plugins=True, **placement())
        error = _verify(task, sparse, task.evaluated[0])
        with AsRouted(task, sparse).checking(), torch.no_grad():
            walk(sparse, task.evaluated[0])
        give_back()
        source = task.load()
        rounds = made.artefact.rounded is not None
        quality = evaluate(
            sparse, task.evaluated, against=source if rounds else None, report=task.report
        )
        with torch.no_grad():
            want = [run_outputs(source, batch) for batch in task.evaluated]
            rounding = _kl_of_all(sparse, task.evaluated, want) if rounds else None
            quality |= {"dense": UNROUNDED} if rounds else {}
            quality |= _beside_rounding(task, source, made.artefact, want, quality)
    return replace(made, error=error, evaluation=quality, rounding=rounding)


def _evaluated(task: Conversion) -> int | None:
    """About how many tokens the result is judged on; None for all of the evaluated documents."""
    return EVALUATED_TOKENS if task.todo.parameters > LARGE else None


@contextmanager
def _on_disk(model: str | Path | nn.Module, adapter: bool) -> Iterator[str | Path]:
    """Where the source lies; a model in memory is saved for as long as the conversion lasts."""
    if isinstance(model, str | Path):
        yield model
        return
    if adapter:
        raise MoefyError("an adapter names the folder of its source: save the model first")
    refuse_adapted(model)
    if not isinstance(model, PreTrainedModel):
        raise MoefyError(
            f"convert: model: got {type(model).__name__}, expected a folder, a Hub id or a model of transformers"
        )
    with tempfile.TemporaryDirectory() as folder:
        _save(model, Path(folder))
        yield folder


def _behind(model: nn.Module) -> list[str]:
    """The folder that a model in memory came from, if any: it may still be mapped from there."""
    name = getattr(model, "name_or_path", "")
    return [name] if name else []


def _save(model: PreTrainedModel, folder: Path) -> None:
    """Save a model, also with a generation config that transformers refuses to save."""
    generation: Any = getattr(model, "generation_config", None)
    try:
        if generation is not None:
            generation.validate(strict=True)
        model.save_pretrained(folder)
    except ValueError:
        if generation is None:
            raise
        model.generation_config = GenerationConfig()
        try:
            model.save_pretrained(folder)
        finally:
            model.generation_config = generation
        write_whole(folder / "generation_config.json", generation.to_json_string())


def _require_memory(checkpoint: Checkpoint) -> None:
    """Raise `MoefyError` where running the whole model is hopeless."""
    needed, free = memory_of(checkpoint), free_memory()
    if needed > free and not now().on_gpu:
        raise MoefyError(
            f"{checkpoint.folder}: takes {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are "
            "free; pass --stream, which holds one layer at a time"
        )


def _lasting_name(folder: str | Path, adapter: bool) -> str:
    """A Hub id or, for an adapter, the full path; the folder's name is enough for the full form."""
    path = Path(folder)
    if not is_there(path):
        return str(folder)
    return str(path.resolve()) if adapter else path.resolve().name


def _write(task: Conversion, artefact: Artefact) -> None:
    """Write the result; a folder from a run that was killed here is made anew."""
    shutil.rmtree(task.finished, ignore_errors=True)
    task.finished.mkdir()
    if artefact.form == FULL:
        copy_folder(task.checkpoint.folder, task.finished, skip={*task.checkpoint.weights})
        reorder(task.checkpoint, task.finished, task.todo.sites, artefact, task.report)
    write_side_files(task.finished, artefact)


@torch.no_grad()
def _verify(task: Conversion, sparse: PreTrainedModel, batch: Batch) -> float:
    """Relative error of the written model with every expert on, against the source itself, rounded if the
    result is."""
    with all_experts(sparse):
        got = outputs_of_all(sparse, batch)
    dense = load_dense(task.checkpoint, **placement())
    _round(task, dense, of(sparse).artefact)
    error, size, _ = difference(got, outputs_of_all(dense, batch))
    return error / size


def _kl_of_all(model: PreTrainedModel, batches: list[Batch], source: list[Outputs]) -> float:
    """KL of a model with every expert on to the source (nats a token), by what that puts out for the batches."""

    def run(batch: Batch) -> Outputs:
        with all_experts(model):
            return run_outputs(model, batch)

    return judge(run, batches, source, distances).mean("distance")


def _beside_rounding(
    task: Conversion,
    source: PreTrainedModel,
    artefact: Artefact,
    want: list[Outputs],
    quality: dict[str, Any],
) -> dict[str, Any]:
    """What rounding the source's MLPs to the nearest loses that reads as many bits or the next fewer.

    The MLPs of `source` are rounded for it: nothing else is asked of it afterwards.
    """
    bits = max((b for b in ROUNDED if b + 1 <= quality["bits_read"]), default=None)
    own = quality["total"].get("kl")
    if bits is None or own is None:
        return {}
    _round(task, source, artefact, {"bits": bits, "scales": 16})
    kl = _kl_of_all(source, task.evaluated, want)
    if kl < own["mean"]:
        task.report.say(
            f"warning: rounding the dense model's MLPs to {bits} bits reads {bits + 1} bits a weight and loses "
            f"less (KL {kl:.4g}) than this result at {quality['bits_read']:.2f} ({own['mean']:.4g})"
        )
    return {"rounded_alike": {"bits": bits, "bits_read": bits + 1, "kl": kl}}


def _round(
    task: Conversion,
    dense: PreTrainedModel,
    artefact: Artefact,
    storage: dict[str, int] | None = None,
) -> None:
    """Round the MLPs of the dense model as the artefact says, or all in another way; in expert order."""
    get = task.weights()
    for site, entry in zip(task.todo.sites, artefact.layers, strict=True):
        as_stored = entry if storage is None else replace(entry, storage=storage)
        if as_stored.storage is not None:
            order_N = artefact.permutation(site.index)
            put_back(dense, site, rounded_mlp(site, get, as_stored, order_N), order_N)


def _sealed(task: Conversion, made: Converted, stream: bool) -> dict[str, Any]:
    """The records of a result that is the dense model: hashes, records and model card are in its folder.

    A card that the source has is kept beside it. Raises `MoefyError` if it is not the dense model.
    """
    finished, artefact = task.finished, made.artefact
    # Streamed states are rounded to what the weights are stored in.
    require_equal(made.error, (stored_dtype if stream else running_dtype)(task.checkpoint))
    what = "dense model" if artefact.rounded is None else f"dense model in {artefact.rounded} bits"
    task.report.say(f"with every expert on, equal to the {what} up to {made.error:.1e}")
    with task.clock.stage("hash the result"):
        hashes = Checkpoint.open(finished).hashes() if artefact.form == FULL else {}
        write_side_files(finished, replace(artefact, sha256=hashes))
    records = {"conversion": _record(task, made, stream), "evaluation": made.evaluation}
    (finished / "records.json").write_text(json.dumps(records, indent=1) + "\n")
    card = task.checkpoint.folder / "README.md"
    if card.exists() and artefact.form == FULL:
        shutil.copyfile(card, finished / "README.source.md")
    (finished / "README.md").write_text(model_card(artefact, records), encoding="utf-8")
    return records


def _record(task: Conversion, made: Converted, stream: bool) -> dict[str, Any]:
    """What is said of a conversion afterwards."""
    return {
        "kind": "conversion",
        "source": task.source["name"],
        "model_class": task.todo.model_class,
        "form": made.artefact.form,
        "streamed": stream,
        "all_experts_relative_error": made.error,
        **({} if made.rounding is None else {"rounding_kl": made.rounding}),
        "routers": made.fits,
        "head_routers": made.head_fits,
        "tuning": made.tuning,
        "seconds": task.clock.seconds,
        "bytes_read": task.clock.read,
        "bytes_written": task.clock.written,
        "peak_memory": peak_memory(),
        "peak_memory_after": task.clock.peak,
        "machine": machine(),
    }
