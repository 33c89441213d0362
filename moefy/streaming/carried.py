"""Groups of documents on their way through the layers, and the inputs that are looked at meanwhile.

Shapes: B documents, T tokens, D width.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moefy.activations import drawn, listen
from moefy.data import Batch
from moefy.locate import Place
from moefy.modeling import stored_dtype
from moefy.streaming.skeleton import Skeleton
from moefy.streaming.states import States


class _Enough(Exception):
    """The MLP was reached, what comes after it is not needed."""


@dataclass
class Carried:
    """The states of one group of documents, and which of its tokens are looked at."""

    states: States
    sizes: list[int]
    """Tokens of each batch, padding left out."""
    chosen: list[Tensor]
    """For each batch, whether each of those is kept `[T]` (bool)."""

    def pick(self, number: int, x_TD: Tensor, batch: Batch) -> Tensor:
        """The rows of batch `number` that are kept, of an input `[T, D]` with padding."""
        mask = batch.mask()
        if mask is not None:
            x_TD = x_TD[mask.flatten().to(x_TD.device)]
        return x_TD[self.chosen[number].to(x_TD.device)].cpu()


def carry(
    name: str, folder: Path, skeleton: Skeleton, batches: list[Batch], limit: int, seed: int
) -> Carried:
    """Make `name` ready to be carried through `skeleton`."""
    masks = [batch.mask() for batch in batches]
    sizes = [int(mask.sum()) for mask in masks if mask is not None]
    dtype = stored_dtype(skeleton.checkpoint)
    states = States(folder, name, batches, skeleton.sites[0].width, dtype)
    return Carried(states, sizes, drawn(sizes, limit, seed))


def through(
    skeleton: Skeleton,
    index: int,
    carried: Carried,
    kept: list[Tensor] | None = None,
    *,
    to_mlp: bool = False,
) -> Iterator[Tensor]:
    """What layer `index` makes of every batch; adds to `kept` what its MLP reads, where it is given.

    With `to_mlp` batches go as far as the MLP, and nothing comes out.
    """
    current: list[tuple[int, Batch]] = []

    def heard(_: Place, x_TD: Tensor) -> None:
        number, batch = current[0]
        if kept is not None:
            kept.append(carried.pick(number, x_TD, batch))
        if to_mlp:
            raise _Enough

    handles = listen(skeleton.model, [skeleton.sites[index]], heard)
    try:
        for number, (batch, hidden) in enumerate(carried.states.before(index)):
            current[:] = [(number, batch)]
            with suppress(_Enough):
                yield skeleton.run(index, batch, hidden)
    finally:
        for handle in handles:
            handle.remove()


def reads(skeleton: Skeleton, index: int, carried: Carried) -> Tensor:
    """What the MLP of layer `index` reads of the tokens that are looked at `[T, D]`."""
    kept: list[Tensor] = []
    for _ in through(skeleton, index, carried, kept, to_mlp=True):
        pass
    return torch.cat(kept)
