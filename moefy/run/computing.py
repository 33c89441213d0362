"""On what this process computes: device, dtype and documents run together as the caller of a verb asks; the machine.

    @asked
    def inspect(model, *, device=None, dtype=None, batch_size=None): ...

What is asked for holds for all that is loaded and run in the call (`computing`); what is not is the machine's
choice: `experts.placement`, `data.make_batches` and `run.processes` look here. `versions` and `machine` are what
records say of where and with what a number was made.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import transformers

import moefy
from moefy.errors import MoefyError, unknown_choice
from moefy.run.arguments import check_arguments

P = ParamSpec("P")
T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ASKED = ("device", "dtype", "batch_size")


@dataclass(frozen=True)
class Computing:
    """None is the machine's choice."""

    device: torch.device | None = None
    dtype: torch.dtype | None = None
    batch_size: int | None = None
    """Most documents that run together."""

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes."""
        return torch.cuda.is_available() and self.where.type == "cuda"

    @property
    def where(self) -> torch.device:
        """The device of what is not spread over several."""
        return self.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def record(self) -> list[str]:
        """What was asked for, as JSON values; it decides the last bits of what comes out."""
        return [f"{name}={value}" for name, value in vars(self).items() if value is not None]


_MACHINE = Computing()
_NOW: ContextVar[Computing] = ContextVar("computing", default=_MACHINE)


def now() -> Computing:
    """What has been asked for."""
    return _NOW.get()


@contextmanager
def computing(
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    batch_size: int | None = None,
) -> Iterator[None]:
    """Compute so in the block. Raises `MoefyError` for what this machine or torch does not have."""
    given: dict[str, Any] = {
        "device": None if device is None else _device(str(device)),
        "dtype": _dtype(dtype) if isinstance(dtype, str) else dtype,
        "batch_size": batch_size,
    }
    if batch_size is not None and batch_size < 1:
        raise MoefyError(f"--batch-size {batch_size}: expected 1 or more documents")
    token = _NOW.set(replace(now(), **{k: v for k, v in given.items() if v is not None}))
    try:
        yield
    finally:
        _NOW.reset(token)


def asked(run: Callable[P, T]) -> Callable[P, T]:
    """A function whose arguments `device`, `dtype` and `batch_size`, as many as it has, are what it computes on;
    all of its arguments are `checked`."""

    @wraps(run)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        check_arguments(run, args, kwargs)
        given: dict[str, Any] = {name: kwargs[name] for name in ASKED if name in kwargs}
        with computing(**given):
            return run(*args, **kwargs)

    return wrapped


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise MoefyError(f"--device {name}: expected cpu, cuda or cuda:1") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise MoefyError(f"--device {name}: this machine has {count or 'no'} GPU(s) for torch")
    return device


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise MoefyError(unknown_choice("dtype", name, DTYPES))
    return DTYPES[name]


def versions() -> dict[str, str]:
    """Versions that decide the bytes of an artefact."""
    return {
        "moefy": moefy.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def machine() -> dict[str, Any]:
    """What a record says of the machine and the moment it was made."""
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "instructions": instructions(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def instructions() -> str:
    """What torch and oneDNN compute with on this CPU: their limits where set, and what bf16 has beyond them."""
    found = [torch.backends.cpu.get_cpu_capability()]
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    known = {"AVX512-BF16": "_is_avx512_bf16_supported", "AMX": "_is_amx_tile_supported"}
    for name, ask in known.items():
        asked = getattr(torch.cpu, ask, None)  # releases differ in which of them they have
        if asked is not None and asked():
            found.append(name)
    return ", ".join(found) + (f"; ONEDNN_MAX_CPU_ISA={limit}" if limit else "")


def read_and_written() -> tuple[int, int] | None:
    """Bytes that this process has read and written by system calls so far; None where nobody counts."""
    counts = Path("/proc/self/io")
    if not counts.exists():
        return None
    lines = dict(line.split(": ") for line in counts.read_text().splitlines())
    return int(lines["rchar"]), int(lines["wchar"])
