"""One streaming pass over the dense model: the inputs of every MLP, on disk, for a token sample.

What it looks at is a list of places: MLPs, or whatever else has an input, such as attention blocks.

Memory stays bounded by one batch: each layer's inputs go to a file of their own, and whoever fits a
layer maps that file alone. Padding is never captured; first tokens are.

Shapes: B documents, T tokens, D model width.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.data.corpus import Batch
from moefy.errors import MoefyError
from moefy.experts.passes import listen, walk
from moefy.models.locate import Place, side_of
from moefy.run.console import Reporter
from moefy.run.folder import write_whole
from moefy.run.processes import ALONE, Processes


@dataclass(frozen=True)
class Captured:
    """The sample of one shard: `[T, D]` per layer, in files `{name}-{layer}.bin` of a folder."""

    folder: Path
    name: str

    @property
    def _index(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def complete(self) -> bool:
        """Whether the pass came to its end."""
        return self._index.is_file()

    def domains(self, site: Place) -> Tensor:
        """The domain of every token of `inputs`, as a number `[T]`."""
        index = json.loads(self._index.read_text())
        return torch.tensor(index["domains"][side_of(site)])

    def inputs(self, site: Place) -> Tensor:
        """The inputs `[T, D]` of one place, mapped from disk, in the dtype of the model."""
        index = json.loads(self._index.read_text())
        tokens, dtype = index["tokens"][site.index], getattr(torch, index["dtype"])
        size = tokens * site.width
        file = str(self.folder / f"{self.name}-{site.index}.bin")
        return torch.from_file(file, shared=False, size=size, dtype=dtype).view(tokens, site.width)


@torch.no_grad()
def capture(
    model: PreTrainedModel,
    found: Sequence[Place],
    batches: list[Batch],
    into: Captured,
    *,
    limit: int,
    seed: int,
    report: Reporter,
    processes: Processes = ALONE,
) -> None:
    """Run the model and keep the inputs of these places for at most `limit` tokens, drawn evenly.

    The places are numbered from 0 in their order. With `processes` each of them runs some of the
    batches; what is kept stands where one process would have put it.

    Raises `MoefyError` where an activation is not finite.
    """
    writer = _Writer.of(model, found, batches, into, limit, seed)
    if processes.main:
        for site in found:
            writer.file(site).touch()
    processes.wait()
    handles = listen(model, found, writer.hear)
    mine = processes.mine(range(len(batches)))
    try:
        for number in report.track(mine, f"measure for {into.name}"):
            writer.number = number
            walk(model, batches[number])
    finally:
        for handle in handles:
            handle.remove()
        writer.close()
    processes.wait()
    if processes.main:
        write_whole(into._index, json.dumps(writer.index(found, model.dtype)))
    processes.wait()


@dataclass
class _Writer:
    """Writes what places see of one batch after the other."""

    batches: list[Batch]
    into: Captured
    sizes: dict[str, list[int]]
    """Tokens of every batch by side, padding left out."""
    keep: dict[str, list[Tensor]]
    """Which of them are kept `[T]`."""
    before: dict[str, list[int]]
    """How many are kept before each batch, and in all."""
    files: dict[int, BinaryIO] = field(default_factory=dict)
    number: int = 0
    """The batch under way."""

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        found: Sequence[Place],
        batches: list[Batch],
        into: Captured,
        limit: int,
        seed: int,
    ) -> "_Writer":
        sides = sorted({side_of(site) for site in found})
        sizes = {side: _sizes(model, found, batches, side) for side in sides}
        keep = {side: drawn(sizes[side], limit, seed) for side in sides}
        counts = {side: [int(chosen_T.sum()) for chosen_T in keep[side]] for side in sides}
        before = {side: [0, *np.cumsum(counts[side]).tolist()] for side in sides}
        return cls(batches, into, sizes, keep, before)

    def file(self, site: Place) -> Path:
        return self.into.folder / f"{self.into.name}-{site.index}.bin"

    def hear(self, site: Place, x_TD: Tensor) -> None:
        """Write the rows of one place that are kept, where one process would have put them."""
        side, batch = side_of(site), self.batches[self.number]
        mask = batch.mask(side)
        if mask is not None:
            x_TD = x_TD[mask.flatten().to(x_TD.device)]
        kept_TD = x_TD[self.keep[side][self.number].to(x_TD.device)].cpu().contiguous()
        if not kept_TD.isfinite().all():
            raise MoefyError(
                f"{site.layer}: the input of {site.module} is not finite for document "
                f"'{batch.samples[0].document.source_id}' or one batched with it; the weights hold "
                f"NaN, or {kept_TD.dtype} overflows"
            )
        if site.index not in self.files:
            self.files[site.index] = self.file(site).open("r+b")
        file = self.files[site.index]
        file.seek(self.before[side][self.number] * site.width * kept_TD.itemsize)
        file.write(kept_TD.flatten().view(torch.uint8).numpy().tobytes())

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def index(self, found: Sequence[Place], dtype: torch.dtype) -> dict[str, Any]:
        """What `Captured` reads of a sample that is complete."""
        return {
            "tokens": [self.before[side_of(site)][-1] for site in found],
            "dtype": str(dtype).removeprefix("torch."),
            "domains": {
                s: domains_of(self.batches, s, self.sizes[s], self.keep[s]) for s in self.keep
            },
        }


def domains_of(
    batches: list[Batch], side: str, sizes: list[int], chosen: list[Tensor]
) -> list[int]:
    """The domain of every token that is kept of batches of so many tokens, as a number."""
    names = sorted({s.document.domain for batch in batches for s in batch.samples})
    found: list[int] = []
    for batch, size, chosen_T in zip(batches, sizes, chosen, strict=True):
        mask, samples = batch.mask(side), batch.samples
        tokens_B = (
            torch.full((len(samples),), size // len(samples)) if mask is None else mask.sum(1)
        )
        domain_B = torch.tensor([names.index(s.document.domain) for s in samples])
        found += domain_B.repeat_interleave(tokens_B)[chosen_T].tolist()
    return found


def drawn(sizes: list[int], limit: int, seed: int) -> list[Tensor]:
    """For each batch of so many tokens, which are kept `[T]`: an even draw without replacement."""
    chosen = torch.zeros(sum(sizes), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    chosen[torch.randperm(sum(sizes), generator=generator)[:limit]] = True
    return list(chosen.split(sizes))


def _sizes(
    model: PreTrainedModel, found: Sequence[Place], batches: list[Batch], side: str
) -> list[int]:
    """Tokens that the places of one side see in each batch, padding left out."""
    masks = [batch.mask(side) for batch in batches]
    if masks[0] is not None:
        return [int(mask.sum()) for mask in masks if mask is not None]
    # Images have no mask: one pass over the first batch tells how many patches an image has.
    seen: list[int] = []
    handles = listen(model, found[:1], lambda _, x_TD: seen.append(len(x_TD)))
    walk(model, batches[0])
    handles[0].remove()
    return [len(batch.samples) * seen[0] // len(batches[0].samples) for batch in batches]
