"""The training loop: steps, checks on held-out text, checkpoints, a log, and a stop where it diverges.

Accelerate runs it in one process or in many (`accelerate launch`); each process takes its share of the
documents of a step, and gradients are those of the mean over all of the step's tokens.

Files in the work folder: `checkpoint` (what `Accelerator.save_state` writes, replaced by rename) and
`log.jsonl`, one line a step. Shapes: none of its own.
"""

import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from moefy.conversion.backward import CLIP, scaled_groups
from moefy.data.corpus import IGNORED, Batch, Corpus, Sample, make_batches, sample_length, sampler
from moefy.data.inputs import read_batches
from moefy.data.shards import EVALUATED_DOCUMENTS, HELD_OUT_TOKENS, by_role
from moefy.errors import CheckpointError, CorpusError, MoefyError
from moefy.evaluation.outputs import Objective, judge, run_outputs
from moefy.models.checkpoint import Checkpoint
from moefy.models.config import read_config
from moefy.models.locate import meta_model, sites
from moefy.run.computing import now
from moefy.run.console import Reporter
from moefy.run.folder import put_in_place
from moefy.training.curves import Log
from moefy.training.learning import in_training
from moefy.training.recipe import TrainingRecipe

WARMUP = 0.05
"""Share of the steps over which the learning rate rises."""

WORSE = 1.5
"""Held-out loss over that before training at which a check does not pass."""

PATIENCE = 2
"""Checks in a row that do not pass after which training stops."""


class Diverged(MoefyError):
    """Training went wrong before there was anything good to keep."""


Check = Callable[[], dict[str, Any]]
"""Figures on held-out text; `held_out_loss` among them decides whether training goes well."""


@dataclass
class Outcome:
    """How a training went."""

    steps: int = 0
    tokens: int = 0
    """Predicted tokens that were trained on."""
    stopped: str | None = None
    """Why it ended early; the model is then that of the last checkpoint."""
    before: dict[str, Any] = field(default_factory=dict)
    """The check before the first step."""
    after: dict[str, Any] = field(default_factory=dict)
    """The last check that passed."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        vars(self).update(state)


def make_accelerator(recipe: TrainingRecipe) -> Accelerator:
    """Accelerate as the environment says (`accelerate launch`), in the recipe's precision.

    Without a GPU it runs on CPUs. Routers and compensations may go unused in a step.
    """
    # Accelerate keeps the precision of the first run of a process; each of ours has its own.
    AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision="bf16" if recipe.precision == "bf16" else "no",
        cpu=not now().on_gpu,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


@torch.enable_grad()
def fine_tune(
    model: nn.Module,
    groups: list[dict[str, Any]],
    objective: Objective,
    samples: list[Sample],
    recipe: TrainingRecipe,
    *,
    accelerator: Accelerator,
    check: Check,
    folder: Path,
    report: Reporter,
    what: str,
) -> Outcome:
    """Train `model` in place, by parameter groups, or go on from the checkpoint in `folder`.

    Raises `Diverged` where the loss is not finite before there is a checkpoint to go back to.
    """
    steps = _Stepping.prepared(model, groups, objective, recipe, accelerator)
    outcome, store = steps.outcome, _Store(accelerator, folder)
    if store.exists:
        store.load()
    else:
        outcome.before = outcome.after = check()
        store.save()
    log = Log(folder / "log.jsonl", outcome.steps, accelerator.is_main_process)
    drawn = sampler(samples, recipe.step_tokens, recipe.seed, least=accelerator.num_processes)
    began, first = time.perf_counter(), outcome.steps
    with report.progress(recipe.steps, what, first) as progress:
        for documents in islice(drawn, outcome.steps, recipe.steps):
            if (row := steps.take(documents, check)) is not None:
                # Before the checkpoint: lines after the newest one are dropped when a run goes on.
                log.add({"step": outcome.steps, "tokens": outcome.tokens, **row})
                if "held_out_loss" in row and not steps.failed:
                    store.save()
                left = (recipe.steps - outcome.steps) * (time.perf_counter() - began)
                progress(f"{_shown(row)}, {_minutes(left / (outcome.steps - first))} left")
            if outcome.stopped:
                _go_back(outcome, store, what)
                break
    accelerator.unwrap_model(steps.wrapped, keep_fp32_wrapper=False)
    accelerator.wait_for_everyone()
    return outcome


def _go_back(outcome: Outcome, store: "_Store", what: str) -> None:
    """To the last checkpoint that was good; raises `Diverged` if there is none."""
    reason = outcome.stopped
    store.load()
    if not outcome.steps:
        raise Diverged(
            f"{what}: {reason}, before there was a checkpoint to go back to; lower learning_rate"
        )
    outcome.stopped = reason


def _schedule(optimizer: Optimizer, steps: int) -> LambdaLR:
    """Warm-up and cosine. The curve of transformers is 0 at both of its ends: one step more than there
    are, and the first of them left out, so that every step moves the weights."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    warmup = max(1, round(WARMUP * steps))
    found: LambdaLR = get_cosine_schedule_with_warmup(optimizer, warmup, steps + 1, last_epoch=0)
    return found


@dataclass
class _Stepping:
    """What takes the steps of a training, and says whether it goes well."""

    wrapped: nn.Module
    parameters: list[nn.Parameter]
    optimizer: Optimizer
    schedule: LambdaLR
    objective: Objective
    recipe: TrainingRecipe
    accelerator: Accelerator
    outcome: Outcome
    failed: int = 0
    """Checks in a row that did not pass."""

    @classmethod
    def prepared(
        cls,
        model: nn.Module,
        groups: list[dict[str, Any]],
        objective: Objective,
        recipe: TrainingRecipe,
        accelerator: Accelerator,
    ) -> "_Stepping":
        """With an optimiser of its own; what it keeps is part of checkpoints."""
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        schedule, outcome = _schedule(optimizer, recipe.steps), Outcome()
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(schedule, outcome)
        parameters = [p for group in groups for p in group["params"]]
        return cls(
            wrapped, parameters, optimizer, schedule, objective, recipe, accelerator, outcome
        )

    def take(self, documents: list[Sample], check: Check) -> dict[str, Any] | None:
        """One step on all processes' documents, and a check where one is due; what is logged of them.

        None if the step could not be taken. `outcome` says why training is to stop.
        """
        began, accelerator, outcome = time.perf_counter(), self.accelerator, self.outcome
        counted = sum(map(_predicted, documents))
        share = documents[accelerator.process_index :: accelerator.num_processes]
        row: dict[str, Any] = self._backward(share, counted)
        norm = float(accelerator.clip_grad_norm_(self.parameters, CLIP))
        row |= {"gradient_norm": norm, "learning_rate": float(self.schedule.get_last_lr()[0])}
        if not math.isfinite(row["loss"] + norm):
            outcome.stopped = f"the loss was not finite at step {outcome.steps + 1}"
            return None
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        outcome.steps += 1
        outcome.tokens += counted
        row |= {"tokens_per_second": counted / (time.perf_counter() - began)}
        if outcome.steps % self.recipe.check_every == 0 or outcome.steps == self.recipe.steps:
            # All processes are to decide alike.
            row |= self._judged(broadcast_object_list([check()])[0])
        return row

    def _judged(self, checked: dict[str, Any]) -> dict[str, Any]:
        """A check taken in; too many that do not pass, or the last one, end the training."""
        outcome = self.outcome
        if _passes(checked, outcome.before):
            outcome.after, self.failed = checked, 0
            return checked
        self.failed += 1
        if self.failed == PATIENCE or outcome.steps == self.recipe.steps:
            outcome.stopped = (
                f"the held-out loss rose to {checked['held_out_loss']:.4g} at step "
                f"{outcome.steps}, from {outcome.before['held_out_loss']:.4g} before training"
            )
        return checked

    def _backward(self, documents: list[Sample], counted: int) -> dict[str, float]:
        """Add up the gradients of this process's documents; returns means over all of the step's tokens."""
        accelerator = self.accelerator
        sums: dict[str, Tensor] = {}
        assert self.recipe.micro_tokens is not None  # `for_this_machine` has said
        batches = make_batches(documents, tokens=self.recipe.micro_tokens)
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            with nullcontext() if last else accelerator.no_sync(self.wrapped):
                with accelerator.autocast():
                    figures = self.objective(self.wrapped, batch)
                # Processes average their gradients; the mean is to be over tokens.
                accelerator.backward(figures["loss"] * accelerator.num_processes / counted)
            for name, value in figures.items():
                sums[name] = sums.get(name, torch.zeros(())) + value.detach().float().cpu()
        names = sorted(sums)
        total = torch.stack([sums[name] for name in names]).to(accelerator.device)
        if accelerator.num_processes > 1:
            total = accelerator.reduce(total, "sum")
        return dict(zip(names, (total / counted).tolist(), strict=True))


@dataclass(frozen=True)
class TrainingTexts:
    """What training reads: documents to train on, to check on and to evaluate on, none of them twice."""

    train: list[Sample]
    held: list[Batch]
    """For the checks while it trains."""
    evaluated: list[Batch]
    """For the figures before and after."""


def read_texts(
    source: Checkpoint, text: Corpus, recipe: TrainingRecipe, seed: int
) -> TrainingTexts:
    """Split a corpus as conversion with this seed splits it: training reads what that fits on.

    Raises `CorpusError` where that is less than one step.
    """
    texts = by_role(text, seed)
    kind = sites(meta_model(read_config(source)))[0].family.kind
    read = read_batches(source, kind, texts["training"], recipe.context)
    samples = [sample for batch in read for sample in batch.samples]
    tokens = sum(map(sample_length, samples))
    if tokens < recipe.step_tokens:
        raise CorpusError(
            f"corpus {text.name}: {tokens} tokens to train on, one step takes "
            f"{recipe.step_tokens}; give more text or a smaller batch_tokens"
        )
    evaluated = texts["evaluation"].take(EVALUATED_DOCUMENTS)
    return TrainingTexts(
        samples,
        read_batches(source, kind, texts["held-out"], recipe.context, HELD_OUT_TOKENS),
        read_batches(source, kind, evaluated, recipe.context),
    )


def disk_of(source: Checkpoint) -> int:
    """Bytes that a run needs: two checkpoints, one written beside the other (weights and both moments of
    Adam in fp32), and the result."""
    parameters = sum(math.prod(tensor.shape) for tensor in source.tensors.values())
    return 2 * 3 * 4 * parameters + source.bytes


class _Store:
    """The checkpoint in a work folder: always a whole one, replaced by rename."""

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.accelerator = accelerator
        self.place, self.part = folder / "checkpoint", folder / "checkpoint.part"
        self.old = folder / "checkpoint.old"

    @property
    def exists(self) -> bool:
        return self._newest() is not None

    def _newest(self) -> Path | None:
        # Killed between the two renames of `save`, the one before is the newest.
        return next((place for place in (self.place, self.old) if place.exists()), None)

    def save(self) -> None:
        if self.accelerator.is_main_process:
            shutil.rmtree(self.part, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(self.part))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            put_in_place(self.part, self.place, self.old)
        self.accelerator.wait_for_everyone()

    def load(self) -> None:
        """Raises `CheckpointError` where what lies there is damaged or belongs to another run."""
        place = self._newest()
        try:
            self.accelerator.load_state(str(place))
        except (OSError, RuntimeError, LookupError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"{place}: is damaged or of another run ({str(error).splitlines()[0][:120]}); put the "
                "right one back, or pass --overwrite to start anew"
            ) from error


def _predicted(sample: Sample) -> int:
    """Tokens that a document asks to predict; where it asks for none, its positions."""
    if sample.targets_T is not None:
        return int((sample.targets_T != IGNORED).sum())
    if "pixel_values" in sample.inputs:
        return 1
    return max(len(value) for value in sample.inputs.values())


def _passes(checked: dict[str, Any], before: dict[str, Any]) -> bool:
    loss = checked["held_out_loss"]
    return math.isfinite(loss) and loss <= WORSE * before["held_out_loss"]


def _shown(row: dict[str, float]) -> str:
    names = {"loss": "loss", "kl": "KL", "held_out_kl": "held-out KL"}
    parts = [f"{label} {row[name]:.4f}" for name, label in names.items() if name in row]
    return ", ".join([*parts, f"{row['tokens_per_second']:.0f} tokens/s"])


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def cross_entropy(model: PreTrainedModel, batches: list[Batch]) -> float:
    """Mean cross-entropy of the predicted tokens, in nats."""
    return judge(partial(run_outputs, model), batches).mean("ce")


def train_dense(
    model: PreTrainedModel,
    objective: Objective,
    train: list[Sample],
    held: list[Batch],
    recipe: TrainingRecipe,
    *,
    folder: Path,
    report: Reporter,
    what: str,
) -> Outcome:
    """Train all parameters of `model` in place."""
    folder.mkdir(exist_ok=True)
    accelerator = make_accelerator(recipe)
    nn.Module.to(model, accelerator.device)
    in_training(model, recipe.gradient_checkpointing)
    model.requires_grad_(True)

    def check() -> dict[str, Any]:
        return {"held_out_loss": cross_entropy(model, held)}

    outcome = fine_tune(
        model, scaled_groups(model.parameters(), recipe.learning_rate), objective, train, recipe,
        accelerator=accelerator, check=check, folder=folder, report=report, what=what,
    )  # fmt: skip
    model.requires_grad_(False)
    accelerator.free_memory()
    return outcome
