"""Masked dense: every neuron is computed, the neurons of experts that are off are set to zero.

The PyTorch twin of every other operation here, and the fastest one wherever most experts run or the
layer is too small for anything else to pay.

Shapes: T tokens, D width, N neurons, E experts, F = N/E neurons per expert.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from moefy_kernels.expert_mlp import ExpertMlp
from moefy_kernels.weighted_rows import weighted_rows


class ExpertWeights(Protocol):
    """One MLP with its neurons in expert order: expert `e` owns rows `e*F` to `(e+1)*F`."""

    @property
    def up_ND(self) -> Tensor:
        """Rows of the up projection."""
        ...

    @property
    def down_ND(self) -> Tensor:
        """Rows of the transposed down projection."""
        ...

    @property
    def down_bias_D(self) -> Tensor | None:
        """The output bias."""
        ...

    def hidden(self, x_TD: Tensor, rows: slice = ...) -> Tensor:
        """Activations `[T, rows]` of a run of neurons; a run must be a view, never a copy."""
        ...

    def at(self, token_C: Tensor) -> "ExpertWeights":
        """What computes some tokens of the batch: itself, unless it holds something of each token."""
        ...


def masked_mlp(x_TD: Tensor, weights: ExpertWeights, mask_TE: Tensor) -> Tensor:
    """Every expert for every token, masked where `mask_TE` (bool) turns it off: output `[T, D]`.

    The down projection may be of another dtype than the rest (T5 keeps it in fp32); the output has
    that dtype.
    """
    tokens, experts = mask_TE.shape
    h_TEF = weights.hidden(x_TD).view(tokens, experts, -1)
    if mask_TE.dtype == torch.bool:
        h_TN = torch.where(mask_TE[:, :, None], h_TEF, 0).reshape(tokens, -1)
    else:  # in training, a number that carries a gradient
        h_TN = (h_TEF * mask_TE[:, :, None].to(h_TEF.dtype)).view(tokens, -1)
    h_TN = h_TN.to(weights.down_ND.dtype)
    if tokens == 1 and not (h_TN.is_cuda or torch.is_grad_enabled()):
        every_N = torch.arange(h_TN.shape[1])
        y_TD = weighted_rows(h_TN[0], weights.down_ND, every_N)[None]
    else:
        y_TD = h_TN @ weights.down_ND
    return y_TD if weights.down_bias_D is None else y_TD + weights.down_bias_D


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
    "relu": relu,
    "relu2": lambda v: relu(v).square(),
    "linear": lambda v: v,
}


def activate(v: Tensor, name: str) -> Tensor:
    """The activations of `expert_mlp.ACTIVATIONS`."""
    return _ACTIVATIONS[name](v)


def hidden(x_TD: Tensor, mlp: ExpertMlp) -> Tensor:
    """Activations `[T, E, F]` of every neuron."""
    h_TEF = torch.einsum("td,efd->tef", x_TD, mlp.up_EFD)
    if mlp.up_bias_EF is not None:
        h_TEF = h_TEF + mlp.up_bias_EF
    if mlp.gate_EFD is None:
        h_TEF = activate(h_TEF, mlp.activation)
    else:
        gate_TEF = torch.einsum("td,efd->tef", x_TD, mlp.gate_EFD)
        if mlp.gate_bias_EF is not None:
            gate_TEF = gate_TEF + mlp.gate_bias_EF
        h_TEF = activate(gate_TEF, mlp.activation) * h_TEF
    return h_TEF if mlp.centre_EF is None else h_TEF - mlp.centre_EF


def weighted(
    x_TD: Tensor, mlp: ExpertMlp, weight_TE: Tensor, bias_D: Tensor | None = None
) -> Tensor:
    """Output `[T, D]` of all experts, each weighted for every token: twin of `union` and `grouped`."""
    dtype = mlp.down_EFD.dtype
    h_TEF = (hidden(x_TD, mlp) * weight_TE[:, :, None].to(x_TD.dtype)).to(dtype)
    y_TD = torch.einsum("tef,efd->td", h_TEF, mlp.down_EFD)
    return y_TD if bias_D is None else y_TD + bias_D.to(dtype)


def weights_of(
    expert_TK: Tensor, weight_TK: Tensor | None, count_T: Tensor | None, experts: int
) -> Tensor:
    """Ids and their weights as a matrix `[T, E]`; ids outside 0 to E - 1 and beyond the count are none."""
    live_TK = (expert_TK >= 0) & (expert_TK < experts)
    if count_T is not None:
        at_K = torch.arange(expert_TK.shape[1], device=expert_TK.device)
        live_TK = live_TK & (at_K < count_T[:, None])
    if weight_TK is None:
        weight_TK = torch.ones_like(expert_TK, dtype=torch.float32)
    zeros_TE = weight_TK.new_zeros(len(expert_TK), experts)
    return zeros_TE.scatter_add(1, expert_TK.long() * live_TK, weight_TK * live_TK)


def decode(
    x_TD: Tensor,
    mlp: ExpertMlp,
    expert_TK: Tensor,
    weight_TK: Tensor | None = None,
    count_T: Tensor | None = None,
    bias_D: Tensor | None = None,
) -> Tensor:
    """Output `[T, D]` of the experts listed for every token: twin of `decode.decode`."""
    return weighted(x_TD, mlp, weights_of(expert_TK, weight_TK, count_T, mlp.experts), bias_D)


def scores(x_TD: Tensor, router_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """Scores `[T, E]` of a linear router, in fp32 or wider."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    score_TE = x_TD.to(wide) @ router_ED.to(wide).T
    return score_TE if bias_E is None else score_TE + bias_E


def select(score_TE: Tensor, value: float, most: int, near: bool) -> tuple[Tensor, Tensor]:
    """Lists and counts of scores above `value`, or within `value` of the best: twin of `routing`."""
    score_TE = torch.where(score_TE == 0, 0, score_TE)  # minus zero is zero
    if near:
        passed_TE = score_TE >= (1 - value) * score_TE.amax(1, keepdim=True)
    else:
        passed_TE = score_TE > value
    ranked_TE = torch.where(passed_TE, score_TE, -torch.inf)
    order_TE = ranked_TE.sort(dim=1, descending=True, stable=True).indices[:, :most]
    best_TE = torch.zeros_like(passed_TE).scatter(1, order_TE, True)
    return listed(passed_TE & best_TE, most, False)


def listed(mask_TE: Tensor, most: int, together: bool) -> tuple[Tensor, Tensor]:
    """Lists `[T, most]` and counts of what is on, ending in E: twin of `routing.listed`."""
    on_TE = mask_TE != 0
    on_TE = on_TE.any(0, keepdim=True) if together else on_TE
    experts = mask_TE.shape[1]
    at_TE = torch.where(on_TE, torch.arange(experts, device=mask_TE.device), experts)
    count_T = on_TE.sum(1).clamp(max=most)
    return at_TE.sort(dim=1).values[:, :most].int(), count_T.int()
