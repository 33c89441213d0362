"""What a run writes, a file or a folder: it appears under its name only when it is complete.

A folder that a run has written lists its files in `MARK`. `--overwrite` deletes nothing else: a folder that holds
a file which is not in the list is refused by that file's name.
"""

import errno
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from safetensors import SafetensorError

from moefy.errors import OutputError

NOTHING = 2**20
"""Bytes free on a disk that counts as full."""
MARK = ".moefy-files.json"
"""In a finished folder: the files that the run wrote there."""
GGUF = b"GGUF"
"""What the one kind of file begins with that `--overwrite` replaces."""
_RECORDS = (b'{"kind": "', b'{\n "kind": "')
_REPORT = (
    b'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta '
    b"http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; script-src 'sha256-"
)
"""What records and reports begin with, which the next one of the same name replaces unasked."""


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Where to write `file` meanwhile, beside it; it gets its name when the block ends without an error."""
    part = file.with_name(file.name + ".part")
    yield part
    to_disk(part)
    part.replace(file)


def write_whole(file: Path, content: bytes | str) -> None:
    """Write a file that is never seen half written; text is UTF-8."""
    with whole(file) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def to_disk(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk before anything else is written there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def put_in_place(new: Path, place: Path, old: Path) -> None:
    """Rename the folder `new` to `place`, all of it on the disk; what lay there is `old` for a moment.

    A run that is killed just then leaves it so: `restored` takes it back.
    """
    for folder, _, files in os.walk(new):
        for name in files:
            to_disk(Path(folder, name))
        to_disk(Path(folder))
    if place.exists():
        shutil.rmtree(old, ignore_errors=True)
        place.replace(old)
    new.replace(place)
    to_disk(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def restored(place: Path, old: Path) -> None:
    """End what a run began that was killed within `put_in_place`: take `old` back, or drop it."""
    if old.exists() and not place.exists():
        old.replace(place)
    shutil.rmtree(old, ignore_errors=True)


def refuse_inside(out: Path, source: Path) -> None:
    """Raise `OutputError` where `out` is the folder `source` or lies in it, by whatever name or link."""
    resolved = out.resolve()
    for folder in (resolved, *resolved.parents):
        if folder.exists() and source.exists() and folder.samefile(source):
            raise OutputError(
                f"{out}: is {'' if folder == resolved else 'in '}{source}, which is read; choose a "
                "place outside of it"
            )


def refuse_stranger(file: Path) -> None:
    """Raise `OutputError` where something lies at `file` that is neither empty nor a record or a report."""
    if not file.exists():
        return
    if not file.is_file():
        raise OutputError(f"{file}: is no file; choose another name")
    with file.open("rb") as stream:
        start = stream.read(len(_REPORT))
    if start and not start.startswith((*_RECORDS, _REPORT)):
        raise OutputError(
            f"{file}: no record or report of moefy, so it is not replaced; choose another name, or move it away"
        )


class OutputFolder:
    """A folder that appears under its name only when it is complete.

    Work goes on in a hidden folder beside it, which stays when a run is killed, so that the next
    one may resume. `fingerprint` says which run it belongs to; `owner` is locked by the run that is
    at work, wherever the file system has locks.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        try:
            self.place = out.resolve()
        except (OSError, RuntimeError) as error:  # a circle of links
            raise OutputError(_unwritable(out, error)) from None
        self.work = self.place.parent / f".{self.place.name}.moefy-unfinished"
        self._old = self.place.parent / f".{self.place.name}.moefy-old"
        self._lock: IO[str] | None = None
        self._overwrite = False

    def apart_from(self, *sources: str | Path) -> None:
        """Raise `OutputError` where this is equal to, inside or around a folder that is read.

        Names of the Hub are no folders.
        """
        for source in (Path(source) for source in sources):
            with self._writable():
                if not source.exists():
                    continue
                refuse_inside(self.out, source)
            links = (
                [file for file in source.iterdir() if file.is_symlink()] if source.is_dir() else []
            )
            for read in (source, *links):
                above = (read.resolve(), *read.resolve().parents)
                for place in (self.place, self.work, self._old):
                    if place.exists() and any(place.samefile(one) for one in above if one.exists()):
                        raise OutputError(
                            f"{self.out}: holds {read}, which is read; choose a place beside it"
                        )

    def check(self, *, overwrite: bool) -> None:
        """Raise `OutputError` where something lies there that nobody said to overwrite, or that no run wrote."""
        with self._writable():
            if self._old.exists() and self._held() is None:
                restored(self.place, self._old)
            if not self.place.exists():
                return
        if not overwrite:
            raise OutputError(
                f"{self.out}: exists already; choose another name or pass --overwrite"
            )
        stranger = self._stranger()
        if stranger is not None:
            raise OutputError(
                f"{self.out}: holds {stranger}, which no run of moefy wrote there, so --overwrite does "
                "not delete it; choose another name, or move that away"
            )

    def _stranger(self) -> str | None:
        """Something there that no run wrote, if anything."""
        if self.place.is_file():
            with self.place.open("rb") as stream:
                return None if stream.read(len(GGUF)) == GGUF else "a file of another kind"
        try:
            known = set(json.loads((self.place / MARK).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            known = set()
        return next((name for name in _files(self.place) if name not in known | {MARK}), None)

    def begin(self, fingerprint: str, *, resume: bool, overwrite: bool) -> bool:
        """Make the work folder; True where an unfinished run is taken up.

        Raises `OutputError` where something is in the way that nobody said to overwrite, or another run is
        at work.
        """
        with self._writable():
            self._take()
        self._overwrite = overwrite
        try:
            self.check(overwrite=overwrite)
            return self._taken_up(fingerprint, resume=resume, overwrite=overwrite)
        except BaseException:
            self.release()
            raise

    def _taken_up(self, fingerprint: str, *, resume: bool, overwrite: bool) -> bool:
        stamp = self.work / "fingerprint"
        # It goes first and comes last: without it there is nothing to take up.
        if stamp.exists():
            if resume:
                if stamp.read_text() == fingerprint:
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
        self._empty()
        with self._writable():
            write_whole(stamp, fingerprint)
        return False

    def _take(self) -> None:
        """Make the work folder and lock it; the lock ends with this process, however it ends."""
        while self._lock is None:
            self.work.mkdir(parents=True, exist_ok=True)
            try:
                lock = (self.work / "owner").open("a+", encoding="utf-8")
            except FileNotFoundError:
                continue  # who had it has finished just now
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f"{self.out}: another run is writing it ({self._held()}); wait until it has ended, "
                    "or choose another name"
                ) from None
            except OSError:
                pass  # this file system has no locks
            if _same(lock, self.work / "owner"):
                lock.truncate(0)
                lock.write(f"process {os.getpid()} on {socket.gethostname()}")
                lock.flush()
                self._lock = lock

    def _held(self) -> str | None:
        """Who else is at work there, if anyone."""
        owner = self.work / "owner"
        if self._lock is not None or not owner.exists():
            return None
        with owner.open("r+", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return lock.read() or "it has just begun"
            except OSError:
                pass
        return None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs away while files are put into the folder itself.

        Where nothing may be written beside it there is no lock.
        """
        if not self.place.is_dir() or os.access(self.place.parent, os.W_OK):
            with self._writable():
                self._take()
        try:
            yield
        finally:
            self.release()

    def release(self) -> None:
        """Let another run have the folder; an empty work folder goes."""
        if self._lock is None:
            return
        if self.work.exists() and [p.name for p in self.work.iterdir()] == ["owner"]:
            self._remove()
        self._lock.close()
        self._lock = None

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
        return shutil.disk_usage(self.place.parent).free < NOTHING

    @contextmanager
    def _writable(self) -> Iterator[None]:
        """Turn a name that is too long, a folder that may not be written and the like into an `OutputError`."""
        try:
            yield
        except OSError as error:
            raise OutputError(_unwritable(self.out, error)) from None

    def discard(self) -> None:
        """Drop the work of a run that left nothing to go on with."""
        self._empty()
        self._remove()
        self.release()

    def commit(self, finished: Path) -> None:
        """Put the finished folder in its place by rename and drop the rest of the work.

        Raises `OutputError`, and the work stays, where somebody has put a file there meanwhile.
        """
        self.check(overwrite=self._overwrite)
        (finished / MARK).unlink(missing_ok=True)
        write_whole(finished / MARK, json.dumps(_files(finished), ensure_ascii=False, indent=1))
        put_in_place(finished, self.place, self._old)
        self.discard()

    def _empty(self) -> None:
        """Drop all work, the stamp first, so that what is half gone is not taken up."""
        (self.work / "fingerprint").unlink(missing_ok=True)
        for path in self.work.iterdir() if self.work.exists() else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != "owner":
                path.unlink(missing_ok=True)

    def _remove(self) -> None:
        """Remove the empty work folder; another run may have come into it meanwhile."""
        (self.work / "owner").unlink(missing_ok=True)
        try:
            self.work.rmdir()
        except OSError:
            return


def _files(folder: Path) -> list[str]:
    """All files and links in a folder and below it, in order."""
    found = []
    for root, folders, files in os.walk(folder):
        links = [name for name in folders if Path(root, name).is_symlink()]
        found += [Path(root, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def _same(lock: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _unwritable(out: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or error
    return f"{out}: cannot be written ({reason}); choose another place"
