"""The expert MLP on CPUs, for any number of tokens, in fp32 and bf16.

    y[t] = sum_e weight[t, e] sum_f (act(s_f x + a_f) (u_f x + c_f) - centre_f) d_f + bias

with `f` over the neurons of expert `e`; without a gate the factor in the middle is not there. Weights are
read where they are, by the tokens that chose them, and everything is added up in fp32. The result does not
depend on the number of threads. `experts.cpp` says how.

Shapes: T tokens, D width, N neurons, E experts.
"""

import ctypes

import torch
from torch import Tensor

from moefy_kernels.cpu.library import library
from moefy_kernels.expert_mlp import ACTIVATIONS

DTYPES = (torch.float32, torch.bfloat16)


class _Arguments(ctypes.Structure):
    """The twin of `Arguments` in experts.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "width", "experts", "size")),
        *((name, ctypes.c_int64) for name in ("activation", "is_bf16", "threads")),
        *((name, ctypes.c_void_p) for name in ("x", "weight", "selecting", "up", "down")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("selecting", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("active", "selecting_bias", "up_bias", "centre")),
        *((name, ctypes.c_void_p) for name in ("down_bias", "y")),
    )


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
    run = _operation if torch.compiler.is_compiling() else _run
    matrices = (down_ND, selecting_ND, up_ND)
    vectors = (active_TN, selecting_bias_N, up_bias_N, centre_N, down_bias_D)
    return run(x_TD, weight_TE, *matrices, *vectors, activation)


def serves(x_TD: Tensor, *matrices: Tensor | None) -> bool:
    """Whether the library is there and computes with these: see `native_experts`."""
    given = [m for m in matrices if m is not None]
    return (
        x_TD.device.type == "cpu"
        and x_TD.dtype in DTYPES
        and all(m.dtype == x_TD.dtype and m.stride(-1) == 1 for m in given)
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (x_TD, *given)))
        and library() is not None
    )


def _run(
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
    matrices = {"selecting": selecting_ND, "up": up_ND, "down": down_ND}
    if not serves(x_TD, *matrices.values()) or (selecting_ND is None) == (active_TN is None):
        raise ValueError(
            "native_experts takes CPU tensors of one dtype, fp32 or bf16, rows in one piece, no gradients, "
            f"and either selecting_ND or active_TN: got {x_TD.dtype} on {x_TD.device}, matrices "
            f"{[None if m is None else (m.dtype, tuple(m.shape), m.stride()) for m in matrices.values()]}"
        )
    x_TD, weight_TE = x_TD.contiguous(), weight_TE.to(torch.float32).contiguous()
    vectors = {
        "active": active_TN,
        "selecting_bias": selecting_bias_N,
        "up_bias": up_bias_N,
        "centre": centre_N,
        "down_bias": down_bias_D,
    }
    held = {
        name: None if value is None else value.to(x_TD.dtype).contiguous()
        for name, value in vectors.items()
    }
    y_TD = torch.empty_like(x_TD)
    experts = weight_TE.shape[1]
    arguments = _Arguments(
        tokens=x_TD.shape[0],
        width=x_TD.shape[1],
        experts=experts,
        size=down_ND.shape[0] // experts,
        activation=ACTIVATIONS.index(activation),
        is_bf16=x_TD.dtype == torch.bfloat16,
        threads=torch.get_num_threads(),
        x=x_TD.data_ptr(),
        weight=weight_TE.data_ptr(),
        y=y_TD.data_ptr(),
        **{name: None if m is None else m.data_ptr() for name, m in (matrices | held).items()},
        **{f"{name}_stride": 0 if m is None else m.stride(0) for name, m in matrices.items()},
    )
    native = library()
    assert native is not None
    native.moefy_experts(ctypes.byref(arguments))
    return y_TD


_operation = torch.library.custom_op("moefy::native_experts", _run, mutates_args=())


@_operation.register_fake
def _(x_TD: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x_TD)
