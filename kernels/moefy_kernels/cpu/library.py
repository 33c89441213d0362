"""The native library: built at first use by the system's compiler, kept, loaded once.

Its sources are compiled for the instruction set that torch reports for this machine, with the compiler's own
vector types (`experts.cpp`, `quantised.cpp`). The result is kept under a name made of everything that it depends
on, so that machines which share a home do not share instructions, and of its own content, which is checked
before it is loaded (`private.py`):

    $XDG_CACHE_HOME/moefy/native/<set>-<hash>-<content>.so        (`~/.cache` where it is not set)

`CXX` names another compiler, `ATEN_CPU_CAPABILITY=avx2` a smaller instruction set, for torch too. Where no
library can be built, or none loaded, `library()` is None, a warning says why once, and torch computes.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from moefy_kernels.cpu import private

Function = TypeVar("Function", bound=Callable[..., object])

SOURCES = tuple(Path(__file__).with_name(name) for name in ("experts.cpp", "quantised.cpp"))
HEADERS = tuple(Path(__file__).with_name(name) for name in ("rows.h", "integers.h"))
FLAGS = {
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "neon": (),
    "portable": (),
}
"""What each instruction set is asked for with; NEON is part of every 64-bit ARM."""
DOT_PRODUCTS = {
    "avx512": ("avx512_vnni", "-mavx512vnni"),
    "neon": ("asimddp", "-march=armv8.2-a+dotprod"),
}
"""What the CPU calls its products of whole numbers, which not all of a set have, and how they are asked for."""
COMMON = ("-O3", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The library for this machine, or None, with one warning, where it cannot be built."""
    try:
        return load(build(instruction_set(), private.cache() / "native"))
    except (OSError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"no native kernels on this CPU, torch computes instead: {error}", stacklevel=2
        )
        return None


def load(file: Path) -> ctypes.CDLL:
    """Load a library that `build` gave; `OSError`, with the remedy, where the system does not let it."""
    try:
        return ctypes.CDLL(str(file))
    except OSError as error:
        raise OSError(
            f"{error}; if the folder is mounted noexec, {private.REMEDY}, else delete the file"
        ) from None


def constant(function: Function) -> Function:
    """The same function, whose results `torch.compile` holds as constants while it traces."""
    held: Function = torch.compiler.assume_constant_result(function)
    return held


@constant
def available() -> bool:
    """Whether there is a library."""
    return library() is not None


def call(name: str, arguments: bytes) -> None:
    """Call a function of the library with the address of its packed `arguments`."""
    native = library()
    assert native is not None
    getattr(native, name)(arguments)


def instruction_set() -> str:
    """The largest of `FLAGS` that torch uses on this machine."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "neon"
    name = torch.backends.cpu.get_cpu_capability().lower()
    return name if name in ("avx512", "avx2") else "portable"


def flags(name: str) -> tuple[str, ...]:
    """What an instruction set is asked for with on this CPU."""
    feature, flag = DOT_PRODUCTS.get(name, ("", ""))
    cpuinfo = Path("/proc/cpuinfo")
    features = cpuinfo.read_text(encoding="utf-8").split() if feature and cpuinfo.exists() else []
    return (*FLAGS[name], flag) if feature in features else FLAGS[name]


@functools.cache
def vector_bytes() -> int:
    """Bytes of a vector of the library, which decide how it wants weights laid out; raises without one."""
    native = library()
    if native is None:
        raise ValueError("weights are packed for the native library, which is not there")
    return int(native.moefy_vector_bytes())


def build(name: str, folder: Path) -> Path:
    """The library for an instruction set, compiled unless a whole one is in the folder.

    Raises `OSError` without a compiler or where nothing can be kept, `SubprocessError` where the
    compiler fails; each says what to do.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None or shutil.which(compiler) is None:
        lacking = f"CXX={compiler} is no program here" if compiler else "no C++ compiler was found"
        raise OSError(f"{lacking}. Install a C++ compiler (such as g++) or name one in CXX")
    version = _run(compiler, "--version").split("\n")[0]
    key = hashlib.sha256(b"".join(file.read_bytes() for file in (*SOURCES, *HEADERS)))
    key.update(repr((version, COMMON, flags(name))).encode())
    folder, label = private.private_folder(folder), f"{name}-{key.hexdigest()[:16]}"
    kept = private.find(folder, label)
    if kept is None:
        # Renamed when it is whole: several processes may build at once.
        with private.workplace(folder) as work:
            kept = private.keep(_compile(compiler, name, work / "made.so"), folder, label)
    return kept


def _compile(compiler: str, name: str, out: Path) -> Path:
    command = (compiler, *COMMON, *flags(name), *map(str, SOURCES), "-o", str(out))
    try:
        # torch's own OpenMP is loaded already and has the same name, so that one pool serves both.
        _run(*command, "-fopenmp")
    except subprocess.SubprocessError:
        _run(*command)  # one thread: Apple's compiler comes without OpenMP
    return out


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise subprocess.SubprocessError(
            f"{command[0]} failed: {done.stderr.strip()[-400:]}. Name another C++ compiler in CXX"
        )
    return done.stdout
