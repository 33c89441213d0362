"""The expert MLP on CPUs, for any number of tokens, in fp32 and bf16.

    y[t] = sum_e weight[t, e] sum_f (act(s_f x + a_f) (u_f x + c_f) - centre_f) d_f + bias

with `f` over the neurons of expert `e`; without a gate the factor in the middle is not there. Weights are
read where they are, by the tokens that chose them, and everything is added up in fp32. The result does not
depend on the number of threads. `experts.cpp` says how.

Shapes: T tokens, D width, N neurons, E experts.
"""

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from moefy_kernels.cpu.library import available, call
from moefy_kernels.expert_mlp import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16)
_CALL, _LAYER = struct.Struct("2q4P"), struct.Struct("5q3P3q4P")
"""The two halves of `Arguments` in experts.cpp."""


def native_experts(
    x_TD: Tensor,
    weight_TE: Tensor,
    down_ND: Tensor,
    activation: str,
    selecting_ND: Tensor | None = None,
    up_ND: Tensor | None = None,
    *,
    active_TN: Tensor | None = None,
    selecting_bias_N: Tensor | None = None,
    up_bias_N: Tensor | None = None,
    centre_N: Tensor | None = None,
    down_bias_D: Tensor | None = None,
) -> Tensor:
    """Output `[T, D]`; a token whose weight of an expert is 0 (or False) does not run it.

    `selecting_ND` is the gate, or the only projection of an MLP without one, whose `up_ND` is None;
    `active_TN` stands for it where the activation is known already. Raises `ValueError` for what
    `serves` refuses.
    """
    run = OPERATIONS.native_experts if torch.compiler.is_compiling() else _native_experts
    matrices = (down_ND, selecting_ND, up_ND)
    vectors = (active_TN, selecting_bias_N, up_bias_N, centre_N, down_bias_D)
    return run(x_TD, weight_TE, *matrices, *vectors, activation)


def serves(x_TD: Tensor, *matrices: Tensor | None) -> bool:
    """Whether the library is there and computes with these: see `native_experts`."""
    dtype, trains = x_TD.dtype, torch.is_grad_enabled()
    if not x_TD.is_cpu or dtype not in DTYPES or (trains and x_TD.requires_grad):
        return False
    for matrix in matrices:
        if matrix is not None and (
            matrix.dtype != dtype
            or matrix.stride(-1) != 1
            or not matrix.is_cpu
            or (trains and matrix.requires_grad)
        ):
            return False
    return available()


def _native_experts(
    x_TD: Tensor,
    weight_TE: Tensor,
    down_ND: Tensor,
    selecting_ND: Tensor | None,
    up_ND: Tensor | None,
    active_TN: Tensor | None,
    selecting_bias_N: Tensor | None,
    up_bias_N: Tensor | None,
    centre_N: Tensor | None,
    down_bias_D: Tensor | None,
    activation: str,
) -> Tensor:
    matrices = (selecting_ND, up_ND, down_ND)
    if not serves(x_TD, *matrices) or (selecting_ND is None) == (active_TN is None):
        raise ValueError(
            "native_experts takes CPU tensors of one dtype, fp32 or bf16, rows in one piece, no gradients, "
            f"and either selecting_ND or active_TN: got {x_TD.dtype} on {x_TD.device}, matrices "
            f"{[None if m is None else (m.dtype, tuple(m.shape), m.stride()) for m in matrices]}"
        )
    x_TD, weight_TE = x_TD.contiguous(), weight_TE.to(torch.float32).contiguous()
    # Copies have to live until the call is over.
    vectors = [
        None if vector is None else vector.to(x_TD.dtype).contiguous()
        for vector in (active_TN, selecting_bias_N, up_bias_N, centre_N, down_bias_D)
    ]
    active_TN, *rest = vectors
    layer = described(weight_TE.shape[1], activation, down_ND, selecting_ND, up_ND, *rest)
    return called(layer, x_TD, weight_TE, active_TN)


def described(
    experts: int,
    activation: str,
    down_ND: Tensor,
    selecting_ND: Tensor | None,
    up_ND: Tensor | None,
    *vectors: Tensor | None,
) -> bytes:
    """What is the same in every call for a layer: it holds as long as its tensors stay where they are.

    `vectors` are the biases of `selecting_ND` and `up_ND`, the centre and the bias of the output, in one
    piece and of the dtype of the matrices.
    """
    matrices = (selecting_ND, up_ND, down_ND)
    neurons, width = down_ND.shape
    return _LAYER.pack(
        width,
        experts,
        neurons // experts,
        ACTIVATIONS.index(activation),
        down_ND.dtype == torch.bfloat16,
        *map(address, matrices),
        *(0 if matrix is None else matrix.stride(0) for matrix in matrices),
        *map(address, vectors),
    )


def called(
    layer: bytes, x_TD: Tensor, weight_TE: Tensor, active_TN: Tensor | None = None
) -> Tensor:
    """`native_experts` of a layer that was `described`: all in one piece, the weights of experts in fp32."""
    y_TD = torch.empty_like(x_TD)
    places = map(address, (x_TD, weight_TE, active_TN, y_TD))
    call("moefy_experts", _CALL.pack(len(x_TD), torch.get_num_threads(), *places) + layer)
    return y_TD


def address(value: Tensor | None) -> int:
    """Where a tensor lies, for C."""
    return 0 if value is None else value.data_ptr()


def operation(function: Callable[..., Tensor], shaped: Callable[..., Tensor]) -> None:
    """Make a function of CPU tensors one of `OPERATIONS`, under its own name: what `torch.compile` calls.

    `shaped` gives an empty output. Nothing is between the graph and the function, where
    `torch.library.custom_op` puts several calls of Python that decoding would pay for in every layer.
    """
    name = function.__name__.removeprefix("_")
    _LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    _LIBRARY.impl(name, function, "CPU")
    torch.library.register_fake(f"moefy::{name}", shaped, lib=_LIBRARY)


_LIBRARY = torch.library.Library("moefy", "FRAGMENT")
OPERATIONS = torch.ops.moefy
operation(_native_experts, lambda x_TD, *_: torch.empty_like(x_TD))
