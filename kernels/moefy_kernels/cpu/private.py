"""Compiled code that is kept between runs, in a folder that this user alone can write.

What is loaded here runs with all rights of the user, so a file is opened only if

- the folder belongs to this user and nobody else may write it, nor swap it for another one above it;
- the file is a plain one of this user that nobody else may write;
- its content has the SHA-256 that its name ends in: neither cut short, emptied nor altered.

Anything else is removed and made again. A file gets its name when it is whole and on the disk.
"""

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_OTHERS = stat.S_IWGRP | stat.S_IWOTH
REMEDY = "name a folder of your own in XDG_CACHE_HOME"


def cache() -> Path:
    """The folder of what is kept between runs, never one relative to where Python was started."""
    homes = [Path(os.environ.get("XDG_CACHE_HOME", ""))]
    with contextlib.suppress(RuntimeError):  # a user without a home
        homes.append(Path.home() / ".cache")
    found = next((home for home in homes if home.is_absolute()), None)
    return found / "moefy" if found else Path(tempfile.gettempdir()) / f"moefy-{_user()}"


def private_folder(folder: Path) -> Path:
    """Make the folder where it is missing; gives its real path.

    One of this user's that others may write is closed to them, and what lay in it is dropped. Raises
    `OSError`, with the remedy, where it cannot be written or another user may change what is in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = folder.resolve(strict=True)
        state = folder.stat()
        for above in folder.parents:
            mode = above.stat().st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                raise OSError(
                    f"{above}, above the cache {folder}, can be written by anyone; {REMEDY}"
                )
        if state.st_uid != _user():
            raise OSError(f"the cache {folder} belongs to another user; {REMEDY}")
        if state.st_mode & _OTHERS:
            folder.chmod(0o700)
            for file in folder.iterdir():
                discard(file)
    except OSError as error:
        if error.strerror is None:
            raise
        raise _unwritable(folder, error) from error
    return folder


def find(folder: Path, name: str) -> Path | None:
    """The file that was kept under this name, if it may be used; whatever may not is removed."""
    for file in sorted(folder.glob(f"{name}-*.so")):
        if _usable(file):
            return file
        discard(file)
    return None


@contextlib.contextmanager
def workplace(folder: Path) -> Iterator[Path]:
    """A folder inside this one to make a file in; it is gone afterwards."""
    try:
        work = tempfile.TemporaryDirectory(dir=folder)
    except OSError as error:
        raise _unwritable(folder, error) from error
    with work as name:
        yield Path(name)


def keep(made: Path, folder: Path, name: str) -> Path:
    """Move a finished file to where `find` looks for this name; gives its place.

    Raises `OSError`, with the remedy, where it cannot be written.
    """
    try:
        made.chmod(0o700)
        with made.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        kept = made.replace(folder / f"{name}-{digest}.so")
        with contextlib.suppress(OSError):  # folders cannot be opened, or not be synced, everywhere
            above = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(above)
            finally:
                os.close(above)
    except OSError as error:
        raise _unwritable(folder, error) from error
    return kept


def _unwritable(folder: Path, error: OSError) -> OSError:
    return OSError(f"the cache {folder} cannot be written ({error.strerror}); {REMEDY}")


def discard(file: Path) -> None:
    """Remove a file, if it is one and still there; several processes may do so at once."""
    with contextlib.suppress(OSError):
        file.unlink()


def _usable(file: Path) -> bool:
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(descriptor, "rb") as stream:
            state = os.fstat(descriptor)
            whose = state.st_uid == _user() and not state.st_mode & _OTHERS
            if not stat.S_ISREG(state.st_mode) or not whose:
                return False
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:
        return False
    return file.stem.rpartition("-")[2] == digest


def _user() -> int:
    """The number of this user; on systems without, 0, which is what files have there."""
    return os.geteuid() if hasattr(os, "geteuid") else 0
