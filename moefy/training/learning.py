"""A moefied model that learns: which of it is trained, towards what, and the check on held-out text.

    with trained(model, recipe) as learning:    # adapters are merged on the way out
        ...

Experts, routers, compensations and the rest are trained in full or through low-rank adapters. Learning
rates are relative to the size of each matrix (`moefy.conversion.backward`); an adapter's matrices start anew
and take a rate of their own. `towards` distils: `w KL(dense || moefied) + (1 - w) cross-entropy`, sums over
the tokens of a batch (Hinton et al. 2015, temperature 1).

The check says whether experts still share the work. Thresholds are set anew before it, so that as many
experts run as before training: weights change, and with them the scores. What is set travels with the
checkpoints.

Shapes: T tokens, E experts of a layer.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moefy.conversion.backward import scaled_groups
from moefy.conversion.fit import recalibrate, varies
from moefy.data.corpus import Batch
from moefy.errors import MoefyError
from moefy.evaluation.outputs import (
    Objective,
    Outputs,
    ce_of,
    compared,
    distance,
    distances,
    judge,
    kl_of,
    per_position,
    run_outputs,
)
from moefy.experts.passes import Heard, observing
from moefy.experts.routed import Routed
from moefy.experts.sparse_mlp import MATRICES, SparseMlp, sparse_mlps
from moefy.recipe import Recipe
from moefy.training.grid import Grids, on_grid
from moefy.training.recipe import THROUGH_ADAPTERS, RecoverRecipe
from moefy.training.teacher import DenseSelf, Teacher

ADAPTER_RATE = 0.03
"""Learning rate of an adapter's matrices over `learning_rate`."""
GRID_RATE = 0.1
"""Learning rate of scales and offsets over that of weights: each of them moves 32 weights alike."""
Switch = Callable[[], AbstractContextManager[None]]


def parameters_of(model: PreTrainedModel) -> dict[str, list[nn.Parameter]]:
    """The parameters of each of `PARTS`, every one once."""
    routed = [module for module in model.modules() if isinstance(module, Routed)]
    found = {
        "routers": [p for m in routed for p in m.router.parameters()],
        "compensations": [p for m in routed for p in m.compensation.parameters()],
        "experts": [
            p for m in routed if isinstance(m, SparseMlp) for p in m.parameters(recurse=False)
        ],
    }
    known = {id(p) for part in found.values() for p in part}
    linears = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D)]
    # What stands in the place of an MLP's linear maps has no weight.
    inside = {id(p): m for m in linears for p in m.parameters(recurse=False) if p.ndim == 2}
    head = model.get_output_embeddings()
    rest: dict[str, list[nn.Parameter]] = {"norms": [], "projections": [], "embeddings": []}
    for p in model.parameters():
        if id(p) not in known:
            linear = inside.get(id(p))
            matrix = "embeddings" if linear is None or linear is head else "projections"
            rest["norms" if p.ndim == 1 else matrix].append(p)
    return found | rest


@dataclass(frozen=True)
class Learning:
    """A model that is being trained."""

    wrapped: nn.Module
    """What to call: the model itself, or, with adapters, what they are wrapped in."""
    groups: list[dict[str, Any]]
    """The optimiser's parameter groups."""
    merged: Switch
    """While it lasts the model's own weights are those that have been learned."""
    teacher: Teacher
    """The dense model, inside the one that learns."""
    adapted: list[nn.Parameter]
    """What adapters are added to."""


@contextmanager
def trained(model: PreTrainedModel, recipe: RecoverRecipe) -> Iterator[Learning]:
    """Gradients where the recipe trains; matrices on a grid stay on it (`moefy.training.grid`).

    Raises `MoefyError` where the model has nothing of that.
    """
    found, rate = parameters_of(model), recipe.learning_rate
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    low_rank = [part for part in recipe.parts if recipe.rank and part in THROUGH_ADAPTERS]
    with on_grid(model) if "experts" in recipe.parts else nullcontext(Grids({})) as grids:
        fixed = {id(p) for p in grids.weights()}
        adapted = [p for part in low_rank for p in found[part] if id(p) not in fixed]
        whole = [p for part in recipe.parts if part not in low_rank for p in found[part]]
        whole = [p for p in whole if id(p) not in fixed]
        with _adapted(model, adapted, recipe) as adapters:
            groups = scaled_groups(whole, rate)
            groups += scaled_groups(grids.parameters(), rate * GRID_RATE)
            groups += [{"params": [p], "lr": rate * ADAPTER_RATE} for p in adapters.new]
            if not groups:
                raise MoefyError(
                    f"train={recipe.train}: this model has no parameters of that kind (its routers and "
                    "compensations may have none); add experts"
                )
            for group in groups:
                for parameter in group["params"]:
                    parameter.requires_grad_(True)
            own = {id(p) for part in ("routers", "compensations") for p in found[part]}
            teacher = DenseSelf(
                model, [p for p in whole if id(p) not in own], together(adapters.off, grids.off)
            )
            merged = together(adapters.merged, grids.merged)
            yield Learning(adapters.wrapped, groups, merged, teacher, adapted)
    for parameter, wanted in before:
        parameter.requires_grad_(wanted)
        parameter.grad = None


def together(*contexts: Switch) -> Switch:
    """One context of several."""

    @contextmanager
    def all_of_them() -> Iterator[None]:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            yield

    return all_of_them


@dataclass(frozen=True)
class _Adapters:
    """A model with adapters on some of its matrices, or without any."""

    wrapped: Any
    new: list[nn.Parameter]
    off: Switch = nullcontext
    merged: Switch = nullcontext


@contextmanager
def _adapted(
    model: PreTrainedModel, weights: list[nn.Parameter], recipe: RecoverRecipe
) -> Iterator[_Adapters]:
    """Put adapters on these matrices; they are merged on the way out."""
    if not weights:
        yield _Adapters(model, [])
        return
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        wrapped: Any = _wrapped(model, {id(p) for p in weights}, recipe.rank)
    new = [p for name, p in wrapped.named_parameters() if "lora_" in name]
    try:
        yield _Adapters(wrapped, new, wrapped.disable_adapter, partial(_merged, wrapped, weights))
    finally:
        wrapped.merge_and_unload()


@contextmanager
def _merged(wrapped: Any, weights: list[nn.Parameter]) -> Iterator[None]:
    """Adapters are added to the weights for a while; taking them out again would leave rounding."""
    before = [value.detach().clone() for value in weights]
    wrapped.merge_adapter()
    try:
        yield
    finally:
        wrapped.unmerge_adapter()
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


def _wrapped(model: PreTrainedModel, weights: set[int], rank: int) -> nn.Module:
    """Wrap these matrices in adapters of peft."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MoefyError("lora_rank: adapters need peft: pip install moefy[train]") from None
    modules = list(model.named_modules())
    inside = [
        f"{name}.{matrix}"
        for name, module in modules
        if isinstance(module, SparseMlp)
        for matrix in MATRICES
        if id(getattr(module, matrix)) in weights
    ]
    linears = [
        name
        for name, module in modules
        if isinstance(module, nn.Linear | Conv1D)
        and any(id(p) in weights for p in module.parameters(recurse=False))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(
            model,
            LoraConfig(
                r=rank, lora_alpha=rank, target_modules=linears, target_parameters=inside or None
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


COLLAPSED = 0.5
"""Effective experts over those before training below which a layer counts as collapsed."""


class RecoveryCheck:
    """Figures of `model` on held-out batches, against what its teacher says there."""

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        teacher: Teacher,
        batches: list[Batch],
        recipe: Recipe,
        weight: float,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.batches, self.recipe, self.weight = model, batches, recipe, weight
        self.precision = precision
        """What passes run in: autocast, where training does."""
        with precision():
            self.want = [teacher(batch) for batch in batches]
        self.active: dict[int, float] = {}
        self.merged: Callable[[], AbstractContextManager[None]] = nullcontext
        """While it lasts the model has the weights that have been learned (`Learning`)."""
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
        with self.merged(), self.precision():
            return self._figures()

    @torch.no_grad()
    def _figures(self) -> dict[str, Any]:
        modules = sparse_mlps(self.model)
        training = [module.straight_through for module in modules.values()]
        for module in modules.values():
            module.straight_through = False
            module.compensation.follow(module.weights)
            module.router.follow(module.routed)
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


def towards(student: PreTrainedModel, teacher: Teacher, weight: float) -> Objective:
    """Distillation, with cross-entropy where the model predicts tokens."""

    def objective(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        want = teacher(batch)
        got = run_outputs(student, batch, through=model)
        if got.targets_J is None:
            kl = distance(want, got) * len(got)
            return {"loss": kl, "kl": kl}

        def of(at: slice, p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
            return kl_of(p, q), ce_of(q, got, at)

        kl, ce = (value_J.sum() for value_J in per_position(of, want, got))
        return {"loss": weight * kl + (1 - weight) * ce, "kl": kl, "ce": ce}

    return objective
