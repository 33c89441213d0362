"""What is trained: experts, routers, compensations, the rest; in full or through low-rank adapters.

    with trained(model, recipe) as (wrapped, groups):    # adapters are merged on the way out
        ...

Learning rates are relative to the root mean square of each matrix, so that one number suits all of
them. An adapter's matrices start anew and take a rate of their own.
"""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moefy.errors import MoefyError
from moefy.routed import Routed
from moefy.sparse_mlp import SparseMlp
from moefy.training_recipe import RecoverRecipe

LEAST = 1e-3
"""Smallest root mean square that a learning rate is relative to: weights may start at zero."""

ADAPTER_RATE = 0.03
"""Learning rate of an adapter's matrices over `learning_rate`."""

MATRICES = ("up_ND", "gate_ND", "down_ND")


def parameters_of(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of every part that is trained as a whole, each once."""
    routed = [module for module in model.modules() if isinstance(module, Routed)]
    found = {
        "routers": [p for m in routed for p in m.router.parameters()],
        "compensations": [p for m in routed for p in m.compensation.parameters()],
        "experts": [
            p for m in routed if isinstance(m, SparseMlp) for p in m.parameters(recurse=False)
        ],
    }
    known = {id(p) for part in found.values() for p in part}
    found["rest"] = [p for p in model.parameters() if id(p) not in known]
    return found


@contextmanager
def trained(
    model: PreTrainedModel, recipe: RecoverRecipe
) -> Iterator[tuple[nn.Module, list[dict[str, Any]]]]:
    """The model with gradients where the recipe trains, and the optimiser's parameter groups.

    What is yielded to call is the model itself, or, with adapters, what they are wrapped in. Raises
    `MoefyError` where the model has nothing of what is to be trained.
    """
    found = parameters_of(model)
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    adapted = recipe.lora_rank > 0
    whole = [part for part in recipe.parts if not adapted or part in ("routers", "compensations")]
    groups = matched((p for part in whole for p in found[part]), recipe.learning_rate)
    low_rank = [part for part in recipe.parts if part not in whole]
    wrapped: Any = model
    if low_rank:
        wrapped = _adapters(model, low_rank, recipe.lora_rank)
        rate = recipe.learning_rate * ADAPTER_RATE
        new = [p for n, p in wrapped.named_parameters() if "lora_" in n]
        groups += [{"params": [p], "lr": rate} for p in new]
    if not groups:
        raise MoefyError(
            f"train={recipe.train}: this model has no parameters of that kind (its routers and "
            "compensations may have none); add experts"
        )
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    try:
        yield wrapped, groups
    finally:
        if low_rank:
            wrapped.merge_and_unload()
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
            parameter.grad = None


def matched(parameters: Iterable[nn.Parameter], rate: float) -> list[dict[str, Any]]:
    """One group for every parameter, with `rate` times its root mean square as learning rate."""
    sizes = [(p, p.detach().float().square().mean().sqrt().item()) for p in parameters]
    return [{"params": [p], "lr": rate * max(size, LEAST)} for p, size in sizes]


def _adapters(model: PreTrainedModel, parts: list[str], rank: int) -> nn.Module:
    """Wrap the matrices of these parts in adapters of peft."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MoefyError("lora_rank: adapters need peft: pip install moefy[train]") from None
    inside = {
        f"{name}.{matrix}": part
        for name, module in model.named_modules()
        if isinstance(module, SparseMlp)
        for matrix, part in ((m, "experts") for m in MATRICES)
        if getattr(module, matrix) is not None
    }
    routed = {id(m) for r in model.modules() if isinstance(r, Routed) for m in r.modules()}
    linears = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and id(module) not in routed
        and module is not model.get_output_embeddings()
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(
            model,
            LoraConfig(
                r=rank,
                lora_alpha=rank,
                target_modules=linears if "rest" in parts else [],
                target_parameters=list(inside) if "experts" in parts else None,
            ),
        )


def in_training(model: nn.Module, checkpointing: bool) -> None:
    """Dropout stays off: steps are to be the same when a run goes on. Layers may be recomputed."""
    model.eval()
    if not checkpointing:
        return
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            # The layer alone is put into training: that is what makes it recompute.
            module.training = True
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0  # type: ignore[assignment]
