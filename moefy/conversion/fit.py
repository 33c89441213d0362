"""Fit one layer's router, selection and compensation on what was captured of it; recalibrate selections.

A router is fitted to predict a target (`moefy.methods.targets`), by default the norm of what every
expert would add, under a loss (`moefy.methods.targets`). How good it is, is always measured the same
way: by the squared contribution that the experts it chose capture on held-out documents.

Selections whose number of experts varies are fitted on what the dense model sends to a layer, and set
anew (recalibrated) on what the sparse model sends.

Shapes: T tokens, D width, N routed neurons, E routed experts.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.conversion.plan import Plan
from moefy.data.corpus import Batch
from moefy.experts.passes import Heard, observing, walk
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.methods.base import Compensation, Router, Selection
from moefy.methods.routers.baselines import expert_norms
from moefy.methods.selections import top_mask
from moefy.methods.tables import SELECTIONS, choose
from moefy.methods.targets import LOSSES, TARGETS, Target, deviation
from moefy.models.mlp import DenseMlp
from moefy.recipe import Recipe, RouterRecipe

_CHUNK = 1024
MEASURED = 1024
"""Held-out tokens on which a router is measured that is not fitted."""

_PATIENCE = 4
"""Passes without a better router after which fitting stops."""


@dataclass(frozen=True)
class LayerTokens:
    """A sample of one layer: what its MLP sees, and what its router reads.

    Of an attention block `mlp_TD` is the input, and what its heads put out was captured too.
    """

    mlp_TD: Tensor
    router_TD: Tensor
    """The same tensor, or for a router that looks ahead the input of the MLP before."""
    hidden_TN: Tensor | None = None
    """Activations, where they were captured; else the MLP gives them."""
    device: torch.device | None = None
    """Where `chunks` are handed out; None leaves them where they are."""

    def some(self, most: int) -> "LayerTokens":
        """At most so many, evenly spaced: a sample stands in the order of its documents' lengths."""
        step = -(-len(self.mlp_TD) // most)
        hidden_TN = None if self.hidden_TN is None else self.hidden_TN[::step]
        return replace(
            self, mlp_TD=self.mlp_TD[::step], router_TD=self.router_TD[::step], hidden_TN=hidden_TN
        )

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Both in fp32, a thousand tokens at a time."""
        pairs = zip(self.mlp_TD.split(_CHUNK), self.router_TD.split(_CHUNK), strict=True)
        for mlp_TD, router_TD in pairs:
            yield mlp_TD.to(self.device, torch.float32), router_TD.to(self.device, torch.float32)

    def activations(self, mlp: DenseMlp) -> Iterator[Tensor]:
        """Activations `[T, N]` of the neurons in fp32, for the tokens of each of `chunks`."""
        if self.hidden_TN is not None:
            yield from (h_TN.float() for h_TN in self.hidden_TN.split(_CHUNK))
        else:
            yield from (mlp.hidden(x_TD) for x_TD, _ in self.chunks())


@dataclass(frozen=True)
class RouterFit:
    """How well a router came out, on documents it was not fitted on."""

    epochs: int
    """Passes that were made; the best of them was kept."""
    captured: float
    """Squared contribution of the chosen experts over that of the oracle's, static top-k."""
    recall: float
    """Share of the oracle's experts that were chosen."""
    gap_closed: float
    """Of the squared contribution by which the oracle beats k random experts, the share captured."""

    def record(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@torch.no_grad()
def predicted(target: Target, mlp: DenseMlp, tokens: LayerTokens, experts: int) -> Tensor:
    """The target `[T, E]` in fp32; `mlp` has the routed neurons in order."""
    mlp = mlp.to(torch.float32)
    if target is deviation:
        total = sum(h_TN.double().sum(0) for h_TN in tokens.activations(mlp))
        assert isinstance(total, Tensor)
        target = partial(deviation, mean_N=(total / len(tokens.mlp_TD)).float())
    return torch.cat([target(h_TN, mlp, experts) for h_TN in tokens.activations(mlp)])


@torch.no_grad()
def fit_router(
    router: Router,
    mlp: DenseMlp,
    tokens: LayerTokens,
    held: LayerTokens,
    *,
    experts: int,
    k: int,
    recipe: RouterRecipe,
    seed: int,
) -> RouterFit:
    """Fit `router` on `tokens` and keep the epoch that captures most on the held-out `held`.

    `mlp` has the routed neurons in expert order. A router with nothing to fit is only measured.
    """
    if not router.trainable or k == experts:
        return _Quality(mlp, held.some(MEASURED), experts, k).of(router, 0)
    quality = _Quality(mlp, held, experts, k)
    best, best_state, waited = quality.of(router, 0), _copy(router), 0
    passes = _passes(router, mlp, tokens, experts, k, recipe, seed)
    for epoch, _ in enumerate(passes, 1):
        fit = quality.of(router, epoch)
        waited += 1
        if fit.captured > best.captured:
            best, best_state, waited = fit, _copy(router), 0
        if waited == _PATIENCE:
            break
    router.load_state_dict(best_state)
    return best


def _passes(
    router: Router,
    mlp: DenseMlp,
    tokens: LayerTokens,
    experts: int,
    k: int,
    recipe: RouterRecipe,
    seed: int,
) -> Iterator[None]:
    """Fit `router` in place, one pass over the tokens at a time."""
    target = choose(TARGETS, "router.target", recipe.target)
    loss_of = choose(LOSSES, "router.loss", recipe.loss)
    target_TE = predicted(target, mlp, tokens, experts)
    x_TD = tokens.router_TD
    # A bias common to all experts changes no ranking; it lets a bias-free router fit the rate.
    # Scores on the scale of the target itself have no room for it.
    offset = torch.nn.Parameter(torch.tensor(0.0), requires_grad=recipe.loss != "norm_mse")
    parameters = [p for p in (*router.parameters(), offset) if p.requires_grad]
    steps = -(-len(x_TD) // recipe.batch_size) * recipe.epochs
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=steps + 1, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(recipe.epochs):
        order = torch.randperm(len(x_TD), generator=generator)
        for rows in order.split(recipe.batch_size):
            with torch.enable_grad():
                scores_BE = router(x_TD[rows].float(), mlp) + offset
                loss = loss_of(scores_BE, target_TE[rows], k)
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            schedule.step()
        yield


class _Quality:
    """Measures routers against the oracle on the same held-out tokens."""

    def __init__(self, mlp: DenseMlp, held: LayerTokens, experts: int, k: int) -> None:
        norm_TE = predicted(lambda h, m, e: expert_norms(h, m.down_ND, e), mlp, held, experts)
        self.mlp, self.held, self.k = mlp, held, k
        self.square_TE, self.oracle_TE = norm_TE.square(), top_mask(norm_TE, k)
        self.best = (self.square_TE * self.oracle_TE).sum().clamp_min(1e-30).item()
        self.random = self.square_TE.sum().item() * k / experts

    def of(self, router: Router, epochs: int) -> RouterFit:
        scores = [router(x, self.mlp) for _, x in self.held.chunks()]
        chosen_TE = top_mask(torch.cat(scores), self.k)
        captured = (self.square_TE * chosen_TE).sum().item()
        recall = ((chosen_TE & self.oracle_TE).sum() / self.oracle_TE.sum()).item()
        gap = (captured - self.random) / max(self.best - self.random, 1e-30)
        return RouterFit(epochs, captured / self.best, recall, gap)


def _copy(router: Router) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in router.state_dict().items()}


@torch.no_grad()
def fit_selection(
    kind: type[Selection],
    router: Router,
    mlp: DenseMlp,
    held: LayerTokens,
    active: float,
    most: int | None = None,
) -> Selection:
    """Settings of the selection from the router's scores on held-out tokens."""
    scores_TE = torch.cat([router(x, mlp) for _, x in held.chunks()])
    return kind.fit(scores_TE, active, most)


@torch.no_grad()
def fit_compensation(
    compensation: Compensation,
    router: Router,
    selection: Selection,
    mlp: DenseMlp,
    tokens: LayerTokens,
) -> None:
    """Fit what stands in for experts that are off, under the routing that will be used."""
    mlp = mlp.to(torch.float32)
    compensation.fit(_Routed(router, selection, mlp, tokens), mlp)


@dataclass(frozen=True)
class _Routed:
    """Inputs, activations and masks of a sample, which can be walked through more than once."""

    router: Router
    selection: Selection
    mlp: DenseMlp
    tokens: LayerTokens

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        hidden = self.tokens.activations(self.mlp)
        for (x_TD, read_TD), h_TN in zip(self.tokens.chunks(), hidden, strict=True):
            yield x_TD, h_TN, self.selection(self.router(read_TD, self.mlp))


def refit_compensation(module: SparseMlp, tokens: LayerTokens) -> None:
    """Fit a layer's compensation anew, under the routing that it has now."""
    fit_compensation(module.compensation, module.router, module.selection, module.routed, tokens)


def cap(recipe: Recipe, active: float) -> int | None:
    """Most routed experts of one token, where `active` run on average."""
    return None if recipe.selection.most is None else round(recipe.selection.most * active)


def varies(recipe: Recipe) -> bool:
    """Whether tokens may get different numbers of experts."""
    kind = choose(SELECTIONS, "selection", recipe.selection.name)
    return kind.by_score and kind.varies


class SeenInputs:
    """Keeps what every MLP reads."""

    def __init__(self) -> None:
        self.seen: dict[int, list[Tensor]] = defaultdict(list)

    def hear(self, heard: Heard) -> None:
        """Keep the inputs of one MLP."""
        self.seen[heard.layer].append(heard.x_TD)

    def of(self, index: int) -> Tensor:
        """All that was seen of one layer."""
        return torch.cat(self.seen[index])


@torch.no_grad()
def recalibrate(
    model: PreTrainedModel, recipe: Recipe, batches: list[Batch], active: Mapping[int, float]
) -> None:
    """Set selections that vary so that `active` experts run on what the sparse model sees.

    They were fitted on the inputs of the dense model, which are a little different.
    """
    inputs = SeenInputs()
    for batch in batches:
        with observing(model, batch, inputs):
            walk(model, batch)
    recalibrate_on(inputs, model, recipe, active)


def recalibrate_on(
    inputs: SeenInputs, model: PreTrainedModel, recipe: Recipe, active: Mapping[int, float]
) -> None:
    """`recalibrate` on inputs that were seen already."""
    for index, module in sparse_mlps(model).items():
        own_TD = inputs.of(index)
        read_TD = inputs.of(index - 1) if module.look_ahead else own_TD
        recalibrate_layer(module, LayerTokens(own_TD, read_TD), active[index], recipe)


def recalibrate_layer(
    module: SparseMlp, tokens: LayerTokens, active: float, recipe: Recipe
) -> None:
    """Set the selection of one layer so that `active` routed experts run on average on these tokens."""
    device = module.device
    module.selection = fit_selection(
        type(module.selection), module.router, module.routed.to(torch.float32),
        replace(tokens, device=device), active, cap(recipe, active),
    )  # fmt: skip


def planned_active(todo: Plan, index: int, shared: int) -> int:
    """Routed experts that run where every layer has the same density; `shared` are found to be so."""
    return todo.k[index] + todo.layers[index].shared - shared
