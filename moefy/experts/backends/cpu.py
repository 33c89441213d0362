"""The native CPU kernels as a backend, for one token after the other, and for linear maps.

    moefy.native_linears(model)      # opt in: the projections beside the MLPs

With few tokens a linear map costs what reading its weights costs (docs/cpu.md). Every `nn.Linear` of the model
then computes up to `MOST` tokens by the native kernel, added up in fp32; more tokens, training, other dtypes and
what accelerate moves about stay with torch.

Shapes: T tokens, D width, E experts.
"""

from collections.abc import Iterable
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moefy.experts.backends.base import ACTIVATIONS, Request
from moefy.models.mlp import DecidedMlp, DenseMlp
from moefy_kernels import ExpertWeights
from moefy_kernels.cpu.experts import called, described, native_experts
from moefy_kernels.cpu.experts import serves as computes
from moefy_kernels.cpu.linear import linear


def serves(request: Request) -> str | None:
    """None where the native kernel computes this: fp32 or bf16, no gradients."""
    x_TD, mlp = request.x_TD, request.mlp
    if type(mlp) is not DenseMlp or mlp.activation not in ACTIVATIONS:
        return "the native kernel does not compute such a layer"
    vectors = (mlp.up_bias_N, mlp.gate_bias_N, mlp.centre_N, mlp.down_bias_D)
    trained = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in vectors)
    if trained or not computes(x_TD, mlp.up_ND, mlp.down_ND, mlp.gate_ND):
        return "the native kernel computes float32 and bfloat16, without gradients, on CPUs"
    return None


def native_backend(x_TD: Tensor, weights: ExpertWeights, mask_TE: Tensor) -> Tensor:
    """The native kernels of a CPU: output `[T, D]`, the same function as `reference.masked_mlp`.

    Raises `ValueError` for what does not fit.
    """
    active_TN = weights.active_TN if isinstance(weights, DecidedMlp) else None
    mlp = weights.mlp if isinstance(weights, DecidedMlp) else weights
    assert isinstance(mlp, DenseMlp)
    decided = active_TN is not None
    return native_experts(
        x_TD,
        mask_TE,
        mlp.down_ND,
        ACTIVATIONS[mlp.activation],
        None if decided else mlp.selecting_ND,
        None if mlp.gate_ND is None else mlp.up_ND,
        active_TN=active_TN,
        selecting_bias_N=None if decided else mlp.deciding_bias_N,
        up_bias_N=None if mlp.gate_ND is None else mlp.up_bias_N,
        centre_N=mlp.centre_N,
        down_bias_D=mlp.down_bias_D,
    )


class OneToken:
    """A layer for one token after the other, described once.

    Between two layers of a model more passes through the caches than they hold, so that every line of Python
    and every operation of torch costs several times what it costs in a loop: as much as a third of a token.
    """

    def __init__(
        self, request: Request, able: tuple[str, ...], parameters: Iterable[Tensor | None]
    ) -> None:
        """`request` is one token of a layer that is served, `able` the backends that serve it too, and
        `parameters` all that the layer is made of."""
        mlp, self.layer, self.able = request.mlp, request.layer, able
        assert isinstance(mlp, DenseMlp)
        self.dtype, self.places = mlp.up_ND.dtype, _places(parameters)
        up_ND = None if mlp.gate_ND is None else mlp.up_ND
        up_bias_N = None if mlp.gate_ND is None else mlp.up_bias_N
        self.described = described(
            self.layer.experts, ACTIVATIONS[mlp.activation], mlp.down_ND, mlp.selecting_ND, up_ND,
            mlp.deciding_bias_N, up_bias_N, None, mlp.down_bias_D,
        )  # fmt: skip

    @classmethod
    def of(
        cls, request: Request, able: tuple[str, ...], parameters: list[Tensor | None]
    ) -> "OneToken | None":
        """None where the kernel would have to convert or copy, or does not compute such a layer."""
        vectors = [p for p in parameters if p is not None and p.ndim == 1]
        dtype = request.mlp.up_ND.dtype
        ready = all(v.dtype == dtype and v.is_contiguous() for v in vectors)
        return cls(request, able, parameters) if ready and "native" in able else None

    def follows(self, parameters: Iterable[Tensor | None]) -> bool:
        """Whether the weights still lie where they did, in the same dtype; values are read in every call."""
        return _places(parameters) == self.places

    def __call__(self, x_1D: Tensor, mask_1E: Tensor) -> Tensor:
        """Output `[1, D]`, without gradients."""
        return called(self.described, x_1D, mask_1E.to(torch.float32))


def _places(parameters: Iterable[Tensor | None]) -> list[Any]:
    return [None if p is None else (p.data_ptr(), p.dtype, p.shape, p.stride()) for p in parameters]


Model = TypeVar("Model", bound=nn.Module)


def native_linears(model: Model, on: bool = True) -> Model:
    """Switch the native kernel on or off for every `nn.Linear` of `model`, which is given back.

    Where there is no compiler nothing changes but a warning (`moefy_kernels.cpu.library`).
    """
    for module in model.modules():
        # Subclasses compute something else, and a hook of accelerate has a forward of its own.
        if type(module) is nn.Linear and not hasattr(module, "_hf_hook"):
            if on:
                vars(module)["forward"] = MethodType(_forward, module)
            else:
                vars(module).pop("forward", None)
    return model


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    """What `nn.Linear` computes, in any shape `[..., D]`."""
    # Attributes of a module take longer to find, a hundred times a token.
    own: dict[str, Any] = self._parameters
    return linear(x, own["weight"], own["bias"])
