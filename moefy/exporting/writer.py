"""Write a sharded safetensors checkpoint whose tensors are made one at a time.

The format: eight bytes with the length of a JSON header, the header, the tensors one after another
(https://huggingface.co/docs/safetensors). The library's own `save_file` wants all tensors of a
shard in memory at once.
"""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from moefy.errors import CheckpointError
from moefy.exporting.tensors import DTYPES, Planned
from moefy.models.checkpoint import INDEX

SHARD_BYTES = 5 * 10**9
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
