"""Where and in which dtype this machine runs a checkpoint best."""

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from moefy.models.checkpoint import Checkpoint
from moefy.run.computing import now
from moefy.run.memory import free_memory


def placement(checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """How this machine runs models best, as arguments of `load` and `load_dense`.

    As the caller asks (`moefy.run.computing`), else all GPUs where there are some, or in many processes each its own. On a CPU without arithmetic in 16 bits, which it would emulate
    fifty times slower, fp32. The layers of a `checkpoint` that memory cannot hold stay on disk until
    they run.
    """
    asked = now()
    found: dict[str, Any] = {}
    if asked.on_gpu:
        ranks = PartialState()
        own = asked.device or (ranks.device if ranks.num_processes > 1 else None)
        found["device_map"] = "auto" if own is None else {"": own}
    elif not _has_bf16():
        found["dtype"] = torch.float32
    if asked.dtype is not None:
        found["dtype"] = asked.dtype
    if not asked.on_gpu and checkpoint is not None and memory_of(checkpoint) > free_memory():
        found["device_map"] = {"": "disk"}
    return found


def memory_of(checkpoint: Checkpoint) -> int:
    """Bytes that the weights take where `placement` runs them on a CPU."""
    return (
        checkpoint.bytes * running_dtype(checkpoint).itemsize // stored_dtype(checkpoint).itemsize
    )


def running_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that `placement` runs a checkpoint in."""
    given: torch.dtype | None = placement().get("dtype")
    return given or stored_dtype(checkpoint)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most of a checkpoint's weights are stored in."""
    sizes: Counter[str] = Counter()
    first: dict[str, str] = {}
    for name, tensor in checkpoint.tensors.items():
        sizes[tensor.dtype] += tensor.end - tensor.begin
        first.setdefault(tensor.dtype, name)
    return checkpoint.dtype_of(first[sizes.most_common(1)[0][0]])


def _has_bf16() -> bool:
    flags = Path("/proc/cpuinfo")
    text = flags.read_text() if flags.exists() else ""
    return "avx512_bf16" in text or "amx_bf16" in text or " bf16" in text
