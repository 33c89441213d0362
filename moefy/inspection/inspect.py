"""THE main flow of `moefy inspect`: read -> describe -> control -> ablate -> judge -> show.

    found = moefy.inspect("out", out="report")      # report/report.html, report/inspection.json
    found.expert(5, 12)["causal"]

Every part is in `moefy.inspection` and gives plain tables; this file only says what is done in which
order, and has a row for each part of the one pass in `PARTS`:

    contributions, examples, directions and direct effects, concepts, near duplicates     of experts
    routing                                        which experts run for what, and what explains it
    random partitions, other texts                 how all that compares, with `controls`

docs/inspection.md defines every column.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moefy.errors import MoefyError, unknown_choice
from moefy.experts.interventions import MODES
from moefy.experts.loading import open_model
from moefy.experts.moefied import of
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.inspection.account import observe
from moefy.inspection.account.prompt import prompt_record
from moefy.inspection.causal import TOKENS as CAUSAL_TOKENS
from moefy.inspection.causal import causal
from moefy.inspection.controls import seeds
from moefy.inspection.controls.random_partition import RandomPartitions
from moefy.inspection.controls.random_weights import random_weights
from moefy.inspection.experts import Contributions, RouterQualityOfExperts
from moefy.inspection.experts.concepts import Predictivity
from moefy.inspection.experts.direct import DirectEffects, Spectrum
from moefy.inspection.experts.examples import Examples
from moefy.inspection.experts.near_duplicates import NearDuplicates
from moefy.inspection.part import Pass, PassPart, gather
from moefy.inspection.quality import quality_summary
from moefy.inspection.record import FILE, Inspection, Table
from moefy.inspection.report import Report, write_report
from moefy.inspection.report.neuronpedia import export_neuronpedia
from moefy.inspection.report.plots import save_plots
from moefy.inspection.routing.statistics import Routing
from moefy.inspection.texts import TOKENS, Reading, documents_table, read, texts_of, vocabulary_of
from moefy.run.computing import asked, machine, versions
from moefy.run.console import Reporter
from moefy.run.folder import OutputFolder, refuse_inside, refuse_stranger
from moefy.run.memory import peak_memory
from moefy.run.output import Stages
from moefy.run.processes import ALONE, Processes, launched

OPTIONAL = ("controls", "causal")
"""What may be skipped."""
CONTROL_TOKENS = 20_000
"""Tokens that trained and random weights are compared on."""
CAUSAL_SOURCE = 5_000_000
"""Tokens to draw documents for ablation from: first tokens of many tell more than all of a few."""
REPORT = "report.html"
WORK = "work"


class Inspected(Inspection):
    """An inspection that shows itself: in a notebook, as a page, as plots."""

    def save(self, folder: str | Path) -> Path:
        """Write `inspection.json` and `report.html` into a folder; returns what to open."""
        super().save(folder)
        return write_report(self, Path(folder) / REPORT, overwrite=True)

    def save_plots(self, folder: str | Path) -> list[Path]:
        """PNG plots for papers; needs matplotlib."""
        return save_plots(self, folder)

    def export_neuronpedia(self, folder: str | Path) -> Path:
        """The experts in the format that Neuronpedia imports."""
        return export_neuronpedia(self, folder)

    def _repr_html_(self) -> str:
        return Report(self)._repr_html_()


@asked
def inspect(
    model: str | Path | PreTrainedModel,
    *,
    corpora: Any = None,
    out: str | Path | None = None,
    tokens: int = TOKENS,
    causal_tokens: int = CAUSAL_TOKENS,
    mode: str = "mean",
    skip: Sequence[str] = (),
    prompts: Sequence[str] = (),
    seed: int = 0,
    command: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    batch_size: int | None = None,
    quiet: bool = False,
) -> Inspected:
    """Inspect what the experts of a moefied model do.

    `model` is a folder that `convert` wrote, or what `load` gave. `corpora` is anything
    `load_corpus` reads, or a mapping of names to that; None is the bundled corpus. About `tokens`
    tokens are described and `causal_tokens` are ablated on, by `mode` (`mean`, `zero`, `peak`,
    `resample`). `skip` leaves out `controls` or `causal`. With `out`, a folder, the report and
    `inspection.json` are written there; finished parts are kept in `out/work`, so that a run that was
    broken off goes on, and one with another setting or prompt repeats only what that changes.

    Under `accelerate launch` texts and layers are shared out over all processes, and the result is that
    of one; the first has it and writes it, what the others get is empty.

    Raises `MoefyError` for anything that is the user's to mend.
    """
    settings = InspectSettings(tokens, causal_tokens, mode, [*skip])
    with report_folder(out, model, processes=launched()):
        run = Inspecting(model, corpora, settings, out=out, seed=seed, quiet=quiet)
        parts = [run.described(), *run.controlled(), *run.ablated()]
        found = Inspected({}, {}, {})
        if run.processes.main:
            found = run.result(merged(parts), prompts, command)
        run.processes.wait()
    return found


@contextmanager
def report_folder(
    out: str | Path | None, *models: str | Path | PreTrainedModel, processes: Processes = ALONE
) -> Iterator[None]:
    """Hold the folder that a report goes to.

    Raises `OutputError` where it is in one of the models, holds other files of those names, or another run
    is at work there.
    """
    if out is None or not processes.main:
        yield
        return
    for model in models:
        if not isinstance(model, PreTrainedModel):
            refuse_inside(Path(out), Path(model))
    for name in (FILE, REPORT):
        refuse_stranger(Path(out) / name)
    with OutputFolder(Path(out)).held():
        yield


@dataclass(frozen=True)
class InspectSettings:
    """What `inspect` was asked for; the record holds it."""

    tokens: int
    causal_tokens: int
    mode: str
    skip: list[str]

    def __post_init__(self) -> None:
        unknown = [part for part in self.skip if part not in OPTIONAL]
        if unknown:
            raise MoefyError(unknown_choice("part to skip", unknown[0], OPTIONAL))
        if self.mode not in MODES:
            raise MoefyError(unknown_choice("mode", self.mode, MODES))
        if min(self.tokens, self.causal_tokens) < 1:
            raise MoefyError(
                f"inspect on {self.tokens} and {self.causal_tokens} tokens: give at least 1 of each"
            )


class Inspecting:
    """One call of `inspect`: what its parts share. It opens the model and reads the texts."""

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        corpora: Any,
        settings: InspectSettings,
        *,
        out: str | Path | None,
        seed: int,
        quiet: bool,
    ) -> None:
        self.began, self.processes = time.perf_counter(), launched()
        self.corpora, self.settings, self.out, self.seed = corpora, settings, out, seed
        self.model = open_model(model, verify=True, dense=False)
        self.reading = read(self.model, corpora, tokens=settings.tokens)
        # A model in memory may have been changed since it was loaded: only folders have parts to keep.
        work = Path(out) / WORK if out is not None and self.model is not model else None
        self.stages = Stages(work, _decided_by(self.model, self.reading, seed), self.processes)
        self.report = Reporter(quiet=quiet or not self.processes.main)
        self.seconds: dict[str, float] = {}

    def described(self) -> dict[str, Table]:
        """Descriptive tables, beside random partitions and other texts."""
        controls = "controls" not in self.settings.skip
        work = self._pass(self.model, self.reading, controls=controls)
        with self._clock("description"):
            return self.stages.run("description", controls, lambda: describe(work))

    def controlled(self) -> Iterator[dict[str, Table]]:
        """Other seeds of the partition, and random weights."""
        if "controls" in self.settings.skip:
            return
        with self._clock("controls"):
            few = read(self.model, self.corpora, tokens=CONTROL_TOKENS)

            def quietly(model: PreTrainedModel, reading: Reading) -> dict[str, Table]:
                return describe(replace(self._pass(model, reading), report=None))

            again = partial(
                seeds, self.model, self.reading, seed=self.seed, report=self.report,
                processes=self.processes,
            )  # fmt: skip
            yield self.stages.run("seeds", None, again)
            here = self.stages.run("trained", CONTROL_TOKENS, lambda: quietly(self.model, few))
            yield random_weights(
                self.model, few, quietly, here,
                stages=self.stages, seed=self.seed, report=self.report,
            )  # fmt: skip

    def ablated(self) -> Iterator[dict[str, Table]]:
        """What the loss is without each expert."""
        if "causal" in self.settings.skip:
            return
        work = self.stages.folder
        with self._clock("causal"):
            source = read(self.model, self.corpora, tokens=CAUSAL_SOURCE)
            yield causal(
                self.model, self.reading, source=source, tokens=self.settings.causal_tokens,
                mode=self.settings.mode, seed=self.seed, report=self.report,
                work=None if work is None else work / "causal", processes=self.processes,
            )  # fmt: skip

    def result(
        self, tables: dict[str, Table], prompts: Sequence[str], command: str | None
    ) -> Inspected:
        """What the first process gives: the tables, the quality summary, texts, and prompts."""
        with self._clock("page one"):
            judged = replace(self.stages, processes=ALONE).run(
                "honesty",
                sorted(tables),
                lambda: quality_summary(
                    self.model, self.reading, tables, seed=self.seed, report=self.report
                ),
            )
        shown = [prompt_record(self.model, self.reading.tokenizer, prompt) for prompt in prompts]
        about = {
            **_about(self.model, self.reading),
            "command": command,
            "settings": vars(self.settings),
            "seeds": {"seed": self.seed},
            "seconds": {**self.seconds, "in all": round(time.perf_counter() - self.began, 1)},
            "peak_memory": peak_memory(),
        }
        return inspected(self.reading, tables, about, judged, shown, self.out)

    def _pass(self, model: PreTrainedModel, reading: Reading, *, controls: bool = False) -> Pass:
        return Pass(model, reading, self.seed, controls, self.report, self.processes)

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        """Count the seconds of a part."""
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 1)


def inspected(
    reading: Reading,
    tables: dict[str, Table],
    about: dict[str, Any],
    quality: dict[str, Any] | None = None,
    prompts: Sequence[dict[str, Any]] = (),
    out: str | Path | None = None,
) -> Inspected:
    """Tables with all that they point at: documents, their texts, the names of tokens; written to `out`."""
    tables["documents"] = documents_table(reading)
    accounts = [prompt["account"] or {} for prompt in prompts]
    meta = {
        "layers": [],
        "seeds": {},
        **about,
        "vocabulary": vocabulary_of(reading, [*tables.values(), *accounts]),
        "versions": versions(),
        "machine": machine(),
    }
    found = Inspected(meta, quality or {}, tables, texts_of(reading, tables), [*prompts])
    if out is not None:
        found.save(out)
    return found


def _decided_by(model: PreTrainedModel, reading: Reading, seed: int) -> dict[str, Any]:
    artefact = of(model).artefact
    return {
        "source": artefact.source["sha256"],
        "texts": of(model).checkpoint.text_hashes(),
        "artefact": artefact.sha256,
        "documents": [doc.sha256 for doc in reading.documents.documents],
        "versions": versions(),
        "seed": seed,
    }


def _about(model: PreTrainedModel, reading: Reading) -> dict[str, Any]:
    """What was inspected, on what."""
    artefact = of(model).artefact
    layers = []
    for (index, module), entry in zip(sparse_mlps(model).items(), artefact.layers, strict=True):
        order_N = artefact.permutation(index)
        layers.append(
            {
                "name": entry.layer,
                "experts": entry.experts,
                "shared": entry.shared,
                "neurons": entry.neurons,
                "width": entry.width,
                "router": entry.router["name"],
                "selection": entry.selection["name"],
                "compensation": entry.compensation["name"],
                # Which expert has each neuron, in the order of the dense checkpoint.
                "owner": (order_N.argsort() // module.expert_size).tolist(),
            }
        )
    return {
        "model": artefact.source["name"],
        "layers": layers,
        "recipe": artefact.recipe,
        "corpora": reading.corpora,
        "documents": len(reading.documents),
        "tokens": int(reading.tokens_Q.sum()),
        "kind": reading.kind,
        "hashes": {"model": artefact.source["sha256"], "corpora": reading.corpora},
    }


PARTS: dict[str, Callable[[Pass], PassPart[Any]]] = {
    "contributions": Contributions,
    "router": RouterQualityOfExperts,
    "examples": Examples,
    "spectrum": Spectrum,
    "direct": DirectEffects,  # after the spectrum, whose directions it follows
    "predictivity": Predictivity,
    "near_duplicates": NearDuplicates,
    "routing": Routing,
}
"""What is heard in one pass, in the order in which their columns stand."""
CONTROLS: dict[str, Callable[[Pass], PassPart[Any]]] = {"random_partitions": RandomPartitions}
"""Parts that are made with `controls` alone."""
KEYS = {"layers": ("layer",), "experts": ("layer", "expert")}
"""Tables of which every part gives columns, and the columns that name a row."""


def describe(work: Pass) -> dict[str, Table]:
    """All descriptive tables of a moefied model, from one pass over what is read.

    With several processes, all of which call this, each runs some of the batches and makes some of the
    layers' random partitions; the first makes the tables, and in the others there are none.
    """
    main = work.processes.main
    parts = listened(work, (PARTS | CONTROLS if work.controls else PARTS).values())
    gather(parts, work.modules, work.processes)
    tables = [part.tables() for part in parts if main or part.everywhere]
    return merged(tables) if main else {}


def listened(
    work: Pass, makers: Iterable[Callable[[Pass], PassPart[Any]]], batches: list[int] | None = None
) -> list[PassPart[Any]]:
    """Parts that have heard these batches, or this process's share of all."""
    for make in makers:
        work.parts.append(make(work))
    before = [part.before for part in work.parts if part.before is not None]
    if batches is None:
        batches = list(work.processes.mine(range(len(work.reading.batches))))
    if 0 not in batches:
        observe(work.model, work.reading, before, batches=[0])
    observe(
        work.model, work.reading, work.parts,
        unembedding=work.unembedding, batches=batches, report=work.report,
    )  # fmt: skip
    return work.parts


def merged(parts: Iterable[dict[str, Table]]) -> dict[str, Table]:
    """Tables of several parts as one set: those of `KEYS` side by side, all others by name."""
    found: dict[str, Table] = {}
    for part in parts:
        for name, given in part.items():
            if name not in found:
                found[name] = dict(given)
                continue
            have = found[name]
            assert name in KEYS, f"two parts give the table {name}"
            assert all(have[key] == given[key] for key in KEYS[name]), f"rows of {name} differ"
            twice = have.keys() & given.keys() - set(KEYS[name])
            assert not twice, f"two parts give {sorted(twice)} of {name}"
            have |= given
    return found
