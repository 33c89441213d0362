"""Linear maps at the speed of memory while decoding on CPUs: opt in, for the projections beside the MLPs.

    moefy.native_linears(model)

With few tokens a linear map costs what reading its weights costs (docs/cpu.md). Every `nn.Linear` of the
model then computes up to `MOST` tokens by the native kernel, added up in fp32; more tokens, training, other
dtypes and what accelerate moves about stay with torch.
"""

from types import MethodType
from typing import TypeVar

from torch import Tensor, nn

from moefy_kernels.cpu.linear import linear

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
    own = self._parameters  # attributes of a module take longer to find, a hundred times a token
    return linear(x, own["weight"], own["bias"])  # type: ignore[arg-type]
