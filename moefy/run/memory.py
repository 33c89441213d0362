"""Memory of this process: how much it took at most, how much there is, and giving back what is not used."""

import ctypes
import gc
import resource
import sys
from pathlib import Path

import psutil


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
