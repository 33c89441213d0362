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

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from moefy import recipe as recipes
from moefy.activations import Captured, capture, run
from moefy.artefact import ADAPTER, FULL, Artefact, HeadEntry, LayerEntry, write_side_files
from moefy.card import model_card
from moefy.checkpoint import Checkpoint, OutputFolder, copy_folder, sha256
from moefy.console import Reporter
from moefy.data import Batch, Corpus, hold_out, load_corpus, split_shards
from moefy.errors import CheckpointError, MoefyError
from moefy.evaluate import evaluate, outputs
from moefy.fitting import HELD_OUT_SHARE, Fitted, fit_layer, layer_sample, sample_sizes
from moefy.head_fitting import fit_heads
from moefy.heads import HeadSite, read_heads
from moefy.inputs import read_batches, read_config
from moefy.locate import Place, Site, disk_names, meta_model, read_mlp
from moefy.mlp import HeadOutputs
from moefy.modeling import load, load_dense, moefied, placement, with_routing_of
from moefy.plan import Plan, describe, plan
from moefy.provenance import machine, versions
from moefy.recipe import Recipe
from moefy.reorder import reorder
from moefy.sparse_mlp import all_experts
from moefy.tuning import needs_tuning, tune

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest relative error of the outputs with every expert on; the error itself is recorded."""

EVALUATED_DOCUMENTS = 44


def convert(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    *,
    recipe: Recipe | str | Path = "default",
    corpus: Any = None,
    adapter: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Convert the checkpoint `model` (folder, Hub id, or a model in memory) into the folder `out`.

    `recipe` is a `Recipe`, a shipped name or a YAML file; `corpus` is anything `load_corpus` reads.
    With `adapter` only the side files are written and the source stays where it is. `resume` takes
    up a run that was interrupted and ends with the same tensors; `overwrite` replaces `out`.

    Returns the records that are also in `out/records.json`: `conversion` and `evaluation`. Raises
    `MoefyError` for anything that is the user's to mend; `out` then is as it was.
    """
    recipe = recipe if isinstance(recipe, Recipe) else recipes.load(recipe)
    report = Reporter(quiet=quiet)
    clock = _Clock()
    with _on_disk(model, adapter) as folder:
        with clock.stage("plan"):
            checkpoint = Checkpoint.open(folder)
            text = load_corpus(corpus)
            shards = split_shards(text, recipe.seed)
            todo = plan(checkpoint, recipe, text.name, adapter=adapter)
            report.say(describe(todo, recipe))
            reading = _reading(checkpoint, todo, recipe, shards)
            source = {"name": _lasting_name(folder, adapter), "sha256": checkpoint.hashes()}
        output = OutputFolder(Path(out))
        output.begin(
            _fingerprint(recipe, source, text, adapter), resume=resume, overwrite=overwrite
        )
        output.need(todo.disk)

        with output.full_disk():
            with clock.stage("measure"):
                samples = _measure(checkpoint, reading, todo, recipe.seed, output.work, report)

            with clock.stage("fit"):
                fitted = _fit(checkpoint, todo, recipe, samples, output.work, report)

            with clock.stage("tune"):
                artefact, fits, head_fits = _collect(fitted, todo, recipe, source, text, adapter)
                artefact, tuning = _tune(
                    checkpoint, todo, recipe, artefact, samples, reading, output.work, report
                )

            with clock.stage("write"):
                finished = output.work / "model"
                _write(checkpoint, finished, artefact, todo.sites, report)

            with clock.stage("verify"):
                held = shards["evaluation"].take(EVALUATED_DOCUMENTS)
                batches = read_batches(checkpoint, todo.kind, held, recipe.context)
                sparse = load(finished, verify=False, **placement())
                error = _verify(checkpoint, sparse, batches)
                report.say(f"with every expert on, equal to the dense model up to {error:.1e}")
                quality = evaluate(sparse, batches, report=report)

            conversion = {
                "kind": "conversion",
                "source": source["name"],
                "model_class": todo.model_class,
                "form": artefact.form,
                "all_experts_relative_error": error,
                "routers": fits,
                "head_routers": head_fits,
                "tuning": tuning,
                "seconds": clock.seconds,
                "machine": machine(),
            }
            records = {"conversion": conversion, "evaluation": quality}
            _describe_output(finished, artefact, records)
    output.commit(finished)
    return records


class _Clock:
    """Wall-clock seconds of every stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)


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


def _fingerprint(recipe: Recipe, source: dict[str, Any], corpus: Corpus, adapter: bool) -> str:
    """Digest of all that decides the result: an unfinished run is only resumed with the same."""
    settings = [recipes.to_dict(recipe), source, corpus.sha256, adapter, versions()]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _lasting_name(folder: str | Path, adapter: bool) -> str:
    """A Hub id or, for an adapter, the full path; the folder's name is enough for the full form."""
    path = Path(folder)
    if not path.exists():
        return str(folder)
    return str(path.resolve()) if adapter else path.resolve().name


def _reading(
    checkpoint: Checkpoint, todo: Plan, recipe: Recipe, shards: dict[str, Corpus]
) -> dict[str, tuple[list[Batch], int]]:
    """Batches, and how many of their tokens to keep: for the partition, for the router, and for the
    router's early stopping. A corpus the model cannot read is found here, before anything is made.
    """
    train, held = hold_out(shards["router"], HELD_OUT_SHARE, recipe.seed)
    texts = {"partition": shards["partition"], "router": train, "held-out": held}
    return {
        name: (read_batches(checkpoint, todo.kind, texts[name], recipe.context, limit), limit)
        for name, limit in sample_sizes(recipe).items()
    }


def _measure(
    checkpoint: Checkpoint,
    reading: dict[str, tuple[list[Batch], int]],
    todo: Plan,
    seed: int,
    work: Path,
    report: Reporter,
) -> dict[str, Captured]:
    """Run the dense model once over all that is to be read and keep a sample of what layers see."""
    folder = work / "activations"
    folder.mkdir(exist_ok=True)
    samples = {name: Captured(folder, name) for name in reading}
    missing = [name for name in reading if not samples[name].complete]
    model = load_dense(checkpoint, **placement()) if missing else None
    places: list[Place] = [*todo.sites]
    for site in todo.head_sites:
        places += site.places(len(todo.sites))
    for name in missing:
        assert model is not None
        batches, limit = reading[name]
        capture(model, places, batches, samples[name], limit=limit, seed=seed, report=report)
    return samples


def _fit(
    checkpoint: Checkpoint,
    todo: Plan,
    recipe: Recipe,
    samples: dict[str, Captured],
    work: Path,
    report: Reporter,
) -> Path:
    """Fit every layer that is not there yet, each from its own weights and sample alone."""
    for what in ("layers", "heads"):
        (work / what).mkdir(exist_ok=True)
    stored = disk_names(meta_model(read_config(checkpoint)), checkpoint.tensors)
    get = _reader(checkpoint, {name: disk for disk, name in stored.items()})
    for site in report.track(todo.sites, "fit layers"):
        at = work / "layers" / str(site.index)
        if not at.with_suffix(".json").exists():
            mlp = read_mlp(site, get).to(torch.float32)
            _keep(at, fit_layer(mlp, todo, site, recipe, layer_sample(samples, todo, site)))
    for block in report.track(todo.head_sites, "fit heads") if todo.head_sites else ():
        at = work / "heads" / str(block.index)
        if not at.with_suffix(".json").exists():
            heads = HeadOutputs.behind(read_heads(block, get).down_ND.float())
            _keep(at, fit_heads(heads, todo, block, recipe, samples))
    return work


def _keep(at: Path, fitted: Fitted[Any]) -> None:
    save_file(fitted.tensors, at.with_suffix(".safetensors"))
    # Written last and by rename: its presence says that the layer is finished.
    unfinished = at.with_suffix(".part")
    kept = {"entry": asdict(fitted.entry), "fit": fitted.fit.record()}
    unfinished.write_text(json.dumps(kept))
    unfinished.replace(at.with_suffix(".json"))


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


def _collect(
    fitted: Path, todo: Plan, recipe: Recipe, source: dict[str, Any], corpus: Corpus, adapter: bool
) -> tuple[Artefact, list[dict[str, Any]], list[dict[str, Any]]]:
    """All that was fitted as one artefact, and how well the routers of MLPs and of heads came out."""
    tensors: dict[str, Tensor] = {}
    layers, fits = _fitted(fitted, "layers", todo.sites, tensors)
    heads, head_fits = _fitted(fitted, "heads", todo.head_sites, tensors)
    artefact = Artefact(
        form=ADAPTER if adapter else FULL,
        source=source,
        recipe=recipes.to_dict(recipe),
        corpus={"name": corpus.name, "sha256": corpus.sha256},
        layers=[LayerEntry(**entry) for entry in layers],
        heads=[HeadEntry(**entry) for entry in heads],
        tensors=tensors,
        versions=versions(),
    )
    return artefact, fits, head_fits


def _fitted(
    work: Path, what: str, found: Sequence[Site | HeadSite], tensors: dict[str, Tensor]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Entries and fits of all that is of one kind; adds what they fitted to `tensors`."""
    entries, fits = [], []
    for site in found:
        at = work / what / str(site.index)
        kept = json.loads(at.with_suffix(".json").read_text())
        entries.append(kept["entry"])
        fits.append({"layer": site.layer, **kept["fit"]})
        for name, value in load_file(at.with_suffix(".safetensors")).items():
            tensors[f"{what}.{site.index}.{name}"] = value
    return entries, fits


def _tune(
    checkpoint: Checkpoint,
    todo: Plan,
    recipe: Recipe,
    artefact: Artefact,
    samples: dict[str, Captured],
    reading: dict[str, tuple[list[Batch], int]],
    work: Path,
    report: Reporter,
) -> tuple[Artefact, dict[str, Any]]:
    """Tune the moefied model in memory, where the recipe asks for it, and take back its routing."""
    if not needs_tuning(recipe):
        return artefact, {}
    kept = work / "tuned"
    if not (kept / "record.json").exists():
        model = load_dense(checkpoint, **placement())
        moefied(model, artefact, permute=True)
        record = tune(
            model, todo, recipe, samples, reading["router"][0], reading["held-out"][0], report
        )
        artefact = with_routing_of(model)
        kept.mkdir(exist_ok=True)
        save_file(artefact.tensors, kept / "tensors.safetensors")
        record["selections"] = [entry.selection for entry in artefact.layers]
        (kept / "record.part").write_text(json.dumps(record))
        (kept / "record.part").replace(kept / "record.json")
    record = json.loads((kept / "record.json").read_text())
    layers = [
        replace(entry, selection=selection)
        for entry, selection in zip(artefact.layers, record.pop("selections"), strict=True)
    ]
    tensors = load_file(kept / "tensors.safetensors")
    return replace(artefact, layers=layers, tensors=tensors), record


def _write(
    checkpoint: Checkpoint, finished: Path, artefact: Artefact, found: list[Site], report: Reporter
) -> None:
    """Write the result; a folder from a run that was killed here is made anew."""
    shutil.rmtree(finished, ignore_errors=True)
    finished.mkdir()
    hashes = {}
    if artefact.form == FULL:
        copy_folder(checkpoint.folder, finished, skip={file.name for file in checkpoint.files})
        written = reorder(checkpoint, finished, found, artefact, report)
        hashes = {file.name: sha256(file) for file in written.files}
    write_side_files(finished, replace(artefact, sha256=hashes))


@torch.no_grad()
def _verify(checkpoint: Checkpoint, sparse: PreTrainedModel, batches: list[Batch]) -> float:
    """Relative error of the written model with every expert on, against the source itself."""
    with all_experts(sparse):
        got = outputs(run(sparse, batches[0]))
    want = outputs(run(load_dense(checkpoint, **placement()), batches[0]))
    mask = batches[0].mask()
    keep = torch.ones(want.shape[:2], dtype=torch.bool) if mask is None else mask
    got, want = got[keep].double(), want[keep].double()
    error = float((got - want).norm() / want.norm())
    limit = TOLERANCE[sparse.dtype]
    if not error <= limit:
        raise MoefyError(
            f"verification failed: with every expert on the outputs differ by {error:.1e} "
            f"(relative; at most {limit:.0e} for {sparse.dtype}); nothing was written; please "
            "report this with the model's config.json"
        )
    return error


def _describe_output(finished: Path, artefact: Artefact, records: dict[str, Any]) -> None:
    """Records and model card; a card that the source had is kept beside it."""
    (finished / "records.json").write_text(json.dumps(records, indent=1) + "\n")
    card = finished / "README.md"
    if card.exists():
        card.replace(finished / "README.source.md")
    card.write_text(model_card(artefact, records), encoding="utf-8")
