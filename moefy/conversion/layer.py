"""Fit one layer of a plan: partition, router, selection, compensation, from captured inputs.

The routing of an attention block is fitted in the same way (`moefy.conversion.fit`): what the heads put
out takes the place of the neurons' activations, the output projection that of the down projection.

Shapes: T tokens, D width, N neurons or width of all heads, E experts (heads or groups of them).
"""

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from moefy.conversion.capture import Captured
from moefy.conversion.fit import (
    LayerTokens,
    RouterFit,
    cap,
    fit_compensation,
    fit_router,
    fit_selection,
)
from moefy.conversion.plan import Plan
from moefy.experts.entries import build_compensation, build_router
from moefy.methods.base import stored
from moefy.methods.partition import Partition, partition
from moefy.methods.tables import SELECTIONS, choose
from moefy.models.artefact import Entry, HeadEntry, LayerEntry
from moefy.models.heads import HeadSite
from moefy.models.locate import Site
from moefy.models.mlp import DenseMlp, HeadOutputs
from moefy.recipe import Recipe

PROVISIONAL = 256
"""Tokens that set a selection which is going to be set anew."""


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True)
class Fitted(Generic[E]):
    """What the side files hold of one layer or attention block, and how its router came out."""

    entry: E
    tensors: dict[str, Tensor]
    fit: RouterFit


@dataclass(frozen=True)
class LayerSample:
    """What one layer sees of the tokens that a conversion reads."""

    partition_TD: Tensor
    domain_T: Tensor
    """The domains of those."""
    router: LayerTokens
    held: LayerTokens

    def on(self, device: torch.device) -> "LayerSample":
        """The same, its tokens handed out on this device."""
        router, held = (replace(t, device=device) for t in (self.router, self.held))
        return replace(self, router=router, held=held)


def layer_sample(samples: dict[str, Captured], todo: Plan, site: Site) -> LayerSample:
    """What was captured of one layer."""
    first = samples["partition"]
    router, held = (tokens_of(samples[name], todo, site) for name in ("router", "held-out"))
    return LayerSample(first.inputs(site), first.domains(site), router, held)


def split_layer(
    mlp: DenseMlp, todo: Plan, site: Site, recipe: Recipe, sample: LayerSample
) -> Partition:
    """The partition of one layer."""
    return partition(
        mlp,
        sample.partition_TD.float(),
        experts=todo.layers[site.index].experts,
        method=recipe.partition.method,
        shared=recipe.partition.shared,
        shared_by=recipe.partition.shared_by,
        most_shared=_active(todo, site) - 1,
        domain_T=sample.domain_T,
        seed=recipe.seed,
        where=f"layer {site.index}",
    )


def fit_layer(
    mlp: DenseMlp,
    todo: Plan,
    site: Site,
    recipe: Recipe,
    sample: LayerSample,
    split: Partition | None = None,
) -> Fitted[LayerEntry]:
    """Partition one layer, unless `split` is given, and fit its routing.

    `mlp` has the weights in fp32 as stored. The same seed gives the same bytes.
    """
    split = split or split_layer(mlp, todo, site, recipe, sample)
    entry = replace(todo.layers[site.index], shared=split.shared)
    k = _active(todo, site) - split.shared
    torch.manual_seed(recipe.seed + site.index)
    whole = mlp if split.as_stored else mlp.take(split.permutation)
    routed = whole.take(slice(split.shared * split.expert_size, None))
    tokens, held = sample.router, sample.held

    router, compensation = build_router(entry), build_compensation(entry)
    x_TD = sample.partition_TD.float()
    compensation.initialise(routed, x_TD, k)
    routed = compensation.centred(routed)
    router.initialise(routed, x_TD, whole)
    fit = fit_router(
        router, routed, tokens, held, experts=entry.experts - split.shared, k=k,
        recipe=recipe.router, seed=recipe.seed,
    )  # fmt: skip
    kind = choose(SELECTIONS, "selection", recipe.selection.name)
    # Where densities are allocated, both are fitted there, for every density that is considered.
    seen = held.some(PROVISIONAL) if recipe.allocates else held
    selection = fit_selection(kind, router, routed, seen, k, cap(recipe, k))
    entry = replace(entry, selection={"name": recipe.selection.name, **selection.settings()})
    if not recipe.allocates:
        fit_compensation(compensation, router, selection, routed, tokens)

    permutation = {"permutation": split.permutation.to(torch.int32)}
    return Fitted(entry, permutation | stored(router, compensation), fit)


def tokens_of(sample: Captured, todo: Plan, site: Site) -> LayerTokens:
    """What a layer's MLP sees of a sample, and what its router reads."""
    ahead = todo.layers[site.index].router["look_ahead"]
    read = todo.sites[site.index - 1] if ahead else site
    return LayerTokens(sample.inputs(site), sample.inputs(read))


def _active(todo: Plan, site: Site) -> int:
    """Experts that run on average, shared ones included."""
    return todo.k[site.index] + todo.layers[site.index].shared


def fit_heads(
    heads: HeadOutputs, todo: Plan, site: HeadSite, recipe: Recipe, samples: dict[str, Captured]
) -> Fitted[HeadEntry]:
    """Fit the routing of one block; `heads` has the output projection in fp32.

    The same seed gives the same bytes.
    """
    entry, k, wanted = todo.heads[site.index], todo.head_k[site.index], recipe.attention
    torch.manual_seed(recipe.seed + site.index)
    seen = {name: _tokens(sample, todo, site) for name, sample in samples.items()}

    router, compensation = build_router(entry), build_compensation(entry)
    first = seen["partition"]
    assert first.hidden_TN is not None
    known = HeadOutputs.behind(heads.down_ND, first.hidden_TN.float())
    router.initialise(known, first.mlp_TD.float(), known)
    fit = fit_router(
        router, heads, seen["router"], seen["held-out"], experts=entry.experts, k=k,
        recipe=replace(recipe.router, target="contribution", loss=wanted.loss), seed=recipe.seed,
    )  # fmt: skip
    kind = choose(SELECTIONS, "attention.selection", wanted.selection)
    selection = fit_selection(kind, router, heads, seen["held-out"], k)
    fit_compensation(compensation, router, selection, heads, seen["router"])
    entry = replace(entry, selection={"name": wanted.selection, **selection.settings()})
    return Fitted(entry, stored(router, compensation), fit)


def _tokens(sample: Captured, todo: Plan, site: HeadSite) -> LayerTokens:
    """What a block reads of a sample, and what its heads put out."""
    reads, heads = site.places(len(todo.sites))
    x_TD = sample.inputs(reads)
    return LayerTokens(x_TD, x_TD, sample.inputs(heads))
