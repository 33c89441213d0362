"""Training a dense model on text: the control of recovery, and what sparsifying does."""

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moefy.conversion.distil import scaled_groups
from moefy.data.corpus import Batch, Sample
from moefy.evaluation.judge import judge
from moefy.evaluation.outputs import Objective, run_outputs
from moefy.run.console import Reporter
from moefy.training.loop import Outcome, fine_tune, make_accelerator
from moefy.training.parts import in_training
from moefy.training.recipe import TrainingRecipe


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
