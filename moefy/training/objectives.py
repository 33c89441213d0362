"""What training minimises, as sums over the tokens of a batch; and training a dense model by it.

`towards` distils: `w KL(dense || moefied) + (1 - w) cross-entropy` (Hinton et al. 2015, temperature 1).
`language` is the cross-entropy alone, `sparse` adds a penalty on the activations of a dense model:
square Hoyer, `(sum |h|)^2 / sum h^2` per token over N (Szatkowski et al. 2024, D2DMoE; scaled to (0, 1],
the share of neurons that are active where all are equally so), or the mean of `|h|` (L1).

Shapes: B documents, T tokens, V vocabulary, N neurons.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.conversion.distil import scaled_groups
from moefy.data.corpus import Batch, Sample
from moefy.evaluation.judge import judge
from moefy.evaluation.outputs import (
    Objective,
    ce_of,
    ce_per_token,
    distance,
    kl_of,
    per_position,
    run_outputs,
)
from moefy.models.locate import Site, side_of
from moefy.run.console import Reporter
from moefy.training.loop import Outcome, fine_tune, make_accelerator
from moefy.training.parts import in_training
from moefy.training.recipe import TrainingRecipe

TINY = 1e-12


def towards(student: PreTrainedModel, dense: PreTrainedModel, weight: float) -> Objective:
    """Distillation from `dense`, with cross-entropy where the model predicts tokens."""

    def objective(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            want = run_outputs(dense, batch)
        got = run_outputs(student, batch, through=model)
        if got.targets_J is None:
            kl = distance(want, got) * len(got)
            return {"loss": kl, "kl": kl}

        def of(at: slice, p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
            return kl_of(p, q), ce_of(q, got, at)

        kl, ce = (value_J.sum() for value_J in per_position(of, want, got))
        return {"loss": weight * kl + (1 - weight) * ce, "kl": kl, "ce": ce}

    return objective


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
