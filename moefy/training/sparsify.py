"""Sparsifying: train a dense model on text so that fewer of its neurons are active, before converting.

    record = sparsify("model", "sparser", recipe=SparsifyRecipe(relu=True))
    convert("sparser", "moefied")

What comes out is an ordinary checkpoint of the same architecture: with `relu` its config names another
activation. Beside it `control` trains the unchanged model on the same tokens: what training on this
text does by itself is not to be mistaken for what sparsity costs.

To the cross-entropy comes a penalty on activations: square Hoyer, `(sum |h|)^2 / sum h^2` per token over N
(Szatkowski et al. 2024, D2DMoE; scaled to (0, 1], the share of neurons that are active where all are
equally so), or the mean of `|h|` (L1).

Shapes: B documents, T tokens, N neurons.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.data.corpus import Batch, Corpus, load_corpus
from moefy.errors import UnsupportedModel
from moefy.evaluation.outputs import (
    Objective,
    Outputs,
    ce_per_token,
    judge,
    run_outputs,
)
from moefy.experts.loading import load_dense
from moefy.models.checkpoint import Checkpoint, copy_folder, overwrite
from moefy.models.config import read_config
from moefy.models.locate import Site, disk_names, meta_model, side_of, sites
from moefy.run.computing import asked, machine
from moefy.run.job import Job
from moefy.run.memory import map_large_blocks
from moefy.run.processes import launched
from moefy.run.reading import read_json
from moefy.training.curves import keep_log, stopped
from moefy.training.loop import Diverged, Outcome, TrainingTexts, disk_of, read_texts, train_dense
from moefy.training.recipe import SparsifyRecipe, for_this_machine


@asked
def sparsify(
    model: str | Path,
    out: str | Path,
    *,
    recipe: SparsifyRecipe | None = None,
    corpus: Any = None,
    control: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    device: torch.device | str | None = None,
    batch_size: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train the checkpoint `model` towards sparse activations; the result is the folder `out`.

    `corpus` is anything `load_corpus` reads, split as conversion with seed `recipe.seed` splits it:
    what conversion will evaluate on is not trained on. `control` trains the unchanged model on the
    same tokens as well. `resume` takes up a run that was killed and ends with the same tensors.

    Returns the record of the run, which is also in `out/sparsify.json`. Raises `MoefyError` for
    anything that is the user's to mend; `out` then is as it was.
    """
    map_large_blocks()
    recipe = for_this_machine(recipe or SparsifyRecipe())
    job = Job(
        "sparsify", out, resume=resume, overwrite=overwrite, quiet=quiet, processes=launched(),
        reads=[model],
    )  # fmt: skip
    run = _Sparsifying.read(job, Checkpoint.open(model), load_corpus(corpus), recipe)
    with job.running(run.decided(), disk=disk_of(run.source), worthless=(Diverged,)):
        record = run.run(control)
    if not job.processes.main:
        return {}
    job.commit()
    if record["training"]["stopped"]:
        job.report.say(stopped(record["training"], job, "learning_rate or weight"))
    return record


@dataclass(frozen=True)
class _Sparsifying:
    """What is trained, and on what."""

    job: Job
    source: Checkpoint
    sites: list[Site]
    corpus: Corpus
    texts: TrainingTexts
    recipe: SparsifyRecipe
    key: str | None
    """The key of config.json that is to name ReLU."""

    @classmethod
    def read(
        cls, job: Job, source: Checkpoint, corpus: Corpus, recipe: SparsifyRecipe
    ) -> "_Sparsifying":
        """Raises `MoefyError` where it cannot be trained."""
        job.output.apart_from(source.folder)
        mlps = sites(meta_model(read_config(source)))
        key = _activation_key(source, mlps) if recipe.relu else None
        texts = read_texts(source, corpus, recipe, recipe.seed)
        if texts.held[0].targets_BT is None:
            raise UnsupportedModel(
                f"{source.folder}: predicts no tokens, so there is no cross-entropy to train on"
            )
        return cls(job, source, mlps, corpus, texts, recipe, key)

    def decided(self) -> list[Any]:
        """All that decides the result, as JSON values."""
        hashes = self.job.processes.once(self.source.all_hashes)
        return [hashes, asdict(self.recipe), self.corpus.sha256, self.job.processes.count]

    def run(self, control: bool) -> dict[str, Any]:
        """Train, write and measure; the record."""
        job, recipe, state = self.job, self.recipe, PartialState()
        job.report.say(
            f"{self.source.folder}: {'ReLU, ' if self.key else ''}penalty {recipe.penalty} x "
            f"{recipe.weight:g}, {recipe.tokens} tokens, {recipe.steps} steps of {recipe.step_tokens}"
        )
        plain = load_dense(self.source, dtype=torch.float32)
        nn.Module.to(plain, state.device)
        before = self._figures(plain)
        if job.processes.main:
            copy_folder(self.source.folder, job.finished)
            if self.key:
                _rename_activation(job.finished, self.key)
        job.processes.wait()
        written = Checkpoint.open(job.finished)
        sparser = load_dense(written, dtype=torch.float32) if self.key else plain
        del plain
        outcome = self._train(sparser, recipe, job.work, "sparsify")
        if job.processes.main:
            _write(sparser, job.finished)
        job.processes.wait()
        # What is written may be rounded to 16 bits: that is what is evaluated.
        again = load_dense(Checkpoint.open(job.finished), dtype=torch.float32)
        nn.Module.to(again, state.device)
        record = {
            "kind": "sparsify",
            "recipe": asdict(recipe),
            "corpus": {"name": self.corpus.name, "sha256": self.corpus.sha256},
            "training": vars(outcome),
            "before": before,
            "after": self._figures(again),
            **({"control": self._control()} if control else {}),
            "machine": machine(),
        }
        if job.processes.main:
            (job.finished / "sparsify.json").write_text(json.dumps(record, indent=1) + "\n")
            keep_log(job)
        return record

    def _control(self) -> dict[str, Any]:
        """The unchanged model, trained on the same tokens without a penalty."""
        model = load_dense(self.source, dtype=torch.float32)
        without = replace(self.recipe, penalty="none", weight=0.0)
        outcome = self._train(model, without, self.job.work / "control", "control")
        return {**self._figures(model), "training": vars(outcome)}

    def _train(
        self, model: PreTrainedModel, recipe: SparsifyRecipe, folder: Path, what: str
    ) -> Outcome:
        activations = Activations(model, self.sites, recipe.penalty)
        try:
            return train_dense(
                model, sparse(model, activations, recipe.weight), self.texts.train, self.texts.held,
                recipe, folder=folder, report=self.job.report, what=what,
            )  # fmt: skip
        finally:
            activations.remove()

    def _figures(self, model: PreTrainedModel) -> dict[str, float]:
        """On the evaluation shard: cross-entropy, share of the activations that are not zero and square
        Hoyer over N, over tokens and layers."""
        activations = Activations(model, self.sites, "hoyer")

        def run(batch: Batch) -> Outputs:
            with activations.over(batch):
                return run_outputs(model, batch)

        def of(_: Outputs, got: Outputs) -> dict[str, Tensor]:
            ce_J = ce_per_token(got)
            of_batch = {"active": activations.density(), "hoyer": activations.mean()}
            return {"ce": ce_J, **{key: value.expand(len(ce_J)) for key, value in of_batch.items()}}

        judgement = judge(run, self.texts.evaluated, of=of)
        activations.remove()
        return {name: judgement.mean(name) for name in ("ce", "active", "hoyer")}


def _activation_key(source: Checkpoint, found: list[Site]) -> str:
    """The key of config.json that names the activation."""
    key = found[0].family.activation
    config = source.config
    if "." in key or key not in config:
        raise UnsupportedModel(
            f"{source.folder}: relu=true: the activation of model_type '{config.get('model_type')}' "
            "cannot be changed by a key of its config.json; sparsify without relu"
        )
    return key


def _rename_activation(folder: Path, key: str) -> None:
    file = folder / "config.json"
    config = read_json(file)
    file.write_text(json.dumps({**config, key: "relu"}, indent=2) + "\n", encoding="utf-8")


def _write(model: PreTrainedModel, folder: Path) -> None:
    """Put the trained weights in the place of those that were copied, in their dtype."""
    stored = Checkpoint.open(folder)
    meta = meta_model(read_config(Checkpoint.open_config(folder)))
    state = model.state_dict()
    for disk, name in disk_names(meta, stored.tensors).items():
        now = state[name].detach().cpu().to(stored.read(disk).dtype)
        overwrite(stored.tensors[disk], now)


TINY = 1e-12


class Activations:
    """Penalties on the activations of every MLP of a dense model, taken where its down projection
    reads them, over the positions of a batch."""

    def __init__(self, model: PreTrainedModel, found: list[Site], penalty: str) -> None:
        self.penalty = PENALTIES[penalty]
        self.mask_BT: dict[str, Tensor | None] | None = None
        """Positions that count, by side, while a batch is taken in."""
        self.sums: list[Tensor] = []
        self.active: list[Tensor] = []
        self.handles = [
            model.get_submodule(site.path("down")).register_forward_pre_hook(
                partial(self._hear, side_of(site))
            )
            for site in found
        ]

    def _hear(self, side: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        if self.mask_BT is None:
            return
        h_TN = given[0].reshape(-1, given[0].shape[-1])
        mask_BT = self.mask_BT.get(side)
        if mask_BT is not None:
            h_TN = h_TN[mask_BT.flatten().to(h_TN.device)]
        self.sums.append(self.penalty(h_TN.float()).mean())
        self.active.append((h_TN != 0).float().mean())

    @contextmanager
    def over(self, batch: Batch) -> Iterator[None]:
        """Take in one pass over this batch."""
        self.mask_BT = {side: batch.mask(side) for side in ("encoder", "decoder")}
        self.sums.clear()
        self.active.clear()
        try:
            yield
        finally:
            self.mask_BT = None

    def mean(self) -> Tensor:
        """The penalty per token, averaged over layers."""
        return torch.stack(self.sums).mean()

    def density(self) -> Tensor:
        """Share of the activations that are not zero, averaged over layers."""
        return torch.stack(self.active).mean()

    def remove(self) -> None:
        """Stop listening."""
        for handle in self.handles:
            handle.remove()


def _hoyer(h_TN: Tensor) -> Tensor:
    return h_TN.abs().sum(-1).square() / (h_TN.square().sum(-1) * h_TN.shape[-1]).clamp_min(TINY)


PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "hoyer": _hoyer,
    "l1": lambda h_TN: h_TN.abs().mean(-1),
    "none": lambda h_TN: h_TN.new_zeros(len(h_TN)),
}
"""Per token, from activations `[T, N]`."""


def sparse(plain: PreTrainedModel, activations: Activations, weight: float) -> Objective:
    """Cross-entropy on the text and `weight` times the penalty."""

    def objective(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        with activations.over(batch):
            got = run_outputs(plain, batch, through=model)
        ce, tokens = ce_per_token(got).sum(), len(got)
        penalty = activations.mean() * tokens
        return {
            "loss": ce + weight * penalty,
            "ce": ce,
            "penalty": penalty,
            "active": activations.density() * tokens,
        }

    return objective
