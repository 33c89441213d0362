"""moefy's kernels for stock mixtures of experts: `experts_implementation="moefy"`.

transformers computes the experts of Mixtral, Qwen3-MoE and their like by a function that is chosen by
name. `register_experts` adds this one; it is not written into a saved config, so a checkpoint loads as before
where moefy is not installed. Ids at or above the number of experts are no expert (dynamic k).

Shapes: T tokens, D width, E experts, F neurons per expert, K listed experts.
"""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import (
    ExpertsInterface,
    _default_apply_gate,
    batched_mm_experts_forward,
    grouped_mm_experts_forward,
)

from moefy.experts.backends import BACKENDS, fastest
from moefy.experts.backends.base import ACTIVATIONS, Workload
from moefy_kernels.decode import decode
from moefy_kernels.expert_mlp import ExpertMlp
from moefy_kernels.grouped import grouped
from moefy_kernels.measured import device_name
from moefy_kernels.reference import weights_of
from moefy_kernels.roofline import Layer
from moefy_kernels.union import union

NAME = "moefy"
PATHS = ("decode", "union", "grouped")
"""What serves lists of experts with weights of their own."""
logger = logging.getLogger(__name__)


def register_experts() -> None:
    """Make `experts_implementation="moefy"` known to transformers, for models loaded from now on."""
    ExpertsInterface.register(NAME, experts_forward)


def experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Output `[T, D]` of the experts `top_k_index [T, K]`, weighted by `top_k_weights [T, K]`.

    A layer with something that no kernel knows (a gate of its own, a norm behind every expert) is
    computed by transformers' own functions, which is said once.
    """
    reason = unknown(self)
    if reason is not None:
        _say_once(type(self).__name__, reason)
        stock = grouped_mm_experts_forward if len(hidden_states) > 1 else batched_mm_experts_forward
        return stock(self, hidden_states, top_k_index, top_k_weights)
    mlp = expert_mlp(self)
    x_TD = hidden_states.to(mlp.up_EFD.dtype)
    tensors = [x_TD, top_k_weights, *(v for v in mlp if isinstance(v, Tensor))]
    learns = torch.is_grad_enabled() and any(v.requires_grad for v in tensors)
    listed = top_k_index.shape[1]
    neurons = mlp.experts * mlp.size
    layer = Layer(mlp.width, neurons, mlp.size, mlp.matrices, x_TD.element_size())
    density = min(listed / mlp.experts, 1.0)
    work = Workload(device_name(x_TD.device), layer, len(x_TD), density)
    path = fastest(tuple(p for p in PATHS if BACKENDS[p].trains or not learns), work)
    if path == "decode":
        y_TD = decode(x_TD, mlp, top_k_index, top_k_weights)
    else:
        weight_TE = weights_of(top_k_index, top_k_weights, None, mlp.experts)
        if path == "union":
            y_TD = union(x_TD, mlp, weight_TE)
        else:
            y_TD = grouped(x_TD, mlp, weight_TE, most=listed)
    if self.has_bias:
        weight_TE = weights_of(top_k_index, top_k_weights, None, mlp.experts)
        y_TD = y_TD + weight_TE.to(y_TD.dtype) @ self.down_proj_bias.to(y_TD.dtype)
    return y_TD.to(hidden_states.dtype)


def expert_mlp(experts: Any) -> ExpertMlp:
    """The weights of a stock experts module as views."""
    first = experts.gate_up_proj if experts.has_gate else experts.up_proj
    down = experts.down_proj
    if experts.is_transposed:
        first = first.transpose(1, 2)
    else:
        down = down.transpose(1, 2)
    bias = getattr(experts, "gate_up_proj_bias" if experts.has_gate else "up_proj_bias", None)
    activation = known_activations()[type(experts.act_fn)]
    if not experts.has_gate:
        return ExpertMlp(first, down, activation, up_bias_EF=bias)
    gate, up = _halves(first, experts.is_concatenated)
    gate_bias = up_bias = None
    if bias is not None:  # kernels read vectors without a stride; these are small
        gate_bias, up_bias = (v.contiguous() for v in _halves(bias, experts.is_concatenated))
    return ExpertMlp(
        up, down, activation, gate_EFD=gate, up_bias_EF=up_bias, gate_bias_EF=gate_bias
    )


def _halves(fused: Tensor, concatenated: bool) -> tuple[Tensor, Tensor]:
    """Gate and up of a tensor `[E, 2F, ...]`, as views."""
    if concatenated:
        gate, up = fused.chunk(2, dim=1)
        return gate, up
    return fused[:, 0::2], fused[:, 1::2]


def unknown(experts: Any) -> str | None:
    """What of this layer no kernel computes; None if kernels compute it all."""
    if getattr(experts, "has_post_expert_norm", False):
        return "a norm behind every expert"
    if experts.has_gate and type(experts)._apply_gate is not _default_apply_gate:
        return "a gate of its own"
    if type(experts.act_fn) not in known_activations():
        return f"the activation {type(experts.act_fn).__name__}"
    return None


@cache
def known_activations() -> dict[type[nn.Module], str]:
    """Activation modules of transformers, and what kernels call them."""
    return {type(ACT2FN[name]): kernel for name, kernel in ACTIVATIONS.items() if name in ACT2FN}


@cache
def _say_once(layer: str, reason: str) -> None:
    logger.warning(
        "%s has %s, which moefy's kernels do not compute; transformers' own do", layer, reason
    )
