"""One conversion: what it is made from, what comes out, whichever way it is run, and what is kept of it.

What was fitted of every layer lies in the work folder until all of it becomes one artefact.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from moefy import recipe as recipes
from moefy.conversion.layer import Fitted
from moefy.conversion.plan import Plan
from moefy.data.corpus import Batch, Corpus
from moefy.models.artefact import ADAPTER, FULL, Artefact, HeadEntry, LayerEntry
from moefy.models.checkpoint import Checkpoint
from moefy.models.heads import HeadSite
from moefy.models.locate import Site
from moefy.recipe import Recipe
from moefy.run.clock import Clock
from moefy.run.console import Reporter
from moefy.run.processes import Processes
from moefy.run.provenance import versions
from moefy.run.stages import Stages

Reading = dict[str, tuple[list[Batch], int]]
"""Batches by what they are for, and how many of their tokens are looked at."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """All that decides a conversion, found before it is begun."""

    checkpoint: Checkpoint
    todo: Plan
    recipe: Recipe
    corpus: Corpus
    source: dict[str, Any]
    """`name` and `sha256`, as `Artefact.source`."""
    adapter: bool
    reading: Reading
    """Batches for the partition, for the router, and held out from those."""
    evaluated: list[Batch]
    """Documents that nothing is fitted on."""
    work: Path
    report: Reporter
    clock: Clock
    processes: Processes

    @property
    def finished(self) -> Path:
        """Where the result is put together."""
        return self.work / "model"

    @property
    def stages(self) -> Stages:
        """What is finished: `layers/0`, `heads/0`, ..., `tuned/record`."""
        return Stages(self.work)


@dataclass(frozen=True)
class Converted:
    """What a conversion found; the weights are in the folder already."""

    artefact: Artefact
    error: float
    """Relative error with every expert on, against the source."""
    evaluation: dict[str, Any]
    tuning: dict[str, Any] = field(default_factory=dict)
    """What was measured of all layers together."""
    fits: list[dict[str, Any]] = field(default_factory=list)
    """How well routers came out, by layer."""
    head_fits: list[dict[str, Any]] = field(default_factory=list)


def keep(
    stages: Stages, name: str, fitted: Fitted[Any], extra: dict[str, Any] | None = None
) -> None:
    """Keep what was fitted of one layer."""
    values = {"entry": asdict(fitted.entry), "fit": fitted.fit.record(), **(extra or {})}
    stages.keep(name, values, fitted.tensors)


def collect(job: Job) -> tuple[Artefact, list[dict[str, Any]], list[dict[str, Any]]]:
    """All that was fitted as one artefact, and how well the routers of MLPs and of heads came out."""
    tensors: dict[str, Tensor] = {}
    layers, fits = _fitted(job.stages, "layers", job.todo.sites, tensors)
    heads, head_fits = _fitted(job.stages, "heads", job.todo.head_sites, tensors)
    artefact = Artefact(
        form=ADAPTER if job.adapter else FULL,
        source=job.source,
        recipe=recipes.to_dict(job.recipe),
        corpus={"name": job.corpus.name, "sha256": job.corpus.sha256},
        layers=[LayerEntry(**entry) for entry in layers],
        heads=[HeadEntry(**entry) for entry in heads],
        tensors=tensors,
        versions=versions(),
    )
    return artefact, fits, head_fits


def _fitted(
    stages: Stages, what: str, found: Sequence[Site | HeadSite], tensors: dict[str, Tensor]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Entries and fits of all that is of one kind; adds what they fitted to `tensors`."""
    entries, fits = [], []
    for site in found:
        name = f"{what}/{site.index}"
        kept = stages.read(name)
        entries.append(kept["entry"])
        fits.append({"layer": site.layer, **kept["fit"]})
        for key, value in stages.tensors(name).items():
            tensors[f"{what}.{site.index}.{key}"] = value
    return entries, fits
