"""Thresholds set anew on what the sparse model sees."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.conversion.fit import Tokens, fit_selection
from moefy.conversion.layer import cap
from moefy.conversion.plan import Plan
from moefy.data.corpus import Batch
from moefy.experts.passes import Heard, observing, walk
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.methods.tables import SELECTIONS, choose
from moefy.recipe import Recipe


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
def settle(
    model: PreTrainedModel, recipe: Recipe, batches: list[Batch], active: Mapping[int, float]
) -> None:
    """Set selections that vary so that `active` experts run on what the sparse model sees.

    They were fitted on the inputs of the dense model, which are a little different.
    """
    inputs = SeenInputs()
    for batch in batches:
        with observing(model, batch, inputs):
            walk(model, batch)
    settle_on(inputs, model, recipe, active)


def settle_on(
    inputs: SeenInputs, model: PreTrainedModel, recipe: Recipe, active: Mapping[int, float]
) -> None:
    """`settle` on inputs that were seen already."""
    for index, module in sparse_mlps(model).items():
        own_TD = inputs.of(index)
        read_TD = inputs.of(index - 1) if module.look_ahead else own_TD
        settle_layer(module, Tokens(own_TD, read_TD), active[index], recipe)


def settle_layer(module: SparseMlp, tokens: Tokens, active: float, recipe: Recipe) -> None:
    """Set the selection of one layer so that `active` routed experts run on average on these tokens."""
    device = module.weights.down_ND.device
    module.selection = fit_selection(
        type(module.selection), module.router, module.routed.to(torch.float32),
        replace(tokens, device=device), active, cap(recipe, active),
    )  # fmt: skip


def planned_active(todo: Plan, index: int, shared: int) -> int:
    """Routed experts that run where every layer has the same density; `shared` are found to be so."""
    return todo.k[index] + todo.layers[index].shared - shared
