"""Recovery: train a moefied model on text until it is as good as the dense one again.

    record = recover("moefied", "recovered")

The dense model teaches; experts, routers and compensations (or any of them) learn. Selection stays
hard: what does not run gets no gradient, but for routers with parameters, which learn through a
straight-through sigmoid. docs/training.md says what to expect.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from moefy import recipe as recipes
from moefy.data.corpus import Corpus, load_corpus
from moefy.errors import MoefyError
from moefy.evaluation.evaluate import evaluate
from moefy.evaluation.outputs import language
from moefy.evaluation.tables import model_card
from moefy.experts.loading import load, load_dense
from moefy.experts.routed import Routed
from moefy.experts.saving import save
from moefy.experts.sparse_mlp import use_backend
from moefy.models.artefact import ADAPTER, Artefact, open_artefact, read_artefact
from moefy.models.checkpoint import Checkpoint
from moefy.models.config import read_config
from moefy.models.locate import meta_model, sites
from moefy.run.computing import asked, machine
from moefy.run.job import Job
from moefy.run.memory import map_large_blocks, peak_memory
from moefy.run.processes import launched
from moefy.run.reading import reading
from moefy.training.curves import keep_log, stopped
from moefy.training.learning import Learning, RecoveryCheck, in_training, towards, trained
from moefy.training.loop import (
    Diverged,
    Outcome,
    TrainingTexts,
    cross_entropy,
    disk_of,
    fine_tune,
    make_accelerator,
    read_texts,
    train_dense,
)
from moefy.training.recipe import RecoverRecipe, for_this_machine
from moefy.training.teacher import another, sixteen_bits


@asked
def recover(
    model: str | Path,
    out: str | Path,
    *,
    recipe: RecoverRecipe | None = None,
    corpus: Any = None,
    against: str | Path | None = None,
    control: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train the moefied folder `model` towards its dense model; the result is the folder `out`.

    `corpus` is anything `load_corpus` reads, split as conversion splits it: training reads the shards
    that conversion fits on, never that of evaluation. `against` is the dense model where the folder
    does not hold it any more (it was trained before). `control` trains the dense model on the same
    tokens as well, to compare with. `resume` takes up a run that was killed and ends with the same
    tensors.

    Returns the record of the run, which is also in `out/records.json` as `recovery`. Raises
    `MoefyError` for anything that is the user's to mend; `out` then is as it was.
    """
    job = Job(
        "recover", out, resume=resume, overwrite=overwrite, quiet=quiet, processes=launched(),
        reads=[model] if against is None else [model, against],
    )  # fmt: skip
    map_large_blocks()
    chosen = for_this_machine(recipe or RecoverRecipe())
    recovery = _Recovery.read(job, Path(model), chosen, corpus, against)
    if control and recovery.texts.held[0].targets_BT is None:
        raise MoefyError("--control trains on cross-entropy, and this model predicts no tokens")
    with job.running(recovery.decided(), disk=disk_of(recovery.source), worthless=(Diverged,)):
        record = recovery.run(control)
    if not job.processes.main:
        return {}
    job.commit()
    recovery.say_if_stopped(record)
    return record


@dataclass(frozen=True)
class _Recovery:
    """What is trained, on what, and by whom."""

    job: Job
    folder: Path
    artefact: Artefact
    converted: recipes.Recipe
    """What the model was converted with."""
    source: Checkpoint
    """The dense model, which teaches."""
    apart: bool
    """Whether that is another folder than the moefied model."""
    corpus: Corpus
    texts: TrainingTexts
    recipe: RecoverRecipe
    accelerator: Accelerator

    @classmethod
    def read(
        cls,
        job: Job,
        folder: Path,
        recipe: RecoverRecipe,
        corpus: Any,
        against: str | Path | None,
    ) -> "_Recovery":
        """Raises `MoefyError` where it cannot be trained."""
        artefact = read_artefact(folder)
        source = _dense_source(artefact, folder, against)
        job.output.apart_from(source.folder)
        converted, text = recipes.from_dict(artefact.recipe), load_corpus(corpus)
        texts = read_texts(source, text, recipe, converted.seed)
        accelerator = make_accelerator(recipe)
        return cls(
            job, folder, artefact, converted, source, against is not None, text, texts, recipe,
            accelerator,
        )  # fmt: skip

    def decided(self) -> list[Any]:
        """All that decides the result, as JSON values."""
        hashes = self.job.processes.once(self.source.all_hashes)
        settings = [self.artefact.sha256, asdict(self.recipe), self.corpus.sha256]
        return [hashes, *settings, self.job.processes.count]

    def run(self, control: bool) -> dict[str, Any]:
        """Train, write, evaluate; the record, or nothing in processes that have only helped."""
        job, recipe, accelerator = self.job, self.recipe, self.accelerator
        job.report.say(
            f"{self.folder}: trains {', '.join(recipe.parts)} on {recipe.tokens} tokens, "
            f"{recipe.steps} steps of {recipe.step_tokens}, in {accelerator.num_processes} process(es)"
        )
        before, outcome = self._trained()
        controlled = self._control() if control else None
        if not job.processes.main:
            return {}
        # What is written may be rounded to 16 bits: that is what is evaluated.
        written = load(job.finished, dtype=torch.float32, verify=False)
        nn.Module.to(written, accelerator.device)
        after = evaluate(
            written, self.texts.evaluated, against=self._dense(), report=self.job.report
        )
        record = {
            "kind": "recovery",
            "recipe": asdict(recipe),
            "corpus": {"name": self.corpus.name, "sha256": self.corpus.sha256},
            "training": vars(outcome),
            "processes": accelerator.num_processes,
            "peak_memory": peak_memory(),
            "before": before["total"],
            "after": after["total"],
            **_closed(before["total"], after["total"], controlled),
            "machine": machine(),
        }
        self._finish(record, after)
        return record

    def _dense(self) -> PreTrainedModel:
        """The dense model by itself."""
        dense = load_dense(self.source, dtype=torch.float32)
        dense.requires_grad_(False)
        nn.Module.to(dense, self.accelerator.device)
        return dense

    def _trained(self) -> tuple[dict[str, Any], Outcome]:
        """Evaluate, train, write; what came out before, and how training went. Nothing stays in memory."""
        student = load(self.folder, dtype=torch.float32, verify=False)
        nn.Module.to(student, self.accelerator.device)
        dense = self._dense() if self.apart else None
        before = self._before(student, dense)
        outcome = self._train(student, dense)
        if self.job.processes.main:
            save(student, self.job.finished)
        return before, outcome

    def _before(self, student: PreTrainedModel, dense: PreTrainedModel | None) -> dict[str, Any]:
        """The evaluation before training, made once."""
        stages = self.job.stages
        if self.job.processes.main and not stages.has("before"):
            evaluated = self.texts.evaluated
            stages.keep(
                "before", evaluate(student, evaluated, against=dense, report=self.job.report)
            )
        self.job.processes.wait()
        before: dict[str, Any] = stages.read("before")
        return before

    def _train(self, student: PreTrainedModel, dense: PreTrainedModel | None) -> Outcome:
        """The loop on the moefied model; leaves the trained weights in `student`."""
        recipe, accelerator = self.recipe, self.accelerator
        modules = [m for m in student.modules() if isinstance(m, Routed)]
        learns = "routers" in recipe.parts
        if learns and not all(m.selection.by_score for m in modules):
            raise MoefyError(
                "train=routers: this model's selection does not decide by one token's scores, its "
                "routers cannot learn; name the other parts with --train"
            )
        in_training(student, recipe.gradient_checkpointing)
        with self._learning(student) as (learning, precision):
            teacher = learning.teacher if dense is None else another(dense)
            check = RecoveryCheck(
                student, teacher, self.texts.held, self.converted, recipe.distil, precision
            )
            check.merged = learning.merged
            accelerator.register_for_checkpointing(check)
            for module in modules:
                module.straight_through = learns and any(True for _ in module.router.parameters())
            outcome = fine_tune(
                learning.wrapped, learning.groups, towards(student, teacher, recipe.distil),
                self.texts.train, recipe, accelerator=accelerator, check=check, folder=self.job.work,
                report=self.job.report, what="recover",
            )  # fmt: skip
        for module in modules:
            module.straight_through, module.scores_TE = False, None
        self._warn(outcome.after.get("collapsed_layers", []))
        accelerator.free_memory()
        return outcome

    @contextmanager
    def _learning(
        self, student: PreTrainedModel
    ) -> Iterator[tuple[Learning, Callable[[], AbstractContextManager[Any]]]]:
        """The model as it learns, and what its passes run in."""
        with trained(student, self.recipe) as learning:
            if self.recipe.precision == "fp32":
                yield learning, nullcontext
                return
            use_backend(student, "masked")  # others ask for one dtype of weights and inputs
            with sixteen_bits(student, learning.adapted):
                yield learning, self.accelerator.autocast

    def _warn(self, collapsed: list[int]) -> None:
        if collapsed:
            self.job.report.say(
                f"warning: in layers {', '.join(map(str, collapsed))} the load has gathered on few "
                "experts (effective experts below half of what they were); see "
                f"{self.job.output.out}/log.jsonl"
            )

    def _control(self) -> dict[str, Any]:
        """The dense model trained on the same tokens, in the same order, on the text alone."""
        model, texts = load_dense(self.source, dtype=torch.float32), self.texts
        outcome = train_dense(
            model, language(model), texts.train, texts.held, self.recipe,
            folder=self.job.work / "control", report=self.job.report, what="control",
        )  # fmt: skip
        return {"ce": cross_entropy(model, texts.evaluated), "training": vars(outcome)}

    def _finish(self, record: dict[str, Any], evaluation: dict[str, Any]) -> None:
        """Records, card, log and curves beside the weights."""
        earlier, finished = self.folder / "records.json", self.job.finished
        records: dict[str, Any] = {}
        if earlier.exists():
            with reading(earlier, "move it away and pass --resume"):
                records = {**json.loads(earlier.read_text(encoding="utf-8"))}
        records |= {"recovery": record, "evaluation": evaluation}
        (finished / "records.json").write_text(json.dumps(records, indent=1) + "\n")
        if "conversion" in records:
            card = model_card(read_artefact(finished, verify=False), records)
            (finished / "README.md").write_text(card, encoding="utf-8")
        keep_log(self.job)

    def say_if_stopped(self, record: dict[str, Any]) -> None:
        """One line where training ended early."""
        training = record["training"]
        if training["stopped"]:
            self.job.report.say(stopped(training, self.job, "learning_rate"))


def _dense_source(artefact: Artefact, folder: Path, against: str | Path | None) -> Checkpoint:
    """Where the dense model lies that teaches."""
    if artefact.form == ADAPTER:
        raise MoefyError(
            f"{folder}: an adapter cannot hold trained weights; convert without --adapter first"
        )
    if against is not None:
        source = Checkpoint.open(against)
        found = [(s.layer, s.neurons, s.width) for s in sites(meta_model(read_config(source)))]
        if found != [(entry.layer, entry.neurons, entry.width) for entry in artefact.layers]:
            raise MoefyError(
                f"{against}: its MLPs are not those of {folder}; --against takes the dense model that "
                f"it was made from, '{artefact.source['name']}'"
            )
        return source
    if artefact.weights_modified:
        raise MoefyError(
            f"{folder}: its weights were trained already, the dense model is no longer in it; give it "
            f"with --against (it was made from '{artefact.source['name']}')"
        )
    return open_artefact(folder, verify=False)[1]


def _closed(
    before: dict[str, Any], after: dict[str, Any], control: dict[str, Any] | None
) -> dict[str, Any]:
    """Share of the gap in cross-entropy that training closed, against the dense model as it was and,
    if there is one, against the dense model trained on the same tokens; None without a gap."""
    if "ce" not in before:
        return {}
    first, last = before["ce"]["mean"], after["ce"]["mean"]

    def share(goal: float) -> float | None:
        return (first - last) / (first - goal) if first > goal else None

    found: dict[str, Any] = {"gap_closed": share(before["ce_dense"]["mean"])}
    if control is not None:
        found |= {"control": control, "gap_closed_of_control": share(control["ce"])}
    return found
