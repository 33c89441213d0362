"""A linear map of few tokens on CPUs, at the speed of memory: what decoding spends on projections.

Shapes: T tokens, D width, N rows.
"""

import ctypes

import torch
from torch import Tensor

from moefy_kernels.cpu.library import library


class _Arguments(ctypes.Structure):
    """The twin of `LinearArguments` in experts.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "width", "rows")),
        *((name, ctypes.c_int64) for name in ("stride", "is_bf16", "threads")),
        *((name, ctypes.c_void_p) for name in ("x", "w", "bias", "y")),
    )


def native_linear(x_TD: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`x W^T + b` `[T, N]` in the dtype of all three, added up in fp32; for what `serves` (`experts`)."""
    x_TD = x_TD.contiguous()
    y_TN = x_TD.new_empty(x_TD.shape[0], weight_ND.shape[0])
    arguments = _Arguments(
        tokens=x_TD.shape[0],
        width=x_TD.shape[1],
        rows=weight_ND.shape[0],
        stride=weight_ND.stride(0),
        is_bf16=x_TD.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        x=x_TD.data_ptr(),
        w=weight_ND.data_ptr(),
        bias=None if bias_N is None else bias_N.data_ptr(),
        y=y_TN.data_ptr(),
    )
    native = library()
    assert native is not None
    native.moefy_linear(ctypes.byref(arguments))
    return y_TN
