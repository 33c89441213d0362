"""One conversion: what it is made from, what it reads, what is finished of it, and what comes out.

Whichever way it is run, what was fitted of every layer lies in the work folder until all of it becomes
one artefact.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from moefy import recipe as recipes
from moefy.conversion.layer import Fitted
from moefy.conversion.plan import Plan, plan
from moefy.data.corpus import Batch, Corpus
from moefy.data.inputs import read_batches
from moefy.data.shards import by_role, tokens_of_roles
from moefy.errors import CheckpointError
from moefy.experts.loading import load_dense
from moefy.experts.placement import placement
from moefy.models.artefact import ADAPTER, FULL, Artefact
from moefy.models.checkpoint import Checkpoint
from moefy.models.config import read_config
from moefy.models.entries import HeadEntry, LayerEntry
from moefy.models.heads import HeadSite
from moefy.models.locate import Site, disk_names, meta_model
from moefy.recipe import Recipe
from moefy.run.computing import versions
from moefy.run.console import Reporter
from moefy.run.job import Clock
from moefy.run.output import Stages
from moefy.run.processes import ALONE, Processes

Reading = dict[str, tuple[list[Batch], int]]
"""Batches by role (`moefy.data.shards`), and how many of their tokens are looked at."""
UNROUNDED = "the source, whose weights are not rounded"
"""What a result whose weights are rounded is compared with, in words."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """All that decides a conversion, found before it is begun."""

    checkpoint: Checkpoint
    todo: Plan
    recipe: Recipe
    corpus: dict[str, str]
    """`name` and `sha256`."""
    reading: Reading
    """For the partition, for the router, and held out from those."""
    work: Path
    report: Reporter
    processes: Processes = ALONE
    clock: Clock = field(default_factory=Clock)
    evaluated: list[Batch] = field(default_factory=list)
    """Documents that nothing is fitted on."""
    distilled_on: list[Batch] = field(default_factory=list)
    """What distillation reads; left out, it is what routers are fitted on."""
    source: dict[str, Any] = field(default_factory=dict)
    """`name` and `sha256`, as `Artefact.source`."""
    adapter: bool = False
    dense: Callable[[], PreTrainedModel] | None = None
    """How the dense model is made where it is not what the checkpoint holds."""
    captures: Path | None = None
    """Where inputs of layers are kept, if not in the work folder."""
    partitions: Stages = field(default_factory=lambda: Stages(None))
    """Where partitions are kept for other conversions of the same model."""

    @classmethod
    def planned(
        cls, checkpoint: Checkpoint, recipe: Recipe, corpus: Corpus, work: Path, **others: Any
    ) -> "Conversion":
        """What a conversion with this corpus will do and read; `others` are fields.

        Raises what `plan` and `read_batches` raise: a corpus that the model cannot read is found here.
        """
        todo = plan(checkpoint, recipe, corpus.name, adapter=others.get("adapter", False))
        texts = by_role(corpus, recipe.seed)
        reading = {
            role: (read_batches(checkpoint, todo.kind, texts[role], recipe.context, limit), limit)
            for role, limit in tokens_of_roles(recipe).items()
        }
        facts = {"name": corpus.name, "sha256": corpus.sha256}
        return cls(
            checkpoint=checkpoint, todo=todo, recipe=recipe, corpus=facts, reading=reading, work=work,
            **others,
        )  # fmt: skip

    @property
    def decided(self) -> list[Any]:
        """All that decides the result, as JSON values."""
        return [
            recipes.to_dict(self.recipe),
            self.source,
            self.checkpoint.text_hashes(),
            self.corpus,
            self.adapter,
        ]

    @property
    def rounds(self) -> bool:
        """Whether matrices are rounded, before anything is fitted."""
        return any(entry.storage is not None for entry in self.todo.layers)

    @property
    def finished(self) -> Path:
        """Where the result is put together."""
        return self.work / "model"

    @property
    def stages(self) -> Stages:
        """What is finished: `layers/0`, `heads/0`, ..., `tuned/record`."""
        return Stages(self.work)

    def load(self) -> PreTrainedModel:
        """The dense model; nothing of it is trained."""
        dense = load_dense(self.checkpoint, **placement()) if self.dense is None else self.dense()
        dense.requires_grad_(False)
        return dense

    def weights(self) -> Callable[[str], Tensor]:
        """How to get a parameter of the dense model by its name: straight from disk, if it is there."""
        if self.dense is not None:
            parameter = self.load().get_parameter
            return lambda name: parameter(name).detach()
        stored = disk_names(meta_model(read_config(self.checkpoint)), self.checkpoint.tensors)
        on_disk = {name: disk for disk, name in stored.items()}

        def get(name: str) -> Tensor:
            if name not in on_disk:
                raise CheckpointError(f"{self.checkpoint.folder}: no tensor on disk is {name}")
            tensor = self.checkpoint.read(on_disk[name])
            if not tensor.isfinite().all():
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {on_disk[name]} holds NaN or infinity; the checkpoint "
                    "is damaged"
                )
            return tensor

        return get

    def keep(self, name: str, fitted: Fitted[Any], **extra: Any) -> None:
        """Keep what was fitted of one layer or attention block."""
        values = {"entry": asdict(fitted.entry), "fit": fitted.fit.record(), **extra}
        self.stages.keep(name, values, fitted.tensors)

    def collect(self) -> "Converted":
        """All that was fitted as one artefact, and how well the routers came out."""
        tensors: dict[str, Tensor] = {}
        layers, fits = self._fitted("layers", self.todo.sites, tensors)
        heads, head_fits = self._fitted("heads", self.todo.head_sites, tensors)
        artefact = Artefact(
            form=ADAPTER if self.adapter else FULL,
            source=self.source,
            recipe=recipes.to_dict(self.recipe),
            corpus=self.corpus,
            layers=[LayerEntry(**entry) for entry in layers],
            heads=[HeadEntry(**entry) for entry in heads],
            tensors=tensors,
            versions=versions(),
        )
        return Converted(artefact, fits, head_fits)

    def _fitted(
        self, what: str, sites: Sequence[Site | HeadSite], tensors: dict[str, Tensor]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Entries and fits of all that is of one kind; adds what they fitted to `tensors`."""
        entries, fits = [], []
        for site in sites:
            name = f"{what}/{site.index}"
            part = self.stages.read(name)
            entries.append(part["entry"])
            fits.append({"layer": site.layer, **part["fit"]})
            for key, value in self.stages.tensors(name).items():
                tensors[f"{what}.{site.index}.{key}"] = value
        return entries, fits


@dataclass(frozen=True)
class Converted:
    """What a conversion has found, as far as it has come."""

    artefact: Artefact
    fits: list[dict[str, Any]]
    """How well routers came out, by layer."""
    head_fits: list[dict[str, Any]]
    tuning: dict[str, Any] = field(default_factory=dict)
    """What was measured of all layers together."""
    error: float = float("nan")
    """Relative error with every expert on, against the source, rounded if the result is."""
    rounding: float | None = None
    """What rounding alone costs, where matrices are rounded: KL (nats a token) of the result with every expert
    on to the source; without probabilities the squared error over the squared norm."""
    evaluation: dict[str, Any] = field(default_factory=dict)
