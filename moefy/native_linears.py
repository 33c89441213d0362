"""Linear maps at the speed of memory while decoding on CPUs: opt in, for the projections beside the MLPs.

    moefy.native_linears(model)

With few tokens a linear map costs what reading its weights costs (docs/cpu.md). Every `nn.Linear` of the model then computes up to `MOST` tokens by the native kernel, added
up in fp32; more tokens, training, other dtypes and what accelerate moves about stay with torch.

Shapes: T tokens, D width, N rows.
"""

from types import MethodType
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moefy_kernels.cpu.experts import serves
from moefy_kernels.cpu.linear import native_linear

MOST = 16
"""Tokens up to which reading the weights is what a linear map costs."""
Model = TypeVar("Model", bound=nn.Module)


def native_linears(model: Model, on: bool = True) -> Model:
    """Switch the native kernel on or off for every `nn.Linear` of `model`, which is given back.

    Where there is no compiler nothing changes but a warning (`moefy_kernels.cpu.library`).
    """
    for module in model.modules():
        # Subclasses compute something else, and a hook of accelerate has a forward of its own.
        if type(module) is nn.Linear and not hasattr(module, "_hf_hook"):
            if on:
                module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
            else:
                vars(module).pop("forward", None)
    return model


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    """What `nn.Linear` computes, in any shape `[..., D]`."""
    tokens = x.numel() // x.shape[-1]
    if 0 < tokens <= MOST and not torch.compiler.is_compiling() and _fits(self, x):
        y_TN = native_linear(x.reshape(tokens, -1), self.weight, self.bias)
        return y_TN.view(*x.shape[:-1], -1)
    return linear(x, self.weight, self.bias)


def _fits(module: nn.Linear, x: Tensor) -> bool:
    autocast = torch.is_autocast_enabled("cpu")
    bias = module.bias
    same = bias is None or (
        bias.dtype == x.dtype and not (torch.is_grad_enabled() and bias.requires_grad)
    )
    return same and not autocast and serves(x, module.weight)
