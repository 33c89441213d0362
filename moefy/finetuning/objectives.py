"""What training minimises, as sums over the tokens of a batch.

`towards` distils: `w KL(dense || moefied) + (1 - w) cross-entropy` (Hinton et al. 2015, temperature 1).
`language` is the cross-entropy alone, `sparse` adds a penalty on the activations of a dense model:
square Hoyer, `(sum |h|)^2 / sum h^2` per token over N (Szatkowski et al. 2024, D2DMoE; scaled to (0, 1],
the share of neurons that are active where all are equally so), or the mean of `|h|` (L1).

Shapes: B documents, T tokens, V vocabulary, N neurons.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from moefy.activations import inputs_of
from moefy.data import IGNORED, Batch
from moefy.distil import compared, distance
from moefy.finetuning.loop import Objective

TINY = 1e-12


def call(model: nn.Module, plain: PreTrainedModel, batch: Batch) -> Tensor:
    """What `model`, which may be wrapped, says at the positions that count."""
    return compared(model(**inputs_of(plain, batch)), batch)


def nats(logits: Tensor, batch: Batch) -> Tensor | None:
    """Cross-entropy summed over predicted tokens; None for models that predict none."""
    if batch.targets_BT is None:
        return None
    targets = batch.targets_BT[batch.targets_BT != IGNORED].to(logits.device)
    return cross_entropy(logits.float(), targets, reduction="sum")


def towards(student: PreTrainedModel, dense: PreTrainedModel, weight: float) -> Objective:
    """Distillation from `dense`, with cross-entropy where the model predicts tokens."""

    def objective(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        with torch.no_grad():
            want = call(dense, dense, batch)
        got = call(model, student, batch)
        kl = distance(want, got, batch) * len(got)
        ce = nats(got, batch)
        if ce is None:
            return {"loss": kl, "kl": kl}
        return {"loss": weight * kl + (1 - weight) * ce, "kl": kl, "ce": ce}

    return objective


def language(plain: PreTrainedModel) -> Objective:
    """Cross-entropy on the text."""

    def objective(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        ce = nats(call(model, plain, batch), batch)
        assert ce is not None
        return {"loss": ce, "ce": ce}

    return objective
