"""Hidden states of all tokens between two layers, in memory-mapped files.

Every layer reads one set of files and writes the next, so that a run that is killed within a layer
finds what that layer read.

Shapes: B documents, T positions, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moefy.data import Batch


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
        unfinished = self._file(layer).with_suffix(".part")
        with unfinished.open("wb") as stream:
            for hidden in states:
                raw = hidden.to("cpu", self.dtype).contiguous().flatten().view(torch.uint8)
                stream.write(raw.numpy().data)
        unfinished.replace(self._file(layer))

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
