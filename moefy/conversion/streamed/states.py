"""States of groups of documents between two layers, and the inputs that are looked at on the way.

Hidden states of all tokens lie in memory-mapped files. Every layer reads one set of files and writes the
next, so that a run that is killed within a layer finds what that layer read.

Shapes: B documents, T tokens or positions, D width.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moefy.conversion.layer import drawn
from moefy.conversion.streamed.layerwise import LayerwiseModel
from moefy.data.corpus import Batch
from moefy.experts.passes import listen
from moefy.experts.placement import stored_dtype
from moefy.models.locate import Place
from moefy.run.folder import whole


@dataclass(frozen=True)
class States:
    """The states of some batches, one file per layer: `{name}-{layer}.bin`."""

    folder: Path
    name: str
    batches: list[Batch]
    width: int
    dtype: torch.dtype
    sizes: list[int]
    """Tokens of each batch, padding left out."""
    chosen: list[Tensor]
    """For each batch, whether each of those is looked at `[T]` (bool)."""

    @classmethod
    def of(
        cls,
        name: str,
        folder: Path,
        model: LayerwiseModel,
        batches: list[Batch],
        limit: int,
        seed: int,
    ) -> "States":
        """For batches that go through this model; `limit` of their tokens, drawn evenly, are looked at."""
        masks = [batch.mask() for batch in batches]
        sizes = [int(mask.sum()) for mask in masks if mask is not None]
        width, dtype = model.sites[0].width, stored_dtype(model.checkpoint)
        return cls(folder, name, batches, width, dtype, sizes, drawn(sizes, limit, seed))

    def _file(self, layer: int) -> Path:
        return self.folder / f"{self.name}-{layer}.bin"

    def enter(self, model: LayerwiseModel) -> None:
        """Write what the first layer reads."""
        self.write(0, (model.enter(batch) for batch in self.batches))

    def before(self, layer: int) -> Iterator[tuple[Batch, Tensor]]:
        """Every batch and its states `[B, T, D]` before a layer."""
        shapes = [tuple(batch.inputs["input_ids"].shape) for batch in self.batches]
        positions, first = sum(B * T for B, T in shapes), 0
        size = positions * self.width
        file = str(self._file(layer))
        rows = torch.from_file(file, shared=False, size=size, dtype=self.dtype)
        rows = rows.view(positions, self.width)
        for batch, (B, T) in zip(self.batches, shapes, strict=True):
            yield batch, rows[first : first + B * T].view(B, T, -1)
            first += B * T

    def write(self, layer: int, states: Iterator[Tensor]) -> None:
        """The states `[B, T, D]` of every batch before a layer, in order."""
        with whole(self._file(layer)) as unfinished, unfinished.open("wb") as stream:
            for hidden in states:
                raw = hidden.to("cpu", self.dtype).contiguous().flatten().view(torch.uint8)
                stream.write(raw.numpy().data)

    def drop(self, layer: int) -> None:
        """Remove the states before a layer."""
        self._file(layer).unlink(missing_ok=True)

    def pick(self, number: int, x_TD: Tensor) -> Tensor:
        """The rows of batch `number` that are looked at, of an input `[T, D]` with padding."""
        mask = self.batches[number].mask()
        if mask is not None:
            x_TD = x_TD[mask.flatten().to(x_TD.device)]
        return x_TD[self.chosen[number].to(x_TD.device)].cpu()


class _Enough(Exception):
    """The MLP was reached, what comes after it is not needed."""


def forward(
    model: LayerwiseModel,
    index: int,
    states: States,
    rows: list[Tensor] | None = None,
    *,
    to_mlp: bool = False,
) -> Iterator[Tensor]:
    """What layer `index` makes of every batch; adds to `rows`, if given, what its MLP reads of the
    tokens that are looked at.

    With `to_mlp` batches go as far as the MLP, and nothing comes out.
    """
    number = 0

    def at_mlp(_: Place, x_TD: Tensor) -> None:
        if rows is not None:
            rows.append(states.pick(number, x_TD))
        if to_mlp:
            raise _Enough

    handles = listen(model.model, [model.sites[index]], at_mlp)
    try:
        for number, (batch, hidden) in enumerate(states.before(index)):  # noqa: B007
            with suppress(_Enough):
                yield model.run(index, batch, hidden)
    finally:
        for handle in handles:
            handle.remove()


def inputs(model: LayerwiseModel, index: int, states: States) -> Tensor:
    """What the MLP of layer `index` reads of the tokens that are looked at `[T, D]`."""
    rows: list[Tensor] = []
    for _ in forward(model, index, states, rows, to_mlp=True):
        pass
    return torch.cat(rows)
