"""This machine and this process: versions, hardware, memory, bytes read and written."""

import ctypes
import gc
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import moefy


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


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage begins, on Linux, with what the process held that started this one.
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in lines:
            return int(lines["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory() -> int:
    """Bytes of memory that can be had without swapping; what the file cache holds counts as free."""
    return int(psutil.virtual_memory().available)


def give_back() -> None:
    """Return to the system what was freed.

    The C library of Linux keeps pieces of up to 32 MB for later, and fragments of them add up from
    layer to layer to more than a layer takes.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # other C libraries than glibc have none
            trim(0)


LARGE = 4 * 2**20
"""Bytes of a block that is mapped by itself."""
_M_MMAP_THRESHOLD = -3
"""The number that `malloc.h` of glibc gives the setting."""


def map_large_blocks() -> None:
    """From now on large blocks of memory go back to the system when they are freed.

    The C library of Linux raises the size from which they do to 32 MB as it sees them freed; what is
    smaller stays with the process, and between small blocks it is not even found again.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:  # other C libraries than glibc have none
            mallopt(_M_MMAP_THRESHOLD, LARGE)
