"""What every launch needs to know: whether kernels run here, strides, and how many programs fill a device."""

import functools
import os

import torch
from torch import Tensor

from moefy_kernels.expert_mlp import ExpertMlp

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def launches(x: Tensor) -> bool:
    """Whether Triton runs where this tensor lies: on a GPU, or anywhere under its interpreter."""
    return x.numel() > 0 and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def runs_kernels(x: Tensor) -> bool:
    """Whether a kernel computes with this tensor; otherwise its twin does."""
    return x.dtype in DTYPES and launches(x)


def strides(mlp: ExpertMlp) -> tuple[int, ...]:
    """Strides of up and gate `(E, F, D)`, then those over experts of up bias, gate bias and centre."""
    gate = (0, 0, 0) if mlp.gate_EFD is None else mlp.gate_EFD.stride()
    vectors = (mlp.up_bias_EF, mlp.gate_bias_EF, mlp.centre_EF)
    return (*mlp.up_EFD.stride(), *gate, *(0 if v is None else v.stride(0) for v in vectors))


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU (compute units); of the interpreter, a few."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits(device: torch.device, programs: int, blocks: int) -> int:
    """Parts to split a sum into, a power of two, so that four programs lie on every processor.

    `programs` is how many there are without splitting, `blocks` how many blocks the sum has.
    """
    wanted = 4 * processors(device) // max(programs, 1)
    most = min(wanted, blocks, 64)
    return 1 << max(0, most.bit_length() - 1)


def precision() -> str:
    """How products of fp32 matrices are computed: in TF32 where torch's own are, else exactly.

    torch is told so by `set_float32_matmul_precision`, `allow_tf32` or `fp32_precision`; the last
    alone may be read whichever of them was written.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
