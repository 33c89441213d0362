"""Recovery: train a moefied model on text until it is as good as the dense one again.

    record = recover("moefied", "recovered")

The dense model teaches; experts, routers and compensations (or any of them) learn. Selection stays
hard: what does not run gets no gradient, but for routers with parameters, which learn through a
straight-through sigmoid. docs/training.md says what to expect.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from moefy import recipe as recipes
from moefy.conversion.card import model_card
from moefy.data.corpus import load_corpus
from moefy.errors import MoefyError
from moefy.evaluation.evaluate import evaluate
from moefy.evaluation.outputs import language
from moefy.experts.loading import load, load_dense, save
from moefy.experts.routed import Routed
from moefy.models.artefact import ADAPTER, Artefact, open_artefact, read_artefact
from moefy.models.checkpoint import Checkpoint
from moefy.models.config import read_config
from moefy.models.locate import meta_model, sites
from moefy.run.console import Reporter
from moefy.run.output import OutputFolder, write_whole
from moefy.run.processes import launched
from moefy.run.provenance import machine
from moefy.training.curves import draw_curves
from moefy.training.dense import cross_entropy, train_dense
from moefy.training.held_out import RecoveryCheck
from moefy.training.loop import Diverged, Outcome, begin, fine_tune, make_accelerator
from moefy.training.objectives import towards
from moefy.training.parts import in_training, trained
from moefy.training.recipe import RecoverRecipe
from moefy.training.texts import Texts, read_texts


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
    recipe = recipe or RecoverRecipe()
    accelerator = make_accelerator(recipe)
    main = accelerator.is_main_process
    report = Reporter(quiet=quiet or not main)
    folder = Path(model)
    artefact = read_artefact(folder)
    source = _dense_source(artefact, folder, against)
    converted = recipes.from_dict(artefact.recipe)
    text = load_corpus(corpus)
    texts = read_texts(source, text, recipe, converted.seed)
    if control and texts.held[0].targets_BT is None:
        raise MoefyError("--control trains on cross-entropy, and this model predicts no tokens")
    output = OutputFolder(Path(out))
    begin(
        output, source, [artefact.sha256, asdict(recipe), text.sha256],
        resume=resume, overwrite=overwrite,
    )  # fmt: skip
    report.say(
        f"{folder}: trains {', '.join(recipe.parts)} on {recipe.tokens} tokens, {recipe.steps} steps "
        f"of {recipe.batch_tokens}, in {accelerator.num_processes} process(es)"
    )
    with output.full_disk(), launched().together():
        dense = _frozen(source, accelerator)
        student = load(folder, dtype=torch.float32, verify=False)
        before = _evaluated(student, dense, texts, output.work / "before.json", accelerator, report)
        try:
            outcome = _train(student, dense, texts, recipe, converted, accelerator, output, report)
        except Diverged:
            if main:
                output.discard()
            raise
        controlled = None
        if control:
            controlled = _control(source, texts, recipe, output, report)
        if not main:
            return {}
        finished = output.work / "model"
        save(student, finished)
        # What is written may be rounded to 16 bits: that is what is evaluated.
        written = load(finished, dtype=torch.float32, verify=False)
        nn.Module.to(written, accelerator.device)
        after = evaluate(written, texts.evaluated, against=dense, report=report)
        record = {
            "kind": "recovery",
            "recipe": asdict(recipe),
            "corpus": {"name": text.name, "sha256": text.sha256},
            "training": vars(outcome),
            "processes": accelerator.num_processes,
            "before": before["total"],
            "after": after["total"],
            **_closed(before["total"], after["total"], controlled),
            "machine": machine(),
        }
        _finish(folder, finished, output.work, record, after, report)
    output.commit(finished)
    if outcome.stopped:
        report.say(
            f"stopped: {outcome.stopped}; {out} holds the model of step {outcome.steps}, the last "
            "one that was good; lower learning_rate"
        )
    return record


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


def _frozen(source: Checkpoint, accelerator: Accelerator) -> PreTrainedModel:
    dense = load_dense(source, dtype=torch.float32)
    dense.requires_grad_(False)
    nn.Module.to(dense, accelerator.device)
    return dense


def _evaluated(
    student: PreTrainedModel,
    dense: PreTrainedModel,
    texts: Texts,
    kept: Path,
    accelerator: Accelerator,
    report: Reporter,
) -> dict[str, Any]:
    """The evaluation before training, made once."""
    if accelerator.is_main_process and not kept.exists():
        nn.Module.to(student, accelerator.device)
        found = evaluate(student, texts.evaluated, against=dense, report=report)
        write_whole(kept, json.dumps(found))
    accelerator.wait_for_everyone()
    found = json.loads(kept.read_text())
    assert isinstance(found, dict)
    return found


def _train(
    student: PreTrainedModel,
    dense: PreTrainedModel,
    texts: Texts,
    recipe: RecoverRecipe,
    converted: recipes.Recipe,
    accelerator: Accelerator,
    output: OutputFolder,
    report: Reporter,
) -> Outcome:
    """The loop on the moefied model; leaves the trained weights in `student`."""
    nn.Module.to(student, accelerator.device)
    modules = [m for m in student.modules() if isinstance(m, Routed)]
    learns = "routers" in recipe.parts
    if learns and not all(m.selection.by_score for m in modules):
        raise MoefyError(
            "train=routers: this model's selection does not decide by one token's scores, its routers "
            "cannot learn; name the other parts with --train"
        )
    check = RecoveryCheck(student, dense, texts.held, converted, recipe.distil)
    accelerator.register_for_checkpointing(check)
    in_training(student, recipe.gradient_checkpointing)
    with trained(student, recipe) as learning:
        check.merged = learning.merged
        for module in modules:
            module.straight_through = learns and any(True for _ in module.router.parameters())
        outcome = fine_tune(
            learning.wrapped, learning.groups, towards(student, dense, recipe.distil), texts.train, recipe,
            accelerator=accelerator, check=check, folder=output.work, report=report, what="recover",
        )  # fmt: skip
    for module in modules:
        module.straight_through, module.scores_TE = False, None
    collapsed = outcome.after.get("collapsed_layers", [])
    if collapsed:
        report.say(
            f"warning: in layers {', '.join(map(str, collapsed))} the load has gathered on few experts "
            f"(effective experts below half of what they were); see {output.out}/log.jsonl"
        )
    accelerator.free_memory()
    return outcome


def _control(
    source: Checkpoint, texts: Texts, recipe: RecoverRecipe, output: OutputFolder, report: Reporter
) -> dict[str, Any]:
    """The dense model trained on the same tokens, in the same order, on the text alone."""
    model = load_dense(source, dtype=torch.float32)
    outcome = train_dense(
        model, language(model), texts.train, texts.held, recipe,
        folder=output.work / "control", report=report, what="control",
    )  # fmt: skip
    return {"ce": cross_entropy(model, texts.evaluated), "training": vars(outcome)}


def _closed(
    before: dict[str, Any], after: dict[str, Any], control: dict[str, Any] | None
) -> dict[str, Any]:
    """Share of the gap in cross-entropy that training closed, against the dense model as it was and,
    where there is one, against the dense model trained on the same tokens; None without a gap."""
    if "ce" not in before:
        return {}
    first, last = before["ce"]["mean"], after["ce"]["mean"]

    def share(goal: float) -> float | None:
        return (first - last) / (first - goal) if first > goal else None

    found: dict[str, Any] = {"gap_closed": share(before["ce_dense"]["mean"])}
    if control is not None:
        found |= {"control": control, "gap_closed_of_control": share(control["ce"])}
    return found


def _finish(
    folder: Path,
    finished: Path,
    work: Path,
    record: dict[str, Any],
    evaluation: dict[str, Any],
    report: Reporter,
) -> None:
    """Records, card, log and curves beside the weights."""
    earlier = folder / "records.json"
    records = json.loads(earlier.read_text()) if earlier.exists() else {}
    records |= {"recovery": record, "evaluation": evaluation}
    (finished / "records.json").write_text(json.dumps(records, indent=1) + "\n")
    if "conversion" in records:
        card = model_card(read_artefact(finished, verify=False), records)
        (finished / "README.md").write_text(card, encoding="utf-8")
    shutil.copy(work / "log.jsonl", finished / "log.jsonl")
    if not draw_curves(finished / "log.jsonl", finished / "curves.png"):
        report.say("no picture of the curves: pip install moefy[plots]")
