"""The native CPU kernel as a backend: a mask and the weights of a layer in, its output out.

Shapes: T tokens, D width, E experts.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from moefy.experts.backends.activations import ACTIVATIONS
from moefy.models.mlp import DecidedMlp, DenseMlp
from moefy_kernels import ExpertWeights
from moefy_kernels.cpu.experts import called, described, native_experts, serves
from moefy_kernels.roofline import Layer


def fits(x_TD: Tensor, weights: ExpertWeights) -> bool:
    """Whether the native kernel computes this layer for these inputs: fp32 or bf16, no gradients."""
    mlp = weights.mlp if isinstance(weights, DecidedMlp) else weights
    if type(mlp) is not DenseMlp or mlp.activation not in ACTIVATIONS:
        return False
    vectors = (mlp.up_bias_N, mlp.gate_bias_N, mlp.centre_N, mlp.down_bias_D)
    trained = torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in vectors)
    return not trained and serves(x_TD, mlp.up_ND, mlp.down_ND, mlp.gate_ND)


def native_backend(x_TD: Tensor, weights: ExpertWeights, mask_TE: Tensor) -> Tensor:
    """Output `[T, D]`, the same function as `reference.masked_mlp`; `ValueError` for what does not fit."""
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

    def __init__(self, mlp: DenseMlp, layer: Layer, parameters: Iterable[Tensor | None]) -> None:
        """`mlp` is one that `fits`, `layer` what it is to `dispatch`, `parameters` all that it is made of."""
        self.layer, self.dtype = layer, mlp.up_ND.dtype
        self.places = _places(parameters)
        up_ND = None if mlp.gate_ND is None else mlp.up_ND
        up_bias_N = None if mlp.gate_ND is None else mlp.up_bias_N
        self.described = described(
            layer.experts, ACTIVATIONS[mlp.activation], mlp.down_ND, mlp.selecting_ND, up_ND,
            mlp.deciding_bias_N, up_bias_N, None, mlp.down_bias_D,
        )  # fmt: skip

    @classmethod
    def of(
        cls, mlp: DenseMlp, layer: Layer, parameters: Iterable[Tensor | None]
    ) -> "OneToken | None":
        """None where the kernel would have to convert or copy, or does not compute such a layer."""
        vectors = (mlp.up_bias_N, mlp.gate_bias_N, mlp.down_bias_D)
        ready = all(
            v is None or (v.dtype == mlp.up_ND.dtype and v.is_contiguous()) for v in vectors
        )
        one_D = mlp.up_ND[:1].detach()
        return cls(mlp, layer, parameters) if ready and fits(one_D, mlp) else None

    def follows(self, parameters: Iterable[Tensor | None]) -> bool:
        """Whether the weights still lie where they did, in the same dtype; values are read in every call."""
        return _places(parameters) == self.places

    def __call__(self, x_1D: Tensor, mask_1E: Tensor) -> Tensor:
        """Output `[1, D]`, without gradients."""
        return called(self.described, x_1D, mask_1E.to(torch.float32))


def _places(parameters: Iterable[Tensor | None]) -> list[Any]:
    return [None if p is None else (p.data_ptr(), p.dtype, p.shape, p.stride()) for p in parameters]
