"""Sharded safetensors on disk: opened, checked, read and written one tensor at a time.

A converted checkpoint is its source with the neurons of some tensors in another order. Headers, names,
dtypes, shards and every file that holds no weights stay as they were: `outline` makes a weight file
that lacks nothing but its tensors, `overwrite` puts each of them in.

It knows nothing of layers, experts or recipes.
"""

import hashlib
import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from numpy.typing import NDArray
from torch import Tensor

from moefy.errors import CheckpointError
from moefy.models.refusals import refuse_adapter, refuse_pointer
from moefy.run.output import whole

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: its file, dtype, shape, and first and last byte in the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises `CheckpointError` where the file is cut short or its header is damaged.
    """
    refuse_pointer(file)
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found = {
            name: StoredTensor(
                file,
                entry["dtype"],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
                8 + length + entry["data_offsets"][1],
            )
            for name, entry in header.items()
        }
        end = max((tensor.end for tensor in found.values()), default=8 + length)
        if end != size:
            raise ValueError(f"its header speaks of {end} bytes, the file has {size}")
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(
            f"{file}: truncated or corrupt safetensors file ({error}); copy or download it again"
        ) from None
    return found


@dataclass(frozen=True)
class Checkpoint:
    """A folder with `config.json` and safetensors weights."""

    folder: Path
    config: dict[str, Any]

    @classmethod
    def open_config(cls, model: str | Path) -> "Checkpoint":
        """Open a local folder, or download a Hub repository by its id, and read `config.json` only.

        Raises `CheckpointError` for anything that is not a model folder.
        """
        folder = Path(model)
        if not folder.exists():
            folder = _download(str(model))
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: not a model folder; give the folder that holds config.json"
            )
        refuse_adapter(folder)
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise CheckpointError(f"{folder}: no config.json; is this a transformers model folder?")
        refuse_pointer(config_file)
        try:
            config = json.loads(config_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{config_file}: not JSON ({error}); download it again") from None
        return cls(folder, config)

    @classmethod
    def open(cls, model: str | Path) -> "Checkpoint":
        """Like `open_config`, and the weight files are found and checked too."""
        checkpoint = cls.open_config(model)
        _ = checkpoint.tensors  # a damaged file is found now, not halfway
        return checkpoint

    @cached_property
    def files(self) -> list[Path]:
        """The weight files, in order."""
        index = self.folder / INDEX
        if index.is_file():
            try:
                names = sorted(
                    set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                )
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index}: not a weight index ({error})") from None
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing:
                raise CheckpointError(
                    f"{self.folder}: {len(missing)} of {len(names)} shards missing, "
                    f"first {missing[0]}; download the rest"
                )
            return [self.folder / name for name in names]
        if (self.folder / SINGLE).is_file():
            return [self.folder / SINGLE]
        pickled = sorted(self.folder.glob("*.bin")) + sorted(self.folder.glob("*.pt*"))
        if pickled:
            raise CheckpointError(
                f"{self.folder}: only pickled weights ({pickled[0].name}), which can run code when "
                "opened; convert them once with transformers' save_pretrained, which writes safetensors"
            )
        raise CheckpointError(f"{self.folder}: no {SINGLE} and no {INDEX}")

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every stored tensor by its name on disk."""
        found: dict[str, StoredTensor] = {}
        for file in self.files:
            found |= read_header(file)
        index = self.folder / INDEX
        if index.is_file():
            wanted = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            lost = [name for name in wanted if name not in found]
            if lost:
                raise CheckpointError(
                    f"{self.folder}: the index names {lost[0]}, no shard holds it; download again"
                )
        return found

    def read(self, name: str) -> Tensor:
        """One tensor, alone in memory, and read once: no file is mapped."""
        stored = self.tensors[name]
        tensor = torch.empty(stored.shape, dtype=self.dtype_of(name))
        raw: NDArray[np.uint8] = np.empty(0, np.uint8)
        if tensor.numel():
            raw = tensor.view(-1).view(torch.uint8).numpy()
        try:
            with stored.file.open("rb") as stream:
                stream.seek(stored.begin)
                got = stream.readinto(raw.data)
        except OSError as error:
            raise CheckpointError(
                f"{stored.file}: cannot be read ({error.strerror}); put it back in its place"
            ) from None
        if got != len(raw):
            raise CheckpointError(
                f"{stored.file}: {name} is cut short, {got} of {len(raw)} bytes; copy it again"
            )
        return tensor

    def map(self, name: str) -> Tensor:
        """One tensor, mapped: only the parts that are touched come into memory. Not to be changed."""
        stored = self.tensors[name]
        raw = np.memmap(stored.file, np.uint8, "c", stored.begin, (stored.end - stored.begin,))
        return torch.from_numpy(raw).view(self.dtype_of(name)).view(stored.shape)

    def rows(self, name: str, size: int) -> Iterator[Tensor]:
        """A matrix, at most `size` of its rows in memory at a time; no file is mapped."""
        stored = self.tensors[name]
        width = (stored.end - stored.begin) // stored.shape[0]
        for first in range(0, stored.shape[0], size):
            count = min(size, stored.shape[0] - first)
            at = stored.begin + first * width
            raw = np.fromfile(stored.file, np.uint8, count * width, offset=at)
            yield torch.from_numpy(raw).view(self.dtype_of(name)).view(count, *stored.shape[1:])

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of one tensor; `CheckpointError` for one that torch does not have."""
        stored = self.tensors[name]
        if stored.dtype not in _DTYPES:
            raise CheckpointError(
                f"{stored.file}: {name} is stored as {stored.dtype}, which is not read here"
            )
        return _DTYPES[stored.dtype]

    @property
    def has_weights(self) -> bool:
        """Whether there are weight files, whole or not; a plan needs none."""
        return any((self.folder / name).is_file() for name in (SINGLE, INDEX))

    @property
    def other_files(self) -> list[Path]:
        """The files beside the weights, which a conversion copies."""
        weights = self.files if self.has_weights else []
        return [file for file in visible_files(self.folder) if file not in weights]

    @cached_property
    def bytes(self) -> int:
        """Size of the weight files."""
        return sum(file.stat().st_size for file in self.files)

    def hashes(self) -> dict[str, str]:
        """SHA-256 of `config.json` and of every weight file, by file name."""
        return {file.name: sha256(file) for file in [self.folder / "config.json", *self.files]}


def _download(model: str) -> Path:
    try:
        return Path(
            snapshot_download(
                model, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
            )
        )
    except HFValidationError:
        raise CheckpointError(f"{model}: no such folder, and not a Hugging Face Hub id") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model}: no such folder, and the Hugging Face Hub does not give it ({reason})"
        ) from None


def sha256(file: Path) -> str:
    """Hex digest of a file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def copy_folder(source: Path, target: Path, *, skip: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Copy a model folder file by file; none appears before it is whole."""
    for file in visible_files(source):
        relative = file.relative_to(source)
        if str(relative) in skip:
            continue
        copy = target / relative
        copy.parent.mkdir(parents=True, exist_ok=True)
        with whole(copy) as part:
            shutil.copyfile(file, part)


def visible_files(folder: Path) -> Iterator[Path]:
    """Every file in a folder and below it, in order; what is hidden is left out."""
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.is_file() and not hidden:
            yield file


def outline(source: Path, target: Path) -> None:
    """Make a weight file with the header and the size of another; its tensors are still to be put in."""
    with source.open("rb") as stream:
        prefix = stream.read(8)
        header = stream.read(struct.unpack("<Q", prefix)[0])
    with target.open("wb") as made:
        made.write(prefix + header)
        made.truncate(source.stat().st_size)


def overwrite(tensor: StoredTensor, values: Tensor) -> None:
    """Replace the bytes of a stored tensor; `values` has its shape and dtype."""
    raw = values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    if raw.nbytes != tensor.end - tensor.begin:
        raise CheckpointError(
            f"{tensor.file}: {raw.nbytes} bytes do not replace {tensor.end - tensor.begin}"
        )
    with tensor.file.open("r+b") as stream:
        stream.seek(tensor.begin)
        stream.write(raw.data)
