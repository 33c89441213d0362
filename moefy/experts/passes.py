"""Run a batch, and listen: to the inputs of modules, or to the experts that run, padding left out.

Shapes: B documents, T tokens of one batch without padding, D width, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.data.corpus import Batch
from moefy.experts.moefied import of
from moefy.experts.offload import device_of
from moefy.experts.trunk import short_logits
from moefy.models.library import hidden_of
from moefy.models.locate import Place, side_of


@dataclass(frozen=True)
class Heard:
    """One layer in one forward pass."""

    layer: int
    side: str
    """Whose tokens it reads: `encoder` or `decoder`."""
    batch: Batch
    x_TD: Tensor
    mask_TE: Tensor
    """Which of the `S + E` experts ran."""
    document_T: Tensor
    """Row of the batch that each token belongs to."""


class Listener(Protocol):
    """Whatever keeps sums over forward passes."""

    def hear(self, heard: Heard) -> None:
        """Take in one layer in one forward pass."""


@contextmanager
def observing(
    model: PreTrainedModel, batch: Batch, *listeners: Listener, heads: Listener | None = None
) -> Iterator[None]:
    """Let the listeners hear every MLP while this batch is run, and `heads` every attention block."""
    moefied = of(model)
    mlps, blocks = moefied.mlps, moefied.blocks
    for (index, module), site in zip(mlps.items(), moefied.sites, strict=True):
        module.observer = _observer(index, side_of(site), batch, listeners)
    if heads is not None:
        for (index, block), head_site in zip(blocks.items(), moefied.heads, strict=True):
            block.observer = _observer(index, side_of(head_site), batch, (heads,))
    try:
        yield
    finally:
        for routed in (*mlps.values(), *blocks.values()):
            routed.observer = None


def _observer(
    index: int, side: str, batch: Batch, listeners: tuple[Listener, ...]
) -> Callable[[Tensor, Tensor], None]:
    mask_BT = batch.mask(side)

    def observer(x_TD: Tensor, mask_TE: Tensor) -> None:
        documents = len(batch.samples)
        rows = torch.arange(documents, device=x_TD.device)
        document_T = rows.repeat_interleave(len(x_TD) // documents)
        if mask_BT is not None:
            keep_T = mask_BT.flatten().to(x_TD.device)
            x_TD, mask_TE, document_T = x_TD[keep_T], mask_TE[keep_T], document_T[keep_T]
        for listener in listeners:
            listener.hear(Heard(index, side, batch, x_TD, mask_TE, document_T))

    return observer


def run(model: PreTrainedModel, batch: Batch) -> object:
    """One forward pass without a cache, on the device of the model."""
    return model(**inputs_of(model, batch))


def walk(model: PreTrainedModel, batch: Batch) -> None:
    """`run` for those who listen alone: logits are made of two positions only."""
    whole = "pixel_values" in batch.inputs or "labels" in batch.inputs
    with nullcontext() if whole else short_logits(model):
        run(model, batch)


def inputs_of(
    model: PreTrainedModel, batch: Batch, device: torch.device | None = None
) -> dict[str, Any]:
    """What a model is called with: the batch on its device, or on `device`, without a cache."""
    where = device or device_of(model)
    inputs: dict[str, Any] = {name: value.to(where) for name, value in batch.inputs.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    elif model.config.is_encoder_decoder or model.can_generate():
        inputs["use_cache"] = False
    return inputs


def listen(
    model: nn.Module, found: Sequence[Place], heard: Callable[[Any, Tensor], None]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Call `heard` with every place and its input `[T, D]` in every forward pass; returns the hooks."""

    def hook(site: Place) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Any]], None]:
        def pre(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            hidden = hidden_of(args, kwargs, site.width)
            heard(site, hidden.detach().reshape(-1, site.width))

        return pre

    modules = [model.get_submodule(site.module) for site in found]
    return [
        module.register_forward_pre_hook(hook(site), with_kwargs=True)
        for module, site in zip(modules, found, strict=True)
    ]
