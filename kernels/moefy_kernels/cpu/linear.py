"""A linear map of few tokens on CPUs, at the speed of memory: what decoding spends on projections.

Shapes: T tokens, D width, N rows.
"""

import struct

import torch
from torch import Tensor
from torch.nn import functional

from moefy_kernels.cpu.experts import OPERATIONS, address, operation, serves
from moefy_kernels.cpu.library import call

MOST = 16
"""Tokens up to which reading the weights is what a linear map costs."""
_ARGUMENTS = struct.Struct("6q4P")
"""The twin of `LinearArguments` in experts.cpp."""


def linear(x: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, by the native kernel where that is faster.

    Which is for up to `MOST` tokens in any shape `[..., D]`, without gradients and autocast, where
    `serves` agrees (`experts`).
    """
    trains = bias_N is not None and torch.is_grad_enabled() and bias_N.requires_grad
    if (
        not 0 < x.numel() <= MOST * x.shape[-1]
        or torch.is_autocast_enabled("cpu")
        or (bias_N is not None and bias_N.dtype != x.dtype)
        or trains
        or not serves(x, weight_ND)
    ):
        return functional.linear(x, weight_ND, bias_N)
    run = OPERATIONS.native_linear if torch.compiler.is_compiling() else native_linear
    return run(x, weight_ND, bias_N)


def native_linear(x: Tensor, weight_ND: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`x W^T + b` `[..., N]` in the dtype of all three, added up in fp32; for what `serves` (`experts`)."""
    x = x.contiguous()
    rows, width = weight_ND.shape
    y = x.new_empty((*x.shape[:-1], rows))
    arguments = _ARGUMENTS.pack(
        x.numel() // width,
        width,
        rows,
        weight_ND.stride(0),
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
        *map(address, (x, weight_ND, bias_N, y)),
    )
    call("moefy_linear", arguments)
    return y


operation(native_linear, lambda x, weight_ND, *_: x.new_empty((*x.shape[:-1], len(weight_ND))))
