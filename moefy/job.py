"""One conversion: what it is made from, and what comes out, whichever way it is run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moefy.artefact import Artefact
from moefy.checkpoint import Checkpoint
from moefy.console import Reporter
from moefy.data import Batch, Corpus
from moefy.memory import peak_memory
from moefy.plan import Plan
from moefy.processes import Processes
from moefy.provenance import read_and_written
from moefy.recipe import Recipe

Reading = dict[str, tuple[list[Batch], int]]
"""Batches by what they are for, and how many of their tokens are looked at."""


class Clock:
    """Wall-clock seconds of every stage, the bytes that it read and wrote, peak memory up to its end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.read: dict[str, int] = {}
        self.written: dict[str, int] = {}
        self.peak: dict[str, int] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens meanwhile to this stage."""
        began, before = time.perf_counter(), read_and_written()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 2)
        self.peak[name], after = peak_memory(), read_and_written()
        if before is not None and after is not None:
            self.read[name], self.written[name] = after[0] - before[0], after[1] - before[1]


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
