"""The tensors of a stock checkpoint: their names on disk, and how each is made from the source's.

    for tensor in plan_tensors(...):
        tensor.make()          # read, cut and scaled now; nothing is kept

A stock architecture weighs the experts that run by a softmax. The router is scaled by `eps`, so the
K weights are all 1/K up to `eps`, and down projections are multiplied by K. A shared expert passes
through a sigmoid gate with zero weights, 1/2, so its down projection is doubled.

Shapes: N neurons, D width, E routed experts, S shared experts, F neurons per expert, K experts
that run.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.errors import CheckpointError, UnsupportedModel
from moefy.exporting.targets import SHARED_GAIN, Target
from moefy.models.artefact import ADAPTER, Artefact
from moefy.models.checkpoint import Checkpoint
from moefy.models.locate import Site, disk_names, permute

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written; `make` gives it, of this shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Size on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


class Source:
    """The dense weights by parameter name, in expert order, one layer in memory at most."""

    def __init__(
        self, checkpoint: Checkpoint, meta: PreTrainedModel, found: list[Site], artefact: Artefact
    ) -> None:
        self.checkpoint, self.artefact = checkpoint, artefact
        stored = {name: disk for disk, name in disk_names(meta, checkpoint.tensors).items()}
        self.names = {name: stored[name] for name in meta.state_dict() if name in stored}
        """Name on disk of every parameter, in the order of the model."""
        self.owners = {name: site for site in found for name in site.parameters}
        self.tied = self._tie(bool(meta.config.tie_word_embeddings))
        missing = [name for name in meta.state_dict() if name not in self.names]
        if missing:
            raise CheckpointError(f"{checkpoint.folder}: no tensor on disk is {missing[0]}")
        self.read = lru_cache(maxsize=3)(self._read)

    def _tie(self, by_config: bool) -> bool:
        """Whether both embeddings are one tensor, as the file has it."""
        names = self.names
        if by_config and HEAD in names and EMBEDDING in names:
            head, embedding = (self.checkpoint.read(names[n]) for n in (HEAD, EMBEDDING))
            return torch.equal(head, embedding)
        if by_config:
            for name, other in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
                if name not in names and other in names:
                    names[name] = names[other]
        return by_config

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a parameter; `CheckpointError` for a dtype that has no arithmetic."""
        stored = self.checkpoint.tensors[self.names[name]]
        if stored.dtype not in DTYPES:
            raise CheckpointError(
                f"{stored.file}: {name} is stored as {stored.dtype}; export a checkpoint in "
                f"{', '.join(DTYPES)}"
            )
        return stored.shape, DTYPES[stored.dtype]

    def _read(self, name: str) -> Tensor:
        tensor = self.checkpoint.read(self.names[name])
        site = self.owners.get(name)
        if site is None or self.artefact.form != ADAPTER:
            return tensor
        return permute(site, name, tensor, self.artefact.permutation(site.index))


def plan_tensors(
    target: Target, source: Source, found: list[Site], artefact: Artefact, meta: PreTrainedModel
) -> list[Planned]:
    """Every tensor of the stock checkpoint, layer by layer.

    `meta` is the target's model on the meta device: what it has no place for is refused with
    `UnsupportedModel`.
    """
    room = meta.state_dict()
    planned: list[Planned] = []
    first = {f"{site.path('up')}.weight": site for site in found}
    for name in source.names:
        if name in source.owners:
            if name in first:
                planned += _experts(target, source, first[name], artefact)
        elif not (name == HEAD and source.tied):
            shape, dtype = source.spec(name)
            if name not in room or room[name].shape != shape:
                raise UnsupportedModel(
                    f"{name} {list(shape)} has no place in {target.model_type}, and no other stock "
                    "mixture of experts holds it; export --to dense"
                )
            planned.append(Planned(name, shape, dtype, partial(source.read, name)))
    if target.attention_biases:
        for name in room:
            if name.endswith("_proj.bias") and name not in source.names:
                dtype = source.spec(name.removesuffix("bias") + "weight")[1]
                planned.append(_zeros(name, tuple(room[name].shape), dtype))
    return planned


def _experts(target: Target, source: Source, site: Site, artefact: Artefact) -> Iterator[Planned]:
    """The router, the routed experts and the shared expert of one layer."""
    entry = artefact.layers[site.index]
    k, eps, shared = entry.selection["k"], entry.selection["eps"], entry.shared
    size, block = entry.neurons // entry.experts, f"{site.layer}.{target.block}"
    scaled_ED = artefact.tensors_of(site.index)["router.weight"].float() * eps
    # In fp32 whatever the rest: engines that route in fp32 then have the very router fitted.
    yield Planned(f"{block}.gate.weight", tuple(scaled_ED.shape), torch.float32, lambda: scaled_ED)
    for number in range(entry.experts - shared):
        begin = (shared + number) * size
        for role in target.experts:
            name = target.expert(site.layer, role, number)
            yield _piece(source, site, role, name, slice(begin, begin + size), k)
    if not target.shared:
        return
    dtype = source.spec(f"{site.path('up')}.weight")[1]
    yield _zeros(f"{block}.shared_expert_gate.weight", (1, site.width), dtype)
    for role in target.experts:
        name = f"{block}.shared_expert.{role}_proj.weight"
        if shared:
            yield _piece(source, site, role, name, slice(0, shared * size), SHARED_GAIN)
        else:
            yield _zeros(name, _shape(site, role, size), dtype)


def _shape(site: Site, role: str, neurons: int) -> tuple[int, int]:
    return (site.width, neurons) if role == "down" else (neurons, site.width)


def _zeros(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Planned:
    return Planned(name, shape, dtype, lambda: torch.zeros(shape, dtype=dtype))


def _piece(
    source: Source, site: Site, role: str, name: str, neurons: slice, gain: float
) -> Planned:
    """Some neurons of one matrix; the down projection times `gain`."""
    whole = f"{site.path(role)}.weight"

    def make() -> Tensor:
        tensor = source.read(whole)
        if role != "down":
            return tensor[neurons]
        scaled = tensor[:, neurons] * gain
        if not scaled.isfinite().all():
            raise CheckpointError(
                f"{whole}: times {gain:g} it is not finite in {tensor.dtype}; export a checkpoint "
                "stored in bfloat16 or float32"
            )
        return scaled

    shape = _shape(site, role, neurons.stop - neurons.start)
    return Planned(name, shape, source.spec(whole)[1], make)
