"""Where and with what a number was made."""

import os
import platform
import time
from pathlib import Path
from typing import Any

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
