"""Compiled code that is kept: nothing runs that this user did not make, and damage is mended."""

import ctypes
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moefy_kernels.cpu import library, private, times

NAME = "avx2-0123456789abcdef"
CODE = b"\x7fELF code" * 500


@pytest.fixture
def folder(tmp_path) -> Path:
    return private.private_folder(tmp_path / "cache" / "native")


def kept(folder: Path, content: bytes = CODE) -> Path:
    with private.workplace(folder) as work:
        (work / "made.so").write_bytes(content)
        return private.keep(work / "made.so", folder, NAME)


def test_what_was_kept_is_found_whole_and_alone(folder):
    assert private.find(folder, NAME) is None
    file = kept(folder)
    assert private.find(folder, NAME) == file and file.read_bytes() == CODE
    assert list(folder.iterdir()) == [file]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert private.find(folder, NAME.replace("avx2", "avx512")) is None


def linked(file: Path) -> None:
    elsewhere = file.parent.parent / "elsewhere.so"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b"planted"),
        lambda file: file.write_bytes(CODE[: len(CODE) // 2]),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(CODE[:-1] + b"?"),
        lambda file: file.chmod(0o620),
        lambda file: file.chmod(0o602),
        linked,
        lambda file: file.rename(file.with_name(f"{NAME}-{'0' * 64}.so")),
    ],
    ids=["planted", "cut", "empty", "a byte", "group", "anyone", "link", "name"],
)
def test_what_is_not_as_it_was_kept_is_removed(folder, damage):
    damage(kept(folder))
    assert private.find(folder, NAME) is None
    assert list(folder.iterdir()) == []
    assert private.find(folder, NAME) is None and kept(folder) == private.find(folder, NAME)


def test_the_file_of_another_user_is_not_taken(folder, monkeypatch):
    file = kept(folder)
    real = os.fstat(0).st_uid
    monkeypatch.setattr(private, "_user", lambda: real + 1)
    assert private.find(folder, NAME) is None and not file.exists()


def test_a_folder_that_others_could_write_is_closed_and_emptied(folder):
    kept(folder)
    folder.chmod(0o770)
    private.private_folder(folder)
    assert list(folder.iterdir()) == [] and folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_another_user_can_change_is_refused(tmp_path, folder, monkeypatch):
    (tmp_path / "cache").chmod(0o777)
    with pytest.raises(OSError, match=r"written by anyone; name a folder .* XDG_CACHE_HOME"):
        private.private_folder(folder)
    (tmp_path / "cache").chmod(0o1777)
    private.private_folder(folder)
    monkeypatch.setattr(private, "_user", lambda: folder.stat().st_uid + 1)
    with pytest.raises(OSError, match=r"belongs to another user; name a folder"):
        private.private_folder(folder)


def test_the_cache_is_never_where_python_was_started(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert private.cache() == tmp_path / ".cache" / "moefy"
    monkeypatch.setenv("HOME", "here")
    assert private.cache().is_absolute() and private.cache().name == f"moefy-{os.geteuid()}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert private.cache() == tmp_path / "moefy"


@pytest.fixture
def compiled(monkeypatch):
    """Compiles nothing, and counts how often."""
    calls = []

    def fake(compiler, name, out):
        calls.append(name)
        out.write_bytes(CODE)
        return out

    monkeypatch.setattr(library, "_compile", fake)
    monkeypatch.setattr(library, "_run", lambda *command: "compiler 1\n")
    monkeypatch.setenv("CXX", sys.executable)
    return calls


def test_an_unwritable_cache_is_not_a_missing_compiler(tmp_path, compiled, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(private, "cache", lambda: tmp_path / "file")
    with pytest.warns(UserWarning, match="cannot be written") as seen:
        assert library.library.__wrapped__() is None
    (text,) = [str(one.message) for one in seen]
    assert str(tmp_path / "file") in text and "XDG_CACHE_HOME" in text
    assert "compiler" not in text and "Errno" not in text

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(private.tempfile, "TemporaryDirectory", full)
    with pytest.raises(OSError, match=r"cannot be written \(No space left on device\)"):
        library.build("avx2", tmp_path / "cache")


def test_what_cannot_be_loaded_says_so(tmp_path, compiled, monkeypatch):
    monkeypatch.setattr(private, "cache", lambda: tmp_path)
    with pytest.warns(UserWarning, match="noexec") as seen:
        assert library.library.__wrapped__() is None
    assert "Install a C++ compiler" not in str(seen[0].message)


def test_two_builds_at_once_leave_one_whole_file(tmp_path, compiled):
    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: library.build("avx2", tmp_path), range(8)))
    assert len(found) == 1 and set(tmp_path.iterdir()) == found and compiled
    count = len(compiled)
    found.pop().write_bytes(b"")
    assert library.build("avx2", tmp_path).read_bytes() == CODE and len(compiled) == count + 1


LOAD = "from moefy_kernels.cpu import library; print('loaded', library.library() is not None)"


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_planted_or_truncated_library_neither_runs_nor_kills(tmp_path):
    folder = tmp_path / "moefy" / "native"
    made = library.build(library.instruction_set(), folder)
    evil = tmp_path / "evil.cpp"
    evil.write_text('#include <cstdio>\n__attribute__((constructor)) void f() { puts("planted"); }')
    subprocess.run(["g++", "-shared", "-fPIC", evil, "-o", tmp_path / "evil.so"], check=True)
    whole = made.read_bytes()
    for content in ((tmp_path / "evil.so").read_bytes(), whole[: len(whole) // 3], b""):
        made.unlink()  # not written into: this process has the last one mapped
        made.write_bytes(content)
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", LOAD],
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (0, "loaded True\n"), done.stderr
        (again,) = folder.iterdir()
        assert ctypes.CDLL(str(again)).moefy_experts is not None


def test_damaged_times_are_as_good_as_none(tmp_path, monkeypatch):
    monkeypatch.setattr(times, "cache", lambda: tmp_path)
    for content in ("", "[]", '{"entries": [{"layer": 3}]}', "[" * 100_000, "\ud800"):
        times.calibration_file().write_bytes(content.encode(errors="surrogatepass"))
        times.calibration.cache_clear()
        with pytest.warns(UserWarning, match=r"times-\w+\.json: damaged .* moefy calibrate"):
            assert times.calibration() == []
    times.calibration.cache_clear()
