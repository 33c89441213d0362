"""What takes a backward pass: distillation, and how much each direction of an MLP's output matters.

Distillation: routers and compensations learn to imitate the dense model, all else frozen. The student
runs the experts it will run later, hard selection included; the gradient passes the selection by a
straight-through sigmoid, so an expert that is off and would have helped pulls its score up. The teacher
is the same model with every expert on: no second copy of the weights. Two scopes, one loop. `model`:
KL(dense || sparse) of the logits, end to end. `layer`: the squared error of each MLP's output on captured
inputs, for models whose backward pass does not fit in memory.

Sensitivity: for a small error `e` of one layer's output, KL(dense || disturbed) is about `e^T G e / 2`,
with `G = E[g g^T]`, a Fisher matrix per layer, and `g` the gradient, at that output, of the
log-probability of tokens drawn from the model's own prediction (Amari 1998). One backward pass gives the
matrices of all layers. Without logits, `g` is the gradient of a random projection of the last hidden
states, over their size. Where a backward pass does not fit, one number per layer has to do: the inverse
of the residual stream's squared norm, `|e|^2 / |h|^2`. Normalisation makes later layers see an error in
proportion to the stream that it is added to.

Shapes: B documents, T tokens, D width, V vocabulary, E routed experts.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel

from moefy.conversion.fit import LayerTokens
from moefy.data.corpus import Batch, Sample, make_batches, sampler
from moefy.errors import MoefyError
from moefy.evaluation.outputs import (
    BACKWARD_TOKENS,
    Outputs,
    distance,
    judged_count,
    run_outputs,
)
from moefy.experts.passes import walk
from moefy.experts.sparse_mlp import SparseMlp, all_experts, sparse_mlps
from moefy.models.locate import Site, side_of
from moefy.recipe import DistilRecipe
from moefy.run.console import Reporter
from moefy.run.memory import give_back

CLIP = 1.0
"""Norm that the gradients of one step are cut to, all together."""

LEAST = 1e-3
"""Smallest root mean square that a learning rate is relative to: weights may start at zero."""

WARMUP = 0.1
ROUTER_RATE = 0.1
"""Learning rate of routers over that of compensations: their scores were fitted to the oracle, and the
straight-through gradient is a rough one (docs/experiments.md)."""


def distil_model(
    model: PreTrainedModel,
    batches: list[Batch],
    recipe: DistilRecipe,
    *,
    report: Reporter,
    seed: int = 0,
) -> list[float]:
    """Train routers and compensations of `model` in place, end to end; returns the losses.

    Raises `MoefyError` if a selection does not decide by scores, if there is nothing to train,
    or the loss is not finite.
    """
    modules = list(sparse_mlps(model).values())
    samples = [sample for batch in batches for sample in batch.samples]

    def of_step(group: list[Sample]) -> Iterator[Tensor]:
        batches = make_batches(group, tokens=BACKWARD_TOKENS)
        total = sum(judged_count(model, batch) for batch in batches)
        # The largest first: its memory serves the others.
        for batch in reversed(batches):
            with torch.no_grad(), all_experts(model):
                dense = run_outputs(model, batch)
            yield distance(dense, run_outputs(model, batch)) * (judged_count(model, batch) / total)

    steps = (of_step(group) for group in sampler(samples, recipe.tokens, seed))
    return _train(model, modules, steps, recipe, report)


def distil_layer(
    module: SparseMlp, tokens: LayerTokens, recipe: DistilRecipe, *, report: Reporter, seed: int = 0
) -> list[float]:
    """Train one layer's router and compensation on its output error; returns the losses.

    The loss is the squared error over the squared norm of what the routed experts would add.
    """
    generator = torch.Generator().manual_seed(seed)
    routed = module.routed

    def losses() -> Iterator[list[Tensor]]:
        while True:
            rows = torch.randint(len(tokens.mlp_TD), (recipe.tokens,), generator=generator)
            x_TD, read_TD = (
                t[rows].to(module.device, module.dtype) for t in (tokens.mlp_TD, tokens.router_TD)
            )
            want_TD = routed.hidden(x_TD) @ routed.down_ND
            module.context.previous_TD = read_TD
            error_TD = module(x_TD) - module.weights(x_TD)
            yield [error_TD.square().sum() / want_TD.square().sum().clamp_min(1e-30)]

    return _train(module, [module], losses(), recipe, report)


def _train(
    whole: nn.Module,
    modules: list[SparseMlp],
    steps: Iterator[Iterable[Tensor]],
    recipe: DistilRecipe,
    report: Reporter,
) -> list[float]:
    """The loop of both scopes: AdamW with warm-up and cosine; the loss of a step comes in parts.

    All of `whole` but the routers and compensations of `modules` is frozen meanwhile: its gradients
    would take as much time and memory as those that are wanted.
    """
    optimizer, schedule, parameters = _optimiser(modules, recipe)
    history: list[float] = []
    for module in modules:
        module.straight_through = True
    try:
        with torch.enable_grad(), only_training(whole, parameters):
            for _ in report.track(range(recipe.steps), "distil"):
                optimizer.zero_grad()
                loss = 0.0
                for part in next(steps):
                    loss += part.item()
                    if not math.isfinite(loss):
                        raise MoefyError(
                            f"distillation diverged at step {len(history)}; lower "
                            "distil.learning_rate"
                        )
                    part.backward()
                nn.utils.clip_grad_norm_(parameters, CLIP)
                optimizer.step()
                schedule.step()
                history.append(loss)
    finally:
        for module in modules:
            module.straight_through = False
            module.scores_TE = None
    return history


def _optimiser(
    modules: list[SparseMlp], recipe: DistilRecipe
) -> tuple[Optimizer, LRScheduler, list[nn.Parameter]]:
    """AdamW with warm-up and cosine, and what it trains; raises `MoefyError` if nothing can be."""
    groups = [
        *scaled_groups((p for m in modules for p in m.router.parameters()), ROUTER_RATE * recipe.learning_rate),
        *scaled_groups((p for m in modules for p in m.compensation.parameters()), recipe.learning_rate),
    ]  # fmt: skip
    parameters = [p for group in groups for p in group["params"]]
    if not parameters:
        raise MoefyError(
            "distillation found nothing to train: neither the router nor the compensation has "
            "parameters; choose others or set distil.steps=0"
        )
    for module in modules:
        if not module.selection.by_score:
            raise MoefyError("distillation needs a selection by scores; choose topk or threshold")
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in groups], total_steps=recipe.steps + 1, pct_start=WARMUP
    )
    return optimizer, schedule, parameters


def scaled_groups(parameters: Iterable[nn.Parameter], rate: float) -> list[dict[str, Any]]:
    """One group for every parameter, with `rate` times its root mean square as learning rate.

    Adam's steps do not know how large a weight is; relative to its size one number suits every matrix of
    a model.
    """
    sizes = [(p, p.detach().float().square().mean().sqrt().item()) for p in parameters]
    return [{"params": [p], "lr": rate * max(size, LEAST)} for p, size in sizes]


@contextmanager
def only_training(whole: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Gradients go to these parameters of `whole` and to no others; none is left behind."""
    before = [(p, p.requires_grad) for p in whole.parameters()]
    whole.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
            parameter.grad = None


def sensitivities(
    model: PreTrainedModel, found: list[Site], batches: list[Batch], *, seed: int = 0
) -> tuple[list[Tensor], list[Outputs]]:
    """`G / 2` of every MLP `[D, D]` in fp32, of the model with every expert on; and what that puts
    out for each batch."""
    modules = list(sparse_mlps(model).values())
    sums = [torch.zeros(site.width, site.width) for site in found]
    tokens = [0] * len(found)
    generator = torch.Generator().manual_seed(seed)
    outputs: dict[int, Tensor] = {}
    dense: list[Outputs] = []

    def keep(index: int, _: nn.Module, __: object, output: Tensor) -> Tensor:
        # The first layer's output depends on nothing that is trained.
        output = output if output.requires_grad else output.detach().requires_grad_(True)
        output.retain_grad()
        outputs[index] = output
        return output

    handles = [m.register_forward_hook(partial(keep, i)) for i, m in enumerate(modules)]
    try:
        for batch in batches:
            with torch.enable_grad(), all_experts(model), only_training(model, []):
                got = run_outputs(model, batch)
                got.rows_JD.backward(_gradient(got, generator))
            dense.append(got.detach())
            del got
            for index, site in enumerate(found):
                gradient = outputs[index].grad
                assert gradient is not None
                g_TD = _unpadded(gradient, batch.mask(side_of(site)))
                sums[index] += (g_TD.T @ g_TD).float().cpu()
                tokens[index] += len(g_TD)
            outputs.clear()
            give_back()  # batches grow, and what was freed of a smaller one would not serve the next
    finally:
        for handle in handles:
            handle.remove()
    return [total / (2 * count) for total, count in zip(sums, tokens, strict=True)], dense


@torch.no_grad()
def stream_metric(model: PreTrainedModel, found: list[Site], batches: list[Batch]) -> list[Tensor]:
    """The inverse of the residual stream's squared norm behind every layer, with every expert on."""
    powers: list[list[Tensor]] = [[] for _ in found]
    current: list[Batch] = []

    def behind(site: Site, _: nn.Module, __: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        powers[site.index].append(squared_norms(hidden, current[0].mask(side_of(site))))

    layers = [(model.get_submodule(site.layer), site) for site in found]
    handles = [layer.register_forward_hook(partial(behind, site)) for layer, site in layers]
    try:
        with all_experts(model):
            for batch in batches:
                current[:] = [batch]
                walk(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [inverse_power(torch.cat(rows)) for rows in powers]


def squared_norms(hidden: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Squared norm of every real token's hidden state `[T]`."""
    return _unpadded(hidden.detach().float(), mask_BT).square().sum(1).cpu()


def _unpadded(values_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The rows `[T, D]` of real tokens."""
    rows_TD = values_BTD.reshape(-1, values_BTD.shape[-1])
    return rows_TD if mask_BT is None else rows_TD[mask_BT.flatten().to(rows_TD.device)]


def inverse_power(power_T: Tensor) -> Tensor:
    """One over the median: a few attention sinks would make the mean."""
    return 1 / power_T.median().clamp_min(1e-30)


def _gradient(outputs: Outputs, generator: torch.Generator) -> Tensor:
    """The gradient of `_objective` at the rows of `outputs` `[J, D]`, a chunk of logits at a time."""
    found = []
    for at in outputs.chunks():
        rows_CD = outputs.rows_JD[at].detach().requires_grad_()
        value = _objective(outputs.logits(rows_CD), outputs.classes, generator)
        found.append(torch.autograd.grad(value, rows_CD)[0])
    return torch.cat(found)


def _objective(output_CV: Tensor, classes: bool, generator: torch.Generator) -> Tensor:
    """A scalar, summed over tokens, whose gradient's covariance is the Fisher matrix."""
    if not classes:
        size_C1 = output_CV.detach().norm(dim=-1, keepdim=True).clamp_min(1e-6)
        drawn = torch.randn(output_CV.shape, generator=generator).to(output_CV.device)
        projected: Tensor = 2**0.5 * drawn * output_CV / size_C1
        return projected.sum()
    log_p = output_CV.log_softmax(-1)
    drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
    return log_p.gather(1, drawn.to(log_p.device)).sum()
