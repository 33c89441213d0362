"""One layer of a plan: what it reads, captured on disk; its partition, router, selection, compensation.

One streaming pass over the dense model captures the inputs of a list of places: MLPs, or whatever else
has an input, such as attention blocks. Memory stays bounded by one batch: each layer's inputs go to a
file of their own, and whoever fits a layer maps that file alone. Padding is never captured; first tokens
are.

The routing of an attention block is fitted as that of an MLP (`moefy.conversion.fit`): what the heads put
out takes the place of the neurons' activations, the output projection that of the down projection.

Shapes: B documents, T tokens, D width, N neurons or width of all heads, E experts (heads or groups of them).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.conversion.fit import (
    LayerTokens,
    RouterFit,
    cap,
    fit_compensation,
    fit_router,
    fit_selection,
)
from moefy.conversion.plan import Plan
from moefy.data.corpus import Batch
from moefy.errors import MoefyError, OutputError
from moefy.experts.entries import build_compensation, build_router
from moefy.experts.passes import listen, walk
from moefy.methods.base import stored
from moefy.methods.partition import Partition, partition
from moefy.methods.tables import SELECTIONS, choose
from moefy.models.entries import Entry, HeadEntry, LayerEntry
from moefy.models.heads import HeadSite
from moefy.models.locate import Place, Site, side_of
from moefy.models.mlp import DenseMlp, HeadOutputs
from moefy.recipe import Recipe
from moefy.run.console import Reporter
from moefy.run.folder import write_whole
from moefy.run.output import ANEW
from moefy.run.processes import ALONE, Processes
from moefy.run.reading import read_json, reading


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
        index = self._read()
        with reading(self._index, ANEW, OutputError):
            return torch.tensor(index["domains"][side_of(site)])

    def inputs(self, site: Place) -> Tensor:
        """The inputs `[T, D]` of one place, mapped from disk, in the dtype of the model."""
        index, file = self._read(), self.folder / f"{self.name}-{site.index}.bin"
        with reading(self._index, ANEW, OutputError):
            tokens, dtype = index["tokens"][site.index], getattr(torch, index["dtype"])
            size = tokens * site.width
        with reading(file, ANEW, OutputError):
            found = torch.from_file(str(file), shared=False, size=size, dtype=dtype)
            return found.view(tokens, site.width)

    def _read(self) -> Any:
        return read_json(self._index, ANEW, OutputError)


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


PROVISIONAL = 256
"""Tokens that set a selection which is going to be set anew."""


E = TypeVar("E", bound=Entry)


@dataclass(frozen=True)
class Fitted(Generic[E]):
    """What the side files hold of one layer or attention block, and how its router came out."""

    entry: E
    tensors: dict[str, Tensor]
    fit: RouterFit


@dataclass(frozen=True)
class LayerSample:
    """What one layer sees of the tokens that a conversion reads."""

    partition_TD: Tensor
    domain_T: Tensor
    """The domains of those."""
    router: LayerTokens
    held: LayerTokens

    def on(self, device: torch.device) -> "LayerSample":
        """The same, its tokens handed out on this device."""
        router, held = (replace(t, device=device) for t in (self.router, self.held))
        return replace(self, router=router, held=held)


def layer_sample(samples: dict[str, Captured], todo: Plan, site: Site) -> LayerSample:
    """What was captured of one layer."""
    first = samples["partition"]
    router, held = (tokens_of(samples[name], todo, site) for name in ("router", "held-out"))
    return LayerSample(first.inputs(site), first.domains(site), router, held)


def split_layer(
    mlp: DenseMlp, todo: Plan, site: Site, recipe: Recipe, sample: LayerSample
) -> Partition:
    """The partition of one layer."""
    return partition(
        mlp,
        sample.partition_TD.float(),
        experts=todo.layers[site.index].experts,
        method=recipe.partition.method,
        shared=recipe.partition.shared,
        shared_by=recipe.partition.shared_by,
        most_shared=_active(todo, site) - 1,
        domain_T=sample.domain_T,
        seed=recipe.seed,
        where=f"layer {site.index}",
    )


def fit_layer(
    mlp: DenseMlp,
    todo: Plan,
    site: Site,
    recipe: Recipe,
    sample: LayerSample,
    split: Partition | None = None,
) -> Fitted[LayerEntry]:
    """Partition one layer, unless `split` is given, and fit its routing.

    `mlp` has the weights in fp32 as stored. The same seed gives the same bytes.
    """
    split = split or split_layer(mlp, todo, site, recipe, sample)
    entry = replace(todo.layers[site.index], shared=split.shared)
    k = _active(todo, site) - split.shared
    torch.manual_seed(recipe.seed + site.index)
    whole = mlp if split.as_stored else mlp.take(split.permutation)
    if entry.storage is not None:
        whole = whole.quantised(entry.storage["bits"], entry.storage["scales"])
    routed = whole.take(slice(split.shared * split.expert_size, None))
    tokens, held = sample.router, sample.held

    router, compensation = build_router(entry), build_compensation(entry)
    x_TD = sample.partition_TD.float()
    compensation.initialise(routed, x_TD, k)
    routed = compensation.centred(routed)
    router.initialise(routed, x_TD, whole)
    fit = fit_router(
        router, routed, tokens, held, experts=entry.experts - split.shared, k=k,
        recipe=recipe.router, seed=recipe.seed,
    )  # fmt: skip
    kind = choose(SELECTIONS, "selection", recipe.selection.name)
    # Where densities are allocated, both are fitted there, for every density that is considered.
    seen = held.some(PROVISIONAL) if recipe.allocates else held
    selection = fit_selection(kind, router, routed, seen, k, cap(recipe, k))
    entry = replace(entry, selection={"name": recipe.selection.name, **selection.settings()})
    if not recipe.allocates:
        fit_compensation(compensation, router, selection, routed, tokens)

    tensors = {"permutation": split.permutation.to(torch.int32)}
    if whole.stored is not None:
        tensors |= {f"weights.{name}": value for name, value in whole.stored.tensors.items()}
    return Fitted(entry, tensors | stored(router, compensation), fit)


def tokens_of(
    sample: Captured, todo: Plan, site: Site, device: torch.device | None = None
) -> LayerTokens:
    """What a layer's MLP sees of a sample, and what its router reads; handed out on `device`."""
    ahead = todo.layers[site.index].router["look_ahead"]
    read = todo.sites[site.index - 1] if ahead else site
    return LayerTokens(sample.inputs(site), sample.inputs(read), device=device)


def _active(todo: Plan, site: Site) -> int:
    """Experts that run on average, shared ones included."""
    return todo.k[site.index] + todo.layers[site.index].shared


def fit_heads(
    heads: HeadOutputs, todo: Plan, site: HeadSite, recipe: Recipe, samples: dict[str, Captured]
) -> Fitted[HeadEntry]:
    """Fit the routing of one block; `heads` has the output projection in fp32.

    The same seed gives the same bytes.
    """
    entry, k, wanted = todo.heads[site.index], todo.head_k[site.index], recipe.attention
    torch.manual_seed(recipe.seed + site.index)
    seen = {name: _tokens(sample, todo, site) for name, sample in samples.items()}

    router, compensation = build_router(entry), build_compensation(entry)
    first = seen["partition"]
    assert first.hidden_TN is not None
    known = HeadOutputs.behind(heads.down_ND, first.hidden_TN.float())
    router.initialise(known, first.mlp_TD.float(), known)
    fit = fit_router(
        router, heads, seen["router"], seen["held-out"], experts=entry.experts, k=k,
        recipe=replace(recipe.router, target="contribution", loss=wanted.loss), seed=recipe.seed,
    )  # fmt: skip
    kind = choose(SELECTIONS, "attention.selection", wanted.selection)
    selection = fit_selection(kind, router, heads, seen["held-out"], k)
    fit_compensation(compensation, router, selection, heads, seen["router"])
    entry = replace(entry, selection={"name": wanted.selection, **selection.settings()})
    return Fitted(entry, stored(router, compensation), fit)


def _tokens(sample: Captured, todo: Plan, site: HeadSite) -> LayerTokens:
    """What a block reads of a sample, and what its heads put out."""
    reads, heads = site.places(len(todo.sites))
    x_TD = sample.inputs(reads)
    return LayerTokens(x_TD, x_TD, sample.inputs(heads))
