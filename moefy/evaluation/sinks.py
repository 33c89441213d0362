"""Attention sinks, found by measurement: tokens of which some layer makes something huge.

A token is a sink if in any layer of the dense pass the norm of its hidden state (the layer's output)
or of the MLP's input is more than 10 times the median over the tokens of its document. Such tokens
attract attention whatever they are, and a few of them decide every mean over squared activations
(massive activations, Sun et al. 2024).

Shapes: B documents, T tokens, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.data.corpus import Batch
from moefy.experts.passes import listen
from moefy.models.locate import Site, side_of

TIMES_MEDIAN = 10.0


class Sinks:
    """Marks the sinks of one batch while a dense model runs it."""

    def __init__(self, keep_BT: Tensor) -> None:
        """`keep_BT` marks the real tokens."""
        self.keep_BT = keep_BT
        self.marked_BT = torch.zeros_like(keep_BT)

    def see(self, values: Tensor) -> None:
        """Mark by the norms of `[..., D]`, whose leading sizes are those of the batch."""
        norms = values.detach().float().norm(dim=-1).view(self.keep_BT.shape).cpu()
        median_B1 = norms.masked_fill(~self.keep_BT, torch.nan).nanmedian(1, keepdim=True).values
        self.marked_BT |= self.keep_BT & (norms > TIMES_MEDIAN * median_B1)


@contextmanager
def finding_sinks(model: PreTrainedModel, found: list[Site], batch: Batch) -> Iterator[Sinks]:
    """Mark sinks while this batch is run; in a model with an encoder too, those of the decoder."""
    keep_BT = batch.mask()
    assert keep_BT is not None
    sinks = Sinks(keep_BT)
    last = side_of(found[-1])
    here = [site for site in found if side_of(site) == last]

    def after(_: Any, __: Any, output: Any) -> None:
        sinks.see(output[0] if isinstance(output, tuple) else output)

    handles = listen(model, here, lambda _, x_TD: sinks.see(x_TD))
    handles += [model.get_submodule(s.layer).register_forward_hook(after) for s in here]
    try:
        yield sinks
    finally:
        for handle in handles:
            handle.remove()
