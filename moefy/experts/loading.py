"""Load a moefied checkpoint as a transformers model, and save it again.

    model = load("out")                 # a transformers model: generate, device_map, lm-eval work
    with all_experts(model):            # the dense function, from the same weights
        dense = model(**inputs).logits

Shapes: N neurons, D width.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from threading import RLock
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.errors import MoefyError
from moefy.experts.adapters import guard, merge_adapter
from moefy.experts.entries import (
    build_compensation,
    build_router,
    build_selection,
    check_artefact,
    fill,
)
from moefy.experts.hooks import hooks, run_with_cache, run_with_hooks
from moefy.experts.interventions import experts
from moefy.experts.moefied import NAME, Moefied, of, share_context
from moefy.experts.placement import StoredMlp, offload, offloaded, placement, stored_names
from moefy.experts.saving import generation_settings, save_pretrained
from moefy.experts.sparse_heads import SparseHeads, hand_over, sparse_heads
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.experts.stock_names import InExperts, keep_places, take_stock_names
from moefy.models.artefact import ADAPTER, Artefact, allow_plugins, open_artefact, open_folder
from moefy.models.checkpoint import Checkpoint
from moefy.models.config import read_config
from moefy.models.entries import HeadEntry, LayerEntry, part_of
from moefy.models.heads import HeadSite, head_sites
from moefy.models.locate import Site, check_weights, meta_model, read_mlp, sites
from moefy.run.arguments import checked
from moefy.run.reading import reading

P = ParamSpec("P")
_LOADING = RLock()
METHODS = (experts, hooks, run_with_cache, run_with_hooks)
"""What every moefied model can do beyond its class."""


def replace_module(model: PreTrainedModel, site: Site, sparse: nn.Module) -> None:
    """Put another MLP where `site` is; a splice leaves identities for what it swallowed."""
    _replace(model, site.module, sparse)
    if site.act is not None:
        _replace(model, site.act, nn.Identity())
        _replace(model, site.path("down"), nn.Identity())


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _one_at_a_time(load: Callable[P, PreTrainedModel]) -> Callable[P, PreTrainedModel]:
    """While transformers loads a model, it changes what torch does in every thread."""

    @wraps(load)
    def waiting(*args: P.args, **kwargs: P.kwargs) -> PreTrainedModel:
        with _LOADING:
            return load(*args, **kwargs)

    return waiting


@_one_at_a_time
def load_dense(checkpoint: Checkpoint, **kwargs: Any) -> PreTrainedModel:
    """The stock transformers model of a checkpoint folder, in its own dtype unless told otherwise."""
    config = read_config(checkpoint)
    meta = meta_model(config)
    check_weights(meta, checkpoint)
    kwargs = {"dtype": "auto", **kwargs}
    with reading(checkpoint.folder):
        model: PreTrainedModel = type(meta).from_pretrained(
            checkpoint.folder, config=config, trust_remote_code=False, **kwargs
        )
    model.eval()
    return model


@checked
def load(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    verify: bool = True,
    plugins: bool = False,
    adapter: str | Path | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a moefied checkpoint as a transformers model whose MLPs are SparseMlps.

    `base` says where the source of an adapter lies if it moved; `verify=False` skips the hashes of
    the weights. A folder is data: with `plugins=True` alone, code that it names
    (`package.module:Name`) is imported. `adapter` is the folder of a LoRA adapter of peft, trained on
    the source or on this folder: it is merged, and routers stay as they are. Other arguments
    (`dtype`, `device_map`, ...) go to `from_pretrained`; layers that `device_map` offloads are read
    from disk whenever they run.

    Raises `CheckpointError` for an artefact that is damaged or whose base is not available, and for an
    adapter whose neurons may lie otherwise.
    """
    with allow_plugins(plugins):
        artefact, checkpoint = open_artefact(folder, base=base, verify=verify)
        change = (
            None
            if adapter is None
            else partial(merge_adapter, artefact=artefact, folder=Path(folder), adapter=adapter)
        )
        return _loaded(artefact, checkpoint, change, **kwargs)


@checked
def open_model(
    where: str | Path | PreTrainedModel,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    base: str | Path | None = None,
    verify: bool = False,
    dense: bool | None = None,
) -> PreTrainedModel:
    """The model of a folder of `convert`, a dense checkpoint or a Hub id, as this machine runs it best.

    `dtype` and `device` overrule `placement`; `base` and `verify` are those of `load`. `dense=True`
    gives the stock model of the same weights, `dense=False` wants one with experts. A model is given
    back as it is.

    Raises `CheckpointError` for what cannot be opened, `MoefyError` for a model without experts where
    `dense` is False.
    """
    if isinstance(where, PreTrainedModel):
        if dense is False:
            of(where)
        return where
    opened = open_artefact if dense is False else open_folder
    artefact, checkpoint = opened(where, base=base, verify=verify)
    options = placement(checkpoint)
    if dtype is not None:
        options["dtype"] = dtype
    if device is not None:
        options["device_map"] = {"": device}
    if artefact is not None and not dense:
        return _loaded(artefact, checkpoint, **options)
    model = load_dense(checkpoint, **options)
    if artefact is not None:
        guard(model, artefact, Path(where))
    return model


@_one_at_a_time
def _loaded(
    artefact: Artefact,
    checkpoint: Checkpoint,
    change: Callable[[PreTrainedModel], PreTrainedModel] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """`change` is what is done to the stock model before its MLPs become experts."""
    model = load_dense(checkpoint, **kwargs)
    if change is not None:
        model = change(model)
    moefied(model, artefact, permute=artefact.form == ADAPTER, checkpoint=checkpoint)
    _bind(model, save_pretrained)
    return model


def moefied(
    model: PreTrainedModel,
    artefact: Artefact,
    *,
    permute: bool,
    checkpoint: Checkpoint | None = None,
) -> None:
    """Turn a dense model into the moefied one that `artefact` describes, in place.

    `permute` puts the neurons into expert order; without it they stand so already. `checkpoint`
    holds the weights of layers that are offloaded. The model gets `METHODS`.
    """
    found = sites(model)
    blocks = head_sites(model) if artefact.heads else []
    check_artefact(artefact, found, blocks)
    devices = [offloaded(model.get_submodule(site.path("up"))) for site in found]
    names = stored_names(model, checkpoint) if checkpoint and any(devices) else {}
    for site, entry, device in zip(found, artefact.layers, devices, strict=True):
        sparse = install(model, site, entry, artefact.tensors_of(site.index), permute, device)
        if entry.active is None:
            sparse.density = artefact.recipe["density"]
        if device is not None and checkpoint is not None:
            order_N = artefact.permutation(site.index) if permute else None
            weights = StoredMlp(checkpoint, names, site, order_N, sparse.stored)
            offload(sparse, weights, device)
    for block, heads in zip(blocks, artefact.heads, strict=True):
        _install_heads(model, block, heads, artefact)
    mlps, routed = sparse_mlps(model), sparse_heads(model)
    settings = (copy.deepcopy(model.config.to_dict()), generation_settings(model))
    vars(model)[NAME] = Moefied(artefact, found, blocks, mlps, routed, checkpoint, settings)
    model.register_load_state_dict_pre_hook(take_stock_names)
    share_context(model)
    for method in METHODS:
        _bind(model, method)
    model.eval()


def _bind(model: PreTrainedModel, function: Callable[..., Any]) -> None:
    """Make a function a method of this one model, in a way that is copied and pickled with it: a bound
    method would be looked up on a model that is not yet put together."""
    bound: Any = partial(function, model)
    bound.__name__, bound.__doc__ = function.__name__, function.__doc__
    setattr(model, function.__name__, bound)


def install(
    model: PreTrainedModel,
    site: Site,
    entry: LayerEntry,
    tensors: dict[str, Tensor],
    permute: bool,
    device: torch.device | None = None,
) -> SparseMlp:
    """Put a SparseMlp in the place of one MLP; `tensors` are those of the side file for this layer.

    The weights are taken out of the dense modules; only the down projection is copied (transposed).
    `device` is where a layer runs whose weights are not in memory.
    """
    mlp = read_mlp(site, lambda name: model.get_parameter(name).detach())
    here, stored = mlp.up_ND.device, entry.stored(tensors)
    if here.type == "meta":
        here, mlp = device or torch.device("cpu"), replace(mlp, stored=stored)
    else:
        mlp = mlp.take(tensors["permutation"].long().to(here)) if permute else mlp
        mlp = mlp if stored is None else mlp.holding(stored)
    router, compensation = build_router(entry), build_compensation(entry)
    for part, module in (("router", router), ("compensation", compensation)):
        fill(module, part_of(tensors, part), f"layers.{site.index}.{part}")
        module.to(device=here)
    sparse = SparseMlp(
        mlp.contiguous(),
        experts=entry.experts,
        shared=entry.shared,
        router=router,
        selection=build_selection(entry),
        compensation=compensation,
        look_ahead=entry.router["look_ahead"],
    )
    if entry.active is not None:
        sparse.density = entry.active / entry.experts
    keep_places(site, sparse)
    replace_module(model, site, sparse)
    if site.act is not None:
        _replace(model, site.path("down"), InExperts(site.path("down")))
    return sparse


def _install_heads(
    model: PreTrainedModel, site: HeadSite, entry: HeadEntry, artefact: Artefact
) -> None:
    """Put SparseHeads in the place of the output projection; its parameters stay the same ones."""
    projection: Any = model.get_submodule(site.projection)
    if offloaded(projection) is not None:
        raise MoefyError(
            f"{site.block}: offloaded by device_map, which attention in experts cannot be; give a "
            "device_map that keeps every block on a device"
        )
    router, compensation = build_router(entry), build_compensation(entry)
    for part, module in (("router", router), ("compensation", compensation)):
        fill(
            module,
            part_of(artefact.tensors_of(site.index, "heads"), part),
            f"heads.{site.index}.{part}",
        )
        module.to(device=projection.weight.device)
    heads = SparseHeads(
        projection.weight,
        projection.bias,
        transposed=site.transposed,
        experts=entry.experts,
        router=router,
        selection=build_selection(entry),
        compensation=compensation,
    )
    _replace(model, site.projection, heads)
    hand_over(model.get_submodule(site.block), site.projection.removeprefix(f"{site.block}."))
