"""The check of a moefied model in training: held-out loss, and whether experts still share the work.

Thresholds are set anew before every check, so that as many experts run as before training: weights
change, and with them the scores. What is set travels with the checkpoints.

Shapes: T tokens, E experts of a layer.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedModel

from moefy.conversion.fit import recalibrate, varies
from moefy.data.corpus import Batch
from moefy.evaluation.judge import judge
from moefy.evaluation.outputs import Outputs, compared, distances, run_outputs
from moefy.experts.passes import Heard, observing
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.recipe import Recipe

COLLAPSED = 0.5
"""Effective experts over those before training below which a layer counts as collapsed."""


class RecoveryCheck:
    """Figures of `model` on held-out batches, against what `dense` says there."""

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        dense: PreTrainedModel,
        batches: list[Batch],
        recipe: Recipe,
        weight: float,
    ) -> None:
        self.model, self.batches, self.recipe, self.weight = model, batches, recipe, weight
        self.want = [run_outputs(dense, batch) for batch in batches]
        self.active: dict[int, float] = {}
        self.merged: Callable[[], AbstractContextManager[None]] = nullcontext
        """While it lasts the model has the weights that have been learned (`parts.Learning`)."""
        self.effective: list[float] = []
        """Effective experts of every layer before training."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        modules = sparse_mlps(self.model).values()
        return {
            "selections": [m.selection.settings() for m in modules],
            "active": self.active,
            "effective": self.effective,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a checkpoint kept."""
        modules = sparse_mlps(self.model).values()
        for module, settings in zip(modules, state["selections"], strict=True):
            module.selection = type(module.selection)(**settings)
        self.active, self.effective = state["active"], state["effective"]

    def __call__(self) -> dict[str, Any]:
        """Held-out KL, cross-entropy and loss; density, dead and effective experts, collapsed layers."""
        with self.merged():
            return self._figures()

    @torch.no_grad()
    def _figures(self) -> dict[str, Any]:
        modules = sparse_mlps(self.model)
        training = [module.straight_through for module in modules.values()]
        for module in modules.values():
            module.straight_through = False
            module.compensation.follow(module.weights)
        if varies(self.recipe) and self.active:
            recalibrate(self.model, self.recipe, self.batches, self.active)
            # Processes may differ in the last bit; they are to run the same experts.
            self.load_state_dict(broadcast_object_list([self.state_dict()])[0])
        shares = _Shares()

        def run(batch: Batch) -> Outputs:
            with observing(self.model, batch, shares):
                return run_outputs(self.model, batch)

        judgement = judge(run, self.batches, self.want, _kl_and_ce)
        for module, was in zip(modules.values(), training, strict=True):
            module.straight_through = was
        kl = judgement.mean("kl")
        ce_mean = judgement.mean("ce") if "ce" in judgement.sums_Q else 0.0
        if not self.active:
            self.active = {i: shares.active(i) - module.shared for i, module in modules.items()}
            self.effective = [shares.effective(i) for i in modules]
        effective = [shares.effective(i) for i in modules]
        share = [now / max(was, 1e-9) for now, was in zip(effective, self.effective, strict=True)]
        return {
            "held_out_loss": self.weight * kl + (1 - self.weight) * ce_mean if ce_mean else kl,
            "held_out_kl": kl,
            **({"held_out_ce": ce_mean} if ce_mean else {}),
            "density": sum(shares.active(i) for i in modules)
            / sum(m.experts for m in modules.values()),
            "dead_experts": sum(shares.dead(i) for i in modules) / len(modules),
            "effective_experts": sum(effective) / len(effective),
            "collapsed_layers": [i for i, now in enumerate(share) if now < COLLAPSED],
        }


def _kl_and_ce(dense: Outputs, sparse: Outputs) -> dict[str, Tensor]:
    """`kl`, or what stands for it, and `ce` of models that predict tokens."""
    if sparse.targets_J is None:
        return {"kl": distances(dense, sparse)["distance"]}
    return compared(dense, sparse)


class _Shares:
    """How often every expert of every layer ran."""

    def __init__(self) -> None:
        self.ran: dict[int, Tensor] = {}
        self.tokens: dict[int, int] = {}

    def hear(self, heard: Heard) -> None:
        ran_E = heard.mask_TE.sum(0).double().cpu()
        self.ran[heard.layer] = self.ran.get(heard.layer, torch.zeros_like(ran_E)) + ran_E
        self.tokens[heard.layer] = self.tokens.get(heard.layer, 0) + len(heard.mask_TE)

    def active(self, layer: int) -> float:
        """Experts that run per token."""
        return float(self.ran[layer].sum()) / self.tokens[layer]

    def dead(self, layer: int) -> float:
        """Share of the experts that never ran."""
        return float((self.ran[layer] == 0).double().mean())

    def effective(self, layer: int) -> float:
        """Share of the experts that would carry this load if all ran alike: `exp(entropy) / E`."""
        p_E = self.ran[layer] / self.ran[layer].sum().clamp_min(1)
        entropy = -(p_E * p_E.clamp_min(1e-30).log()).sum()
        return float(entropy.exp() / len(p_E))
