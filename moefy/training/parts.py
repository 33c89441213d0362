"""What is trained: experts, routers, compensations, the rest; in full or through low-rank adapters.

    with trained(model, recipe) as learning:    # adapters are merged on the way out
        ...

Learning rates are relative to the size of each matrix (`moefy.conversion.distil`). An adapter's matrices start
anew and take a rate of their own.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moefy.conversion.distil import scaled_groups
from moefy.errors import MoefyError
from moefy.experts.routed import Routed
from moefy.experts.sparse_mlp import MATRICES, SparseMlp
from moefy.training.recipe import RecoverRecipe

ADAPTER_RATE = 0.03
"""Learning rate of an adapter's matrices over `learning_rate`."""


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


@dataclass(frozen=True)
class Learning:
    """A model that is being trained."""

    wrapped: nn.Module
    """What to call: the model itself, or, with adapters, what they are wrapped in."""
    groups: list[dict[str, Any]]
    """The optimiser's parameter groups."""
    merged: Callable[[], AbstractContextManager[None]]
    """While it lasts the model's own weights are those that have been learned."""


@contextmanager
def trained(model: PreTrainedModel, recipe: RecoverRecipe) -> Iterator[Learning]:
    """Gradients where the recipe trains. Raises `MoefyError` where the model has nothing of that."""
    found = parameters_of(model)
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    adapted = recipe.lora_rank > 0
    whole = [part for part in recipe.parts if not adapted or part in ("routers", "compensations")]
    groups = scaled_groups((p for part in whole for p in found[part]), recipe.learning_rate)
    low_rank = [part for part in recipe.parts if part not in whole]
    wrapped: Any = model
    merged: Callable[[], AbstractContextManager[None]] = nullcontext
    if low_rank:
        with torch.random.fork_rng():
            torch.manual_seed(recipe.seed)
            wrapped = _adapters(model, low_rank, recipe.lora_rank)
        merged = partial(_merged, wrapped)
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
        yield Learning(wrapped, groups, merged)
    finally:
        if low_rank:
            wrapped.merge_and_unload()
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
            parameter.grad = None


@contextmanager
def _merged(wrapped: Any) -> Iterator[None]:
    """Adapters are added to the weights for a while; taking them out again would leave rounding."""
    weights = {n: p for n, p in wrapped.named_parameters() if "lora_" not in n}
    kept = {name: value.detach().clone() for name, value in weights.items()}
    wrapped.merge_adapter()
    try:
        yield
    finally:
        wrapped.unmerge_adapter()
        with torch.no_grad():
            for name, value in weights.items():
                value.copy_(kept[name])


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


def in_training(model: PreTrainedModel, checkpointing: bool) -> None:
    """Dropout stays off: steps are to be the same when a run goes on. Layers may be recomputed.

    Raises `MoefyError` where recomputing a layer would not give what it gave.
    """
    model.eval()
    for parameter in model.parameters():
        # Halves of one fused tensor: a checkpoint would keep only one of them.
        if parameter.untyped_storage().nbytes() > parameter.numel() * parameter.element_size():
            parameter.data = parameter.data.clone()
    if not checkpointing:
        return
    if any(isinstance(m, SparseMlp) and m.look_ahead for m in model.modules()):
        raise MoefyError(
            "gradient_checkpointing: routers that look ahead read the layer before, which is not at "
            "hand when a layer is computed again; leave it off"
        )
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.gradient_checkpointing_enable({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            # The layer alone is put into training: that is what makes it recompute.
            module.training = True
            for name, value in vars(module).items():
                if name.endswith("dropout") and isinstance(value, float):
                    setattr(module, name, 0.0)
