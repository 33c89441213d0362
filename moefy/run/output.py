"""What a run writes: a file or a folder that appears under its name only when it is complete, and finished parts.

A part is JSON values, and tensors where it has any, kept so that the next run takes it up. Where its folder
serves many runs its file is named after everything that decides it: a run with other settings makes its own,
and what both need is computed once.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from moefy.errors import MoefyError, OutputError
from moefy.run.computing import now
from moefy.run.processes import ALONE, Processes
from moefy.run.reading import reading

NOTHING = 2**20
"""Bytes free on a disk that counts as full."""


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Where to write `file` meanwhile, beside it; it gets its name when the block ends without an error."""
    part = file.with_name(file.name + ".part")
    yield part
    part.replace(file)


def write_whole(file: Path, content: bytes | str) -> None:
    """Write a file that is never seen half written; text is UTF-8."""
    with whole(file) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def put_in_place(new: Path, place: Path, old: Path) -> None:
    """Rename the folder `new` to `place`; what lay there is `old` for a moment, and stays that in a run
    that is killed just then."""
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        place.replace(old)
    new.replace(place)
    shutil.rmtree(old, ignore_errors=True)


class OutputFolder:
    """A folder that appears under its name only when it is complete.

    Work goes on in a hidden folder beside it, which stays when a run is killed, so that the next
    one may resume. `fingerprint` says which run it belongs to.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.work = out.parent / f".{out.name}.moefy-unfinished"

    def check(self, *, overwrite: bool) -> None:
        """Raise `OutputError` where something lies there that nobody said to overwrite."""
        if self.out.exists() and not overwrite:
            raise OutputError(
                f"{self.out}: exists already; choose another name or pass --overwrite"
            )

    def begin(self, fingerprint: str, *, resume: bool, overwrite: bool) -> bool:
        """Make the work folder; True where an unfinished run is taken up.

        Raises `OutputError` where something is in the way that nobody said to overwrite.
        """
        self.check(overwrite=overwrite)
        stamp = self.work / "fingerprint"
        if self.work.exists():
            if resume:
                if not stamp.exists() or stamp.read_text() == fingerprint:
                    stamp.write_text(fingerprint)
                    return True
                raise OutputError(
                    f"{self.out}: the unfinished run was started with another model, recipe or "
                    "corpus; repeat those, or pass --overwrite to start anew"
                )
            if not overwrite:
                raise OutputError(
                    f"{self.out}: an unfinished run lies in {self.work.name}; pass --resume to "
                    "continue it or --overwrite to start anew"
                )
            shutil.rmtree(self.work)
        try:
            self.work.mkdir(parents=True)
        except OSError as error:
            raise OutputError(f"{self.out}: cannot be written ({error.strerror})") from None
        stamp.write_text(fingerprint)
        return False

    def need(self, size: int) -> None:
        """Raise `OutputError`, and leave no work behind, where the disk has less than `size` bytes free."""
        free = shutil.disk_usage(self.work).free
        if free < size:
            self.discard()
            raise OutputError(
                f"{self.out}: needs {size / 1e9:.2f} GB of disk, {free / 1e9:.2f} GB are free; "
                "free some or choose another place"
            )

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """Turn a disk that fills up meanwhile into an `OutputError`; what is done stays."""
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:
            if not self._is_full(error):
                raise
            raise OutputError(
                f"{self.out}: the disk is full; free some room and pass --resume, nothing is lost"
            ) from error

    def _is_full(self, error: Exception) -> bool:
        """Whether this is what is raised on a full disk: by Python, by safetensors, by torch."""
        codes = (errno.ENOSPC, errno.EDQUOT)
        if isinstance(error, OSError):
            return error.errno in codes
        if isinstance(error, SafetensorError):
            return any(f"os error {code}" in str(error) for code in codes)
        # torch's writer does not say why it failed; what it has written still fills the disk.
        return shutil.disk_usage(self.out.parent).free < NOTHING

    def discard(self) -> None:
        """Drop the work of a run that left nothing to go on with."""
        shutil.rmtree(self.work, ignore_errors=True)

    def commit(self, finished: Path) -> None:
        """Put the finished folder in its place by rename and drop the rest of the work."""
        put_in_place(finished, self.out, self.out.parent / f".{self.out.name}.moefy-old")
        shutil.rmtree(self.work, ignore_errors=True)


ANEW = "it is of an unfinished run; pass --overwrite to start anew"


def digest(decided: Any) -> str:
    """The stamp of JSON values: 64 hex digits that another run has only where all of them are the same."""
    return hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Stages:
    """Where finished parts lie; with no folder nothing is kept."""

    folder: Path | None
    decided_by: Any = None
    """JSON values that decide every part: model, texts, seeds, versions; None where the folder is of one run,
    as the work folder of an `OutputFolder` is."""
    processes: Processes = ALONE
    """Those that make parts together; the first keeps what `run` has made."""

    def run(self, name: str, settings: Any, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, or gave before with the same settings."""
        if self.folder is None:
            return make()
        if not self.processes.once(lambda: self.has(name, settings)):
            made = make()
            self.processes.once(lambda: self._keep(name, made, settings))
            return made
        part: dict[str, Any] = self.read(name, settings)
        return part

    def has(self, name: str, settings: Any = None) -> bool:
        """Whether this part is finished."""
        return self._file(name, settings).is_file()

    def read(self, name: str, settings: Any = None) -> Any:
        """The JSON values of a finished part."""
        file = self._file(name, settings)
        with reading(file, ANEW, OutputError):
            return json.loads(file.read_text(encoding="utf-8"))

    def tensors(self, name: str, settings: Any = None) -> dict[str, Tensor]:
        """The tensors of a finished part."""
        file = self._file(name, settings).with_suffix(".safetensors")
        with reading(file, ANEW, OutputError):
            return load_file(file)

    def keep(
        self,
        name: str,
        values: Any,
        tensors: Mapping[str, Tensor] | None = None,
        settings: Any = None,
    ) -> None:
        """Write a part; `name` may have a folder in it. Raises `OSError` where that fails."""
        file = self._file(name, settings)
        file.parent.mkdir(parents=True, exist_ok=True)
        if tensors is not None:
            file.with_suffix(".safetensors").write_bytes(save(dict(tensors)))
        # Last, and by rename: its presence says that the part is finished.
        write_whole(file, json.dumps(values))

    def _keep(self, name: str, made: dict[str, Any], settings: Any) -> None:
        try:
            self.keep(name, made, settings=settings)
        except OSError as error:
            raise MoefyError(
                f"{self._file(name, settings)}: cannot be written ({error.strerror}); finished parts are "
                "kept, run again"
            ) from None

    def _file(self, name: str, settings: Any) -> Path:
        assert self.folder is not None
        if self.decided_by is None and settings is None:
            return self.folder / f"{name}.json"
        decided = [self.decided_by, settings, *now().record()]
        return self.folder / f"{name}-{digest(decided)[:16]}.json"
