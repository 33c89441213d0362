"""Sparsifying: train a dense model on text so that fewer of its neurons are active, before converting.

    record = sparsify("model", "sparser", recipe=SparsifyRecipe(relu=True))
    convert("sparser", "moefied")

What comes out is an ordinary checkpoint of the same architecture: with `relu` its config names another
activation. Beside it `control` trains the unchanged model on the same tokens: what training on this
text does by itself is not to be mistaken for what sparsity costs.
"""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.data.corpus import Batch, load_corpus
from moefy.errors import UnsupportedModel
from moefy.evaluation.judge import judge
from moefy.evaluation.outputs import Outputs, ce_per_token, run_outputs
from moefy.experts.loading import load_dense
from moefy.models.checkpoint import Checkpoint, copy_folder, overwrite
from moefy.models.config import read_config
from moefy.models.locate import Site, disk_names, meta_model, sites
from moefy.run.console import Reporter
from moefy.run.output import OutputFolder
from moefy.run.processes import launched
from moefy.run.provenance import machine
from moefy.training.curves import draw_curves
from moefy.training.dense import train_dense
from moefy.training.loop import Diverged, Outcome, begin
from moefy.training.objectives import Activations, sparse
from moefy.training.recipe import SparsifyRecipe
from moefy.training.texts import Texts, read_texts


def sparsify(
    model: str | Path,
    out: str | Path,
    *,
    recipe: SparsifyRecipe | None = None,
    corpus: Any = None,
    control: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train the checkpoint `model` towards sparse activations; the result is the folder `out`.

    `corpus` is anything `load_corpus` reads, split as conversion with seed `recipe.seed` splits it:
    what conversion will evaluate on is not trained on. `control` trains the unchanged model on the
    same tokens as well. `resume` takes up a run that was killed and ends with the same tensors.

    Returns the record of the run, which is also in `out/sparsify.json`. Raises `MoefyError` for
    anything that is the user's to mend; `out` then is as it was.
    """
    recipe = recipe or SparsifyRecipe()
    processes = PartialState(cpu=not torch.cuda.is_available())
    main = processes.is_main_process
    report = Reporter(quiet=quiet or not main)
    source = Checkpoint.open(model)
    found = sites(meta_model(read_config(source)))
    key = _activation_key(source, found) if recipe.relu else None
    text = load_corpus(corpus)
    texts = read_texts(source, text, recipe, recipe.seed)
    if texts.held[0].targets_BT is None:
        raise UnsupportedModel(
            f"{source.folder}: predicts no tokens, so there is no cross-entropy to train on"
        )
    output = OutputFolder(Path(out))
    begin(output, source, [asdict(recipe), text.sha256], resume=resume, overwrite=overwrite)
    report.say(
        f"{source.folder}: {'ReLU, ' if key else ''}penalty {recipe.penalty} x {recipe.weight:g}, "
        f"{recipe.tokens} tokens, {recipe.steps} steps of {recipe.batch_tokens}"
    )
    with output.full_disk(), launched().together():
        plain = load_dense(source, dtype=torch.float32)
        nn.Module.to(plain, processes.device)
        before = _figures(plain, found, texts)
        finished = output.work / "model"
        if main:
            copy_folder(source.folder, finished)
            if key:
                _rename_activation(finished, key)
        processes.wait_for_everyone()
        sparser = load_dense(Checkpoint.open(finished), dtype=torch.float32) if key else plain
        del plain
        try:
            outcome = _train(sparser, found, texts, recipe, output.work, report, "sparsify")
        except Diverged:
            if main:
                output.discard()
            raise
        if main:
            _write(sparser, finished)
        processes.wait_for_everyone()
        # What is written may be rounded to 16 bits: that is what is evaluated.
        written = load_dense(Checkpoint.open(finished), dtype=torch.float32)
        nn.Module.to(written, processes.device)
        after = _figures(written, found, texts)
        record: dict[str, Any] = {
            "kind": "sparsify",
            "recipe": asdict(recipe),
            "corpus": {"name": text.name, "sha256": text.sha256},
            "training": vars(outcome),
            "before": before,
            "after": after,
        }
        if control:
            same = load_dense(source, dtype=torch.float32)
            without = replace(recipe, penalty="none", weight=0.0)
            trained = _train(
                same, found, texts, without, output.work / "control", report, "control"
            )
            record["control"] = {**_figures(same, found, texts), "training": vars(trained)}
        if not main:
            return {}
        record["machine"] = machine()
        (finished / "sparsify.json").write_text(json.dumps(record, indent=1) + "\n")
        shutil.copy(output.work / "log.jsonl", finished / "log.jsonl")
        if not draw_curves(finished / "log.jsonl", finished / "curves.png"):
            report.say("no picture of the curves: pip install moefy[plots]")
    output.commit(finished)
    if outcome.stopped:
        report.say(
            f"stopped: {outcome.stopped}; {out} holds the model of step {outcome.steps}, the last "
            "one that was good; lower learning_rate or weight"
        )
    return record


def _activation_key(source: Checkpoint, found: list[Site]) -> str:
    """The key of config.json that names the activation."""
    key = found[0].family.activation
    config = json.loads((source.folder / "config.json").read_text(encoding="utf-8"))
    if "." in key or key not in config:
        raise UnsupportedModel(
            f"{source.folder}: relu=true: the activation of model_type '{config.get('model_type')}' "
            "cannot be changed by a key of its config.json; sparsify without relu"
        )
    return key


def _rename_activation(folder: Path, key: str) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, key: "relu"}, indent=2) + "\n", encoding="utf-8")


def _train(
    model: PreTrainedModel,
    found: list[Site],
    texts: Texts,
    recipe: SparsifyRecipe,
    folder: Path,
    report: Reporter,
    what: str,
) -> Outcome:
    activations = Activations(model, found, recipe.penalty)
    try:
        return train_dense(
            model, sparse(model, activations, recipe.weight), texts.train, texts.held, recipe,
            folder=folder, report=report, what=what,
        )  # fmt: skip
    finally:
        activations.remove()


def _figures(model: PreTrainedModel, found: list[Site], texts: Texts) -> dict[str, float]:
    """On the evaluation shard: cross-entropy, share of the activations that are not zero and square
    Hoyer over N, over tokens and layers."""
    activations = Activations(model, found, "hoyer")

    def run(batch: Batch) -> Outputs:
        with activations.over(batch):
            return run_outputs(model, batch)

    def of(_: Outputs, got: Outputs) -> dict[str, Tensor]:
        ce_J = ce_per_token(got)
        of_batch = {"active": activations.density(), "hoyer": activations.mean()}
        return {"ce": ce_J, **{name: value.expand(len(ce_J)) for name, value in of_batch.items()}}

    judgement = judge(run, texts.evaluated, of=of)
    activations.remove()
    return {name: judgement.mean(name) for name in ("ce", "active", "hoyer")}


def _write(model: PreTrainedModel, folder: Path) -> None:
    """Put the trained weights in the place of those that were copied, in their dtype."""
    stored = Checkpoint.open(folder)
    meta = meta_model(read_config(Checkpoint.open_config(folder)))
    state = model.state_dict()
    for disk, name in disk_names(meta, stored.tensors).items():
        now = state[name].detach().cpu().to(stored.read(disk).dtype)
        overwrite(stored.tensors[disk], now)
