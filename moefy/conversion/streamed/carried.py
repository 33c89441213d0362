"""Groups of documents on their way through the layers, and the inputs that are looked at meanwhile.

Hidden states of all tokens between two layers lie in memory-mapped files. Every layer reads one set of
files and writes the next, so that a run that is killed within a layer finds what that layer read.

Shapes: B documents, T tokens or positions, D width.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moefy.conversion.capture import drawn
from moefy.conversion.streamed.skeleton import Skeleton
from moefy.data.corpus import Batch
from moefy.experts.passes import listen
from moefy.experts.placement import stored_dtype
from moefy.models.locate import Place
from moefy.run.output import whole


@dataclass(frozen=True)
class States:
    """The states of some batches, one file per layer: `{name}-{layer}.bin`."""

    folder: Path
    name: str
    batches: list[Batch]
    width: int
    dtype: torch.dtype

    def _file(self, layer: int) -> Path:
        return self.folder / f"{self.name}-{layer}.bin"

    def before(self, layer: int) -> Iterator[tuple[Batch, Tensor]]:
        """Every batch and its states `[B, T, D]` before a layer."""
        rows = self._mapped(layer)
        first = 0
        for batch in self.batches:
            B, T = _shape(batch)
            yield batch, rows[first : first + B * T].view(B, T, -1)
            first += B * T

    def write(self, layer: int, states: Iterator[Tensor]) -> None:
        """The states `[B, T, D]` of every batch before a layer, in order."""
        with whole(self._file(layer)) as part, part.open("wb") as stream:
            for hidden in states:
                raw = hidden.to("cpu", self.dtype).contiguous().flatten().view(torch.uint8)
                stream.write(raw.numpy().data)

    def drop(self, layer: int) -> None:
        """Remove the states before a layer."""
        self._file(layer).unlink(missing_ok=True)

    def _mapped(self, layer: int) -> Tensor:
        positions = sum(B * T for B, T in map(_shape, self.batches))
        return torch.from_file(
            str(self._file(layer)), shared=False, size=positions * self.width, dtype=self.dtype
        ).view(positions, self.width)


def _shape(batch: Batch) -> tuple[int, int]:
    """Documents and positions of a batch."""
    B, T = batch.inputs["input_ids"].shape
    return B, T


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
