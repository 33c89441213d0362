"""Sharded safetensors on disk: opened, checked, read and written one tensor at a time.

A converted checkpoint is its source with the neurons of some tensors in another order. Headers, names,
dtypes, shards and every file that holds no weights stay as they were: `outline` makes a weight file
that lacks nothing but its tensors, `overwrite` puts each of them in.

It knows nothing of layers, experts or recipes.
"""

import hashlib
import json
import math
import shutil
import struct
from collections.abc import Iterator, Set
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
from moefy.models.schema import is_inside
from moefy.run.folder import whole
from moefy.run.reading import read_json, reason

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

MOST_HEADER = 100_000_000
"""Bytes of the largest header; safetensors reads no larger one."""

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

    Raises `CheckpointError` where the file is cut short or its header is damaged: names of sizes that
    are no sizes, tensors that are not as long as their shape says, overlap, or leave gaps.
    """
    refuse_pointer(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, MOST_HEADER):
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found = {name: _stored(file, 8 + length, name, entry) for name, entry in header.items()}
        end = 8 + length
        for tensor in sorted(found.values(), key=lambda t: (t.begin, t.end)):
            if tensor.begin != end:
                raise ValueError(f"tensors overlap or leave a gap at byte {end}")
            end = tensor.end
        if end != size:
            raise ValueError(f"its header speaks of {end} bytes, the file has {size}")
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as error:
        raise CheckpointError(
            f"{file}: truncated or corrupt safetensors file ({reason(error)}); copy or download it again"
        ) from None
    return found


def _stored(file: Path, start: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    """One entry of a header; `ValueError` where it contradicts itself."""
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"{name}: sizes that are no sizes")
    if dtype in _DTYPES and math.prod(shape) * _DTYPES[dtype].itemsize != end - begin:
        raise ValueError(f"{name}: {end - begin} bytes for a {dtype} of shape {shape}")
    return StoredTensor(file, dtype, tuple(shape), start + begin, start + end)


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
        if not is_there(folder):
            folder = _download(str(model))
        return cls._of(folder)

    @classmethod
    def open_hub(
        cls, name: str, revision: str | None = None, *, local: bool = False
    ) -> "Checkpoint":
        """A Hub repository at one commit; with `local` only what was downloaded before."""
        return cls._opened(cls._of(_download(name, revision, local)))

    @classmethod
    def _of(cls, folder: Path) -> "Checkpoint":
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}: not a model folder; give the folder that holds config.json"
            )
        refuse_adapter(folder)
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise CheckpointError(f"{folder}: no config.json; is this a transformers model folder?")
        refuse_pointer(config_file)
        config = read_json(config_file)
        if not isinstance(config, dict):
            raise CheckpointError(f"{config_file}: must be keys and values; download it again")
        return cls(folder, config)

    @classmethod
    def open(cls, model: str | Path) -> "Checkpoint":
        """Like `open_config`, and the weight files are found and checked too."""
        return cls._opened(cls.open_config(model))

    @classmethod
    def _opened(cls, checkpoint: "Checkpoint") -> "Checkpoint":
        _ = checkpoint.tensors  # a damaged file is found now, not halfway
        return checkpoint

    def text_hashes(self) -> dict[str, str]:
        """SHA-256 of all that texts are read with: tokenizer, image processor, their settings."""
        kinds = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
        return {self._name(f): sha256(f) for f in self.other_files if f.suffix in kinds}

    def all_hashes(self) -> dict[str, str]:
        """What decides all that is computed of it, and so what a run may take up: weights and how texts are
        read."""
        return self.text_hashes() | self.hashes()

    @property
    def revision(self) -> str | None:
        """The commit of a folder that the Hub's cache holds; None for any other."""
        place = self.folder.absolute()
        return place.name if place.parent.name == "snapshots" else None

    @cached_property
    def _index(self) -> dict[str, str] | None:
        """The file of every tensor as the weight index says it; None where one file holds all.

        The order is that of transformers: what `config.json` names, one file, an index. Raises
        `CheckpointError` where one file and the index of others lie side by side, since other
        programs read the others.
        """
        named = self.config.get("transformers_weights")
        if named is not None and named not in (SINGLE, INDEX):
            raise CheckpointError(
                f"{self.folder}: config.json names {named!r} as its weights; rename that file to "
                f"{SINGLE} and take transformers_weights out"
            )
        index, single = self.folder / INDEX, self.folder / SINGLE
        if not index.is_file():
            return None
        found = read_json(index)
        wanted = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(wanted, dict) or not all(isinstance(v, str) for v in wanted.values()):
            raise CheckpointError(f"{index}: not a weight index; download it again")
        others = {*wanted.values()} - {SINGLE}
        if single.is_file() and others:
            raise CheckpointError(
                f"{self.folder}: holds {SINGLE} and an index of other files ({min(others)}), which may "
                "be two models; move away those that do not belong"
            )
        return wanted

    @cached_property
    def files(self) -> list[Path]:
        """The weight files, in order. Raises `CheckpointError` for one that lies outside of the folder."""
        if self._index is not None:
            names = sorted(set(self._index.values()))
            for name in names:
                if not is_inside(name):
                    raise CheckpointError(
                        f"{self.folder / INDEX}: names {name!r}, which is outside of the folder; "
                        "put all weights into it"
                    )
            missing = [name for name in names if not is_there(self.folder / name)]
            if missing:
                raise CheckpointError(
                    f"{self.folder}: {len(missing)} of {len(names)} shards missing, "
                    f"first {missing[0]}; download the rest"
                )
            return [inside(self.folder, self.folder / name) for name in names]
        if (self.folder / SINGLE).is_file():
            return [inside(self.folder, self.folder / SINGLE)]
        pickled = sorted(self.folder.glob("*.bin")) + sorted(self.folder.glob("*.pt*"))
        if pickled:
            raise CheckpointError(
                f"{self.folder}: only pickled weights ({pickled[0].name}), which can run code when "
                "opened; convert them once with transformers' save_pretrained, which writes safetensors"
            )
        raise CheckpointError(f"{self.folder}: no {SINGLE} and no {INDEX}")

    @property
    def weights(self) -> list[str]:
        """Every weight file by its name within the folder, sub-folders included."""
        return [self._name(file) for file in self.files]

    def _name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()

    @cached_property
    def tensors(self) -> dict[str, StoredTensor]:
        """Every stored tensor by its name on disk."""
        found: dict[str, StoredTensor] = {}
        for file in self.files:
            for name, tensor in read_header(file).items():
                if name in found:
                    raise CheckpointError(
                        f"{self.folder}: {name} is in {self._name(found[name].file)} and in "
                        f"{self._name(file)}; download the weights again"
                    )
                found[name] = tensor
        wanted = self._index or {}
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
        """SHA-256 of `config.json` and of every weight file, by name within the folder."""
        return {name: sha256(self.folder / name) for name in ("config.json", *self.weights)}


def inside(folder: Path, file: Path) -> Path:
    """The file, which is no link to somewhere else; the Hub's cache links to its own `blobs`."""
    home, real = folder.resolve(), file.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (real.is_relative_to(home) or real.is_relative_to(blobs)):
        raise CheckpointError(
            f"{file}: a link out of the folder, to {real}; copy that file, or link the whole folder"
        )
    return file


def is_there(path: Path) -> bool:
    """Whether a path exists; names that the file system does not take do not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _download(model: str, revision: str | None = None, local: bool = False) -> Path:
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                local_files_only=local,
                allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"],
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


def copy_folder(source: Path, target: Path, *, skip: Set[str] = frozenset()) -> None:
    """Copy a model folder file by file; none appears before it is whole.

    Raises `CheckpointError` for a link to something outside of it.
    """
    for file in visible_files(source):
        relative = file.relative_to(source)
        if relative.as_posix() in skip:
            continue
        inside(source, file)
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
