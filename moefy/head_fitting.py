"""Fit the routing of one attention block: router, selection, compensation over its heads.

What is fitted, and how, is as for an MLP (`moefy.training`): what the heads put out takes the place
of the neurons' activations, the output projection that of the down projection.

Shapes: T tokens, D width, E experts (heads or groups of them), N = width of all heads.
"""

from dataclasses import replace

import torch

from moefy.activations import Captured
from moefy.artefact import HeadEntry
from moefy.fitting import Fitted
from moefy.heads import HeadSite
from moefy.mlp import HeadOutputs
from moefy.modeling import build_compensation, build_router
from moefy.plan import Plan
from moefy.recipe import Recipe
from moefy.routing import SELECTIONS, choose
from moefy.routing.base import stored
from moefy.training import Tokens, fit_compensation, fit_router, fit_selection


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


def _tokens(sample: Captured, todo: Plan, site: HeadSite) -> Tokens:
    """What a block reads of a sample, and what its heads put out."""
    reads, heads = site.places(len(todo.sites))
    x_TD = sample.inputs(reads)
    return Tokens(x_TD, x_TD, sample.inputs(heads))
