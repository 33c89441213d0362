"""The MLPs of a moefied model under the names that the stock model has for them.

`take_stock_names` takes their tensors from files (`moefy.models.reorder.stock_parameter` gives them), and
`keep_places` has what looks for the modules by name, such as peft, find something that says what has become
of them.

Shapes: N neurons, D width.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.errors import MoefyError
from moefy.experts.moefied import of
from moefy.experts.routed import Routed
from moefy.experts.sparse_heads import sparse_heads
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.methods.base import stored
from moefy.models.artefact import ADAPTER, Artefact
from moefy.models.entries import Entry
from moefy.models.locate import Site, disk_names, meta_model, read_mlp


class NoLinearMap(MoefyError, AttributeError):
    """Something was asked of a linear map whose weights are in experts."""


class InExperts(nn.Linear):
    """Where a linear map of a dense MLP was: it holds nothing, and hands on what it is given.

    It counts as a linear map, so that what looks for all of these, as `target_modules="all-linear"` of
    peft does, comes upon it, asks for its weights and is refused.
    """

    def __init__(self, path: str) -> None:
        nn.Module.__init__(self)
        self.path = path

    def forward(self, x: Tensor) -> Tensor:
        """What lies behind it in a splice goes on from here."""
        return x

    def __getattr__(self, name: str) -> Any:
        """Raises `NoLinearMap`, which `hasattr` takes for an answer, for what only a linear map has."""
        if name in ("weight", "bias", "in_features", "out_features"):
            raise NoLinearMap(self.extra_repr())
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """What to do instead."""
        return (
            f"{self.path}: is in experts, which no adapter of peft can be put onto; to train attention alone, "
            "name its projections in target_modules; moefy recover --lora-rank trains experts, and "
            "moefy.load(folder, adapter=...) merges an adapter that was trained before"
        )


def keep_places(site: Site, sparse: SparseMlp) -> None:
    """Leave an `InExperts` where each of the dense maps was that lay inside of what was replaced."""
    for role in ("gate", "up", "down") if site.gated else ("up", "down"):
        path = site.path(role).removeprefix(f"{site.module}.")
        if path == site.path(role):
            continue  # a splice: nothing was inside
        parent: nn.Module = sparse
        *outer, name = path.split(".")
        for part in outer:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name, InExperts(site.path(role)))


def take_stock_names(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before tensors are loaded into a moefied model: MLPs by their stock names become those of the model.

    Trainers load the weight files of a folder in this way. The neurons have to lie as in the model's
    own files. Raises `MoefyError` where only some tensors of the MLPs are there, and where routers learn
    or have changed since the model was loaded, since no weight file holds them.
    """
    carried = of(model)
    keys = _stock_keys(model, {k.removeprefix(prefix): k for k in state if k.startswith(prefix)})
    owned = sorted(name for site in carried.sites for name in site.parameters)
    if not any(name in keys for name in owned):
        return
    for name in owned:
        if name not in keys:
            raise MoefyError(
                f"{name}: not among the tensors to be loaded, others of the MLPs are; give all of them"
            )
    _refuse_other_routing(carried.artefact, [*carried.mlps.values(), *carried.blocks.values()])
    values: dict[str, Tensor] = {}
    for site, sparse in zip(carried.sites, carried.mlps.values(), strict=True):
        mlp = read_mlp(site, lambda name: state[keys[name]])
        if carried.artefact.form == ADAPTER:
            mlp = mlp.take(carried.artefact.permutation(site.index).long())
        values |= {f"{site.module}.{name}": getattr(mlp, name) for name in sparse.weight_names}
        values |= {f"{site.module}.{n}": v for n, v in _routing_of(sparse).items()}
    for block, heads in zip(carried.heads, carried.blocks.values(), strict=True):
        values |= {f"{block.projection}.{n}": v for n, v in _routing_of(heads).items()}
    renamed = {name: state.pop(key) for name, key in keys.items()}
    for name in owned:
        del renamed[name]
    state.update({prefix + name: value for name, value in {**renamed, **values}.items()})


def _stock_keys(model: Any, keys: dict[str, str]) -> dict[str, str]:
    """The keys of tensors to be loaded by the names that the model has for them; `keys` by their own."""
    own = model.state_dict()
    if all(name in own for name in keys):
        return keys
    names = disk_names(meta_model(model.config), keys)
    return {name if name in own else names.get(name, name): key for name, key in keys.items()}


def _routing_of(module: Routed) -> dict[str, Tensor]:
    return stored(module.router, module.compensation)


def _refuse_other_routing(artefact: Artefact, modules: list[Routed]) -> None:
    """Raise `MoefyError` where routers are not, or will not be, those that the model was loaded with."""
    before = artefact.tensors
    for index, module in enumerate(modules):
        heads = index >= len(artefact.layers)
        place = f"heads.{index - len(artefact.layers)}" if heads else f"layers.{index}"
        changed = [
            n for n, v in _routing_of(module).items() if not torch.equal(v, before[f"{place}.{n}"])
        ]
        if module.straight_through or changed:
            raise MoefyError(
                f"{place}: its routing learns or has changed, and weight files hold none (they are read by "
                "a Trainer that resumes or takes up its best model); open that folder with moefy.load"
            )


def with_routing_of(model: PreTrainedModel, state: Mapping[str, Tensor] | None = None) -> Artefact:
    """The artefact of a moefied model with its routers, selections and compensations as they are, or
    with their tensors as `state` has them by the names that they have in the model."""
    artefact = of(model).artefact
    tensors, layers, heads = dict(artefact.tensors), [], []
    for (index, module), entry in zip(sparse_mlps(model).items(), artefact.layers, strict=True):
        place = of(model).sites[index].module
        tensors |= _routing(f"layers.{index}", module, place, state)
        layers.append(replace(entry, selection=_selection(entry, module)))
    for (index, block), head in zip(sparse_heads(model).items(), artefact.heads, strict=True):
        place = of(model).heads[index].projection
        tensors |= _routing(f"heads.{index}", block, place, state)
        heads.append(replace(head, selection=_selection(head, block)))
    return replace(artefact, tensors=tensors, layers=layers, heads=heads)


def _routing(
    prefix: str, module: Routed, place: str, state: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    tensors = stored(module.router, module.compensation)
    if state is not None:
        tensors = {name: state[f"{place}.{name}"].detach().cpu().contiguous() for name in tensors}
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def _selection(entry: Entry, module: Routed) -> dict[str, Any]:
    return {"name": entry.selection["name"], **module.selection.settings()}
