"""Listen to the experts that run: input and mask of MLPs and attention, padding left out.

Shapes: B documents, T tokens of one batch without padding, D width, S shared and E routed experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.data import Batch
from moefy.heads import HeadSite
from moefy.locate import Site, side_of
from moefy.sparse_heads import sparse_heads
from moefy.sparse_mlp import sparse_mlps


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
    mlps, blocks = sparse_mlps(model), sparse_heads(model)
    found: list[Site] = model.moefy_sites  # type: ignore[assignment]
    for (index, module), site in zip(mlps.items(), found, strict=True):
        module.observer = _observer(index, side_of(site), batch, listeners)
    if heads is not None:
        sites: list[HeadSite] = getattr(model, "moefy_heads", [])
        for (index, block), head_site in zip(blocks.items(), sites, strict=True):
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
