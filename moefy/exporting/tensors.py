"""The tensors of a stock checkpoint: their names on disk, and how each is made from the source's.

    for tensor in plan_tensors(...):
        tensor.make()          # read, cut and scaled now; nothing is kept

A stock architecture weighs the experts that run by a softmax. The router is scaled by `eps`, so the
K weights are all 1/K up to `eps`, and down projections are multiplied by K. A shared expert passes
through a sigmoid gate with zero weights, 1/2, so its down projection is doubled.

Shards are written as https://huggingface.co/docs/safetensors says: eight bytes with the length of a JSON
header, the header, the tensors. The library's own `save_file` wants all tensors of a shard in memory at once.

Shapes: N neurons, D width, E routed experts, S shared experts, F neurons per expert, K experts
that run.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel

from moefy.errors import CheckpointError, UnsupportedModel
from moefy.exporting.targets import SHARED_GAIN, Target
from moefy.models.artefact import ADAPTER, Artefact
from moefy.models.checkpoint import INDEX, Checkpoint
from moefy.models.config import read_config
from moefy.models.locate import Site, disk_names, meta_model, permute, sites
from moefy.models.reorder import rounded_values

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
SHARD_BYTES = 5 * 10**9


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


class Exportable:
    """What is exported: an artefact and its dense weights, in expert order, one layer in memory at most."""

    def __init__(self, checkpoint: Checkpoint, artefact: Artefact) -> None:
        self.checkpoint, self.artefact = checkpoint, artefact
        self.meta = meta_model(read_config(checkpoint))
        self.config = self.meta.config
        self.sites = sites(self.meta)
        self.owners = {name: site for site in self.sites for name in site.parameters}
        self.read = lru_cache(maxsize=3)(self._read)
        self._rounded = rounded_values(artefact.stored)

    @cached_property
    def names(self) -> dict[str, str]:
        """Name on disk of every parameter, in the order of the model."""
        stored = {n: disk for disk, n in disk_names(self.meta, self.checkpoint.tensors).items()}
        names = {name: stored[name] for name in self.meta.state_dict() if name in stored}
        for name, other in ((HEAD, EMBEDDING), (EMBEDDING, HEAD)):
            if self.config.tie_word_embeddings and name not in names and other in names:
                names[name] = names[other]
        missing = [name for name in self.meta.state_dict() if name not in names]
        if missing:
            raise CheckpointError(f"{self.checkpoint.folder}: no tensor on disk is {missing[0]}")
        return names

    @cached_property
    def tied(self) -> bool:
        """Whether both embeddings are one tensor, as the file has it."""
        if not self.config.tie_word_embeddings:
            return False
        head, embedding = (self.names.get(name) for name in (HEAD, EMBEDDING))
        if head is None or embedding is None or head == embedding:
            return True
        return torch.equal(self.checkpoint.read(head), self.checkpoint.read(embedding))

    def spec(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a parameter; `CheckpointError` for a dtype that has no arithmetic."""
        return stored_as(self.checkpoint, self.names[name])

    def _read(self, name: str) -> Tensor:
        tensor = self.checkpoint.read(self.names[name])
        site = self.owners.get(name)
        if site is None or self.artefact.form != ADAPTER:
            return tensor
        rounded = self._rounded(site, name)
        if rounded is not None:
            return rounded.to(tensor.dtype)
        return permute(site, name, tensor, self.artefact.permutation(site.index))


def stored_as(checkpoint: Checkpoint, name: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a tensor on disk; `CheckpointError` for a dtype that has no arithmetic."""
    stored = checkpoint.tensors[name]
    if stored.dtype not in DTYPES:
        raise CheckpointError(
            f"{stored.file}: {name} is stored as {stored.dtype}; export a checkpoint in "
            f"{', '.join(DTYPES)}"
        )
    return stored.shape, DTYPES[stored.dtype]


def times(tensor: Tensor, gain: float, name: str) -> Tensor:
    """A weight times `gain`; `CheckpointError` where it does not stay finite in its dtype."""
    scaled = tensor * gain
    if not scaled.isfinite().all():
        raise CheckpointError(
            f"{name}: times {gain:g} it is not finite in {tensor.dtype}; export a checkpoint "
            "stored in bfloat16 or float32"
        )
    return scaled


def plan_tensors(target: Target, source: Exportable, meta: PreTrainedModel) -> list[Planned]:
    """Every tensor of the stock checkpoint, layer by layer.

    `meta` is the target's model on the meta device: what it has no place for is refused with
    `UnsupportedModel`.
    """
    room = meta.state_dict()
    planned: list[Planned] = []
    first = {f"{site.path('up')}.weight": site for site in source.sites}
    for name in source.names:
        if name in source.owners:
            if name in first:
                planned += _experts(target, source, first[name])
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


def _experts(target: Target, source: Exportable, site: Site) -> Iterator[Planned]:
    """The router, the routed experts and the shared expert of one layer."""
    artefact = source.artefact
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
    source: Exportable, site: Site, role: str, name: str, neurons: slice, gain: float
) -> Planned:
    """Some neurons of one matrix; the down projection times `gain`."""
    whole = f"{site.path(role)}.weight"

    def make() -> Tensor:
        tensor = source.read(whole)
        return times(tensor[:, neurons], gain, whole) if role == "down" else tensor[neurons]

    shape = _shape(site, role, neurons.stop - neurons.start)
    return Planned(name, shape, source.spec(whole)[1], make)


def write_shards(folder: Path, planned: list[Planned], shard_bytes: int = SHARD_BYTES) -> None:
    """Write `model.safetensors`, or shards of at most `shard_bytes` and their index."""
    by_name = {tensor.name: tensor for tensor in planned}
    empty = {t.name: torch.empty(t.shape, dtype=t.dtype, device="meta") for t in planned}
    split = split_torch_state_dict_into_shards(empty, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        _write(folder / file, [by_name[name] for name in names])
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write(file: Path, tensors: list[Planned]) -> None:
    # The widest elements first, so that each tensor begins at a multiple of its element size.
    tensors = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.bytes],
        }
        position += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            stream.write(_raw(tensor))


def _raw(planned: Planned) -> memoryview:
    value: Tensor = planned.make()
    if tuple(value.shape) != planned.shape or value.dtype != planned.dtype:
        raise CheckpointError(
            f"{planned.name}: {list(value.shape)} {value.dtype} on disk, its header says "
            f"{list(planned.shape)} {planned.dtype}; download the checkpoint again"
        )
    raw: Any = value.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(raw)
