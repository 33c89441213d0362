"""Gradients of `grouped`, from activations that are computed again.

Of a slot with routing weight w and the gradient dy of its token's output, d = dy down^T is the gradient
of a weighted activation. One kernel gives the gradients of what goes into the activation and of the
routing weights; dx is scattered like the output itself, and gradients of weights are sums over the list
of every expert, in an order that never changes.

Shapes: T tokens, D width, E experts, F neurons per expert, S slots, B tokens of a tile.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefy_kernels.activation import activate, slope
from moefy_kernels.configs import chosen
from moefy_kernels.expert_mlp import ExpertMlp
from moefy_kernels.launching import precision, strides
from moefy_kernels.tiles import Lists, project, scatter, tile_and_block, tokens_of, up_and_gate


@triton.jit
def grouped_slopes(
    x, up, gate, up_bias, gate_bias, centre, weight, dy, down, h, d_up, d_gate, d_centre, d_weight,
    x_t, x_d, up_e, up_f, up_d, gate_e, gate_f, gate_d, up_bias_e, gate_bias_e, centre_e,
    weight_t, weight_e, dy_t, dy_d, down_e, down_f, down_d, token, slot_end, tile_end, T,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, ACT: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, SEEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of every slot: the weighted activations again and the gradients of what goes into them."""
    tiles = tl.load(tile_end + E)
    for work in range(tl.program_id(0), tiles * tl.cdiv(F, BLOCK_F), tl.num_programs(0)):
        tile, block = tile_and_block(work, tiles, tl.cdiv(F, BLOCK_F), GROUP)
        expert, slot_B, token_B, live_B = tokens_of(
            tile, token, slot_end, tile_end, T, E, BLOCK_T, SEEN
        )
        at_F = block * BLOCK_F + tl.arange(0, BLOCK_F)
        live_F = at_F < F
        up_BF, gate_BF = up_and_gate(
            x + token_B * x_t, live_B, expert, at_F, up, gate, up_bias, gate_bias,
            x_d, up_e, up_f, up_d, gate_e, gate_f, gate_d, up_bias_e, gate_bias_e,
            D, F, BLOCK_T, BLOCK_F, BLOCK_D, PRECISION,
        )  # fmt: skip
        d_BF, _ = project(
            dy + token_B * dy_t, live_B, dy_d, down + expert * down_e + at_F * down_f, None, live_F,
            down_d, 0, D, BLOCK_T, BLOCK_F, BLOCK_D, PRECISION,
        )  # fmt: skip
        w_B = tl.load(weight + token_B * weight_t + expert * weight_e, mask=live_B, other=0)
        w_B = w_B.to(tl.float32)
        inside_BF = live_B[:, None] & live_F[None, :]
        at_BF = slot_B[:, None] * F + at_F[None, :]
        if gate is not None:
            act_BF = activate(gate_BF, ACT)
            h_BF = act_BF * up_BF
            if d_up is not None:
                du_BF = w_B[:, None] * d_BF * act_BF
                dg_BF = w_B[:, None] * d_BF * up_BF * slope(gate_BF, ACT)
                tl.store(d_up + at_BF, du_BF.to(d_up.dtype.element_ty), mask=inside_BF)
                tl.store(d_gate + at_BF, dg_BF.to(d_gate.dtype.element_ty), mask=inside_BF)
        else:
            h_BF = activate(up_BF, ACT)
            if d_up is not None:
                du_BF = w_B[:, None] * d_BF * slope(up_BF, ACT)
                tl.store(d_up + at_BF, du_BF.to(d_up.dtype.element_ty), mask=inside_BF)
        if centre is not None:
            centre_F = tl.load(centre + expert * centre_e + at_F, mask=live_F, other=0)
            h_BF -= centre_F.to(tl.float32)[None, :]
        if h is not None:
            weighted_BF = w_B[:, None] * h_BF
            tl.store(h + at_BF, weighted_BF.to(h.dtype.element_ty), mask=inside_BF)
        if d_weight is not None:
            # Blocks of neurons of one expert meet here.
            at_B = d_weight + token_B * E + expert
            tl.atomic_add(at_B, tl.sum(h_BF * d_BF, 1), mask=live_B, sem="relaxed")
        if d_centre is not None:
            sum_F = tl.sum(w_B[:, None] * d_BF, 0)
            tl.atomic_add(d_centre + expert * F + at_F, -sum_F, mask=live_F, sem="relaxed")


@triton.jit
def grouped_outer(
    first, second, right, d_first, d_second, first_bias, second_bias, right_t, right_d,
    token, slot_end, T, D: tl.constexpr, F: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`d[e, f] = sum_s left[s, f] right[token of s]`, for one or two `left` and their biases' sums."""
    block, expert = tl.program_id(1), tl.program_id(2).to(tl.int64)
    at_D = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    at_F = block * BLOCK_F + tl.arange(0, BLOCK_F)
    live_D, live_F = at_D < D, at_F < F
    # Columns of D stand where a matrix unit wants at least 64, so that experts may be small.
    first_DF = tl.zeros((BLOCK_D, BLOCK_F), tl.float32)
    second_DF = tl.zeros((BLOCK_D, BLOCK_F), tl.float32)
    first_F = tl.zeros((BLOCK_F,), tl.float32)
    second_F = tl.zeros((BLOCK_F,), tl.float32)
    begin, end = tl.load(slot_end + expert), tl.load(slot_end + expert + 1)
    for at in range(0, end - begin, BLOCK_T):
        at_B = at + tl.arange(0, BLOCK_T)
        live_B = at_B < end - begin
        inside_DB = live_D[:, None] & live_B[None, :]
        inside_BF = live_B[:, None] & live_F[None, :]
        token_B = tl.load(token + expert * T + at_B, mask=live_B, other=0).to(tl.int64)
        at_DB = right + token_B[None, :] * right_t + at_D[:, None] * right_d
        right_DB = tl.load(at_DB, mask=inside_DB, other=0)
        at_BF = (begin + at_B).to(tl.int64)[:, None] * F + at_F[None, :]
        left_BF = tl.load(first + at_BF, mask=inside_BF, other=0)
        first_DF = tl.dot(right_DB, left_BF.to(right_DB.dtype), first_DF, input_precision=PRECISION)
        if first_bias is not None:
            first_F += tl.sum(left_BF.to(tl.float32), 0)
        if second is not None:
            left_BF = tl.load(second + at_BF, mask=inside_BF, other=0)
            second_DF = tl.dot(
                right_DB, left_BF.to(right_DB.dtype), second_DF, input_precision=PRECISION
            )
            if second_bias is not None:
                second_F += tl.sum(left_BF.to(tl.float32), 0)
    at_DF = expert * F * D + at_F[None, :] * D + at_D[:, None]
    inside_DF = live_D[:, None] & live_F[None, :]
    tl.store(d_first + at_DF, first_DF.to(d_first.dtype.element_ty), mask=inside_DF)
    if second is not None:
        tl.store(d_second + at_DF, second_DF.to(d_second.dtype.element_ty), mask=inside_DF)
    # Every block of columns knows the sums that belong to biases; the first writes them.
    at_F = expert * F + at_F
    if tl.program_id(0) == 0:
        if first_bias is not None:
            tl.store(first_bias + at_F, first_F.to(first_bias.dtype.element_ty), mask=live_F)
        if second_bias is not None:
            tl.store(second_bias + at_F, second_F.to(second_bias.dtype.element_ty), mask=live_F)


def outer(
    lists: Lists,
    right_TD: Tensor,
    first_SF: Tensor,
    second_SF: Tensor | None,
    d_first_EFD: Tensor,
    d_second_EFD: Tensor | None,
    first_bias_EF: Tensor | None,
    second_bias_EF: Tensor | None,
) -> None:
    """Write the gradients of one or two matrices and of their biases."""
    E, F, D = d_first_EFD.shape
    config = chosen("grouped_outer", right_TD, F)
    grid = triton.cdiv(D, config["BLOCK_D"]), triton.cdiv(F, config["BLOCK_F"]), E
    grouped_outer[grid](
        first_SF, second_SF, right_TD, d_first_EFD, d_second_EFD, first_bias_EF, second_bias_EF,
        *right_TD.stride(), lists.token_ET, lists.slot_end, len(right_TD),
        D=D, F=F, PRECISION=precision(), **config,
    )  # fmt: skip


class Needed(NamedTuple):
    """Which gradients are wanted, in the order in which they are returned."""

    x: bool
    up: bool
    down: bool
    gate: bool
    up_bias: bool
    gate_bias: bool
    centre: bool
    weight: bool


@torch.library.custom_op("moefy::grouped_backward", mutates_args=())
def gradients(
    dy_TD: Tensor,
    x_TD: Tensor,
    up_EFD: Tensor,
    down_EFD: Tensor,
    activation: str,
    gate_EFD: Tensor | None,
    up_bias_EF: Tensor | None,
    gate_bias_EF: Tensor | None,
    centre_EF: Tensor | None,
    weight_TE: Tensor,
    most: int | None,
    needed: list[bool],
) -> list[Tensor]:
    """The gradients that are needed; the flags are those of `Needed`."""
    mlp = ExpertMlp(
        up_EFD, down_EFD, activation, gate_EFD, up_bias_EF, gate_bias_EF, centre_EF
    )  # fmt: skip
    need, lists = Needed(*needed), Lists(weight_TE, most)
    (T, D), E, F = x_TD.shape, mlp.experts, mlp.size

    def slots(wanted: bool) -> Tensor | None:
        return x_TD.new_empty((lists.slots, F)) if wanted else None

    def sums(wanted: bool, *shape: int) -> Tensor | None:
        return x_TD.new_zeros(shape, dtype=torch.float32) if wanted else None

    def like(value: Tensor | None, wanted: bool) -> Tensor | None:
        return value.new_empty(value.shape) if value is not None and wanted else None

    weights = need.up or need.gate or need.up_bias or need.gate_bias
    h_SF, d_up_SF = slots(need.down), slots(need.x or weights)
    d_gate_SF = slots(d_up_SF is not None and gate_EFD is not None)
    d_weight_TE, d_centre_EF = sums(need.weight, T, E), sums(need.centre, E, F)
    lists.walk(
        grouped_slopes, x_TD, F, F, "BLOCK_F",
        x_TD, up_EFD, gate_EFD, up_bias_EF, gate_bias_EF, centre_EF, weight_TE, dy_TD, down_EFD,
        h_SF, d_up_SF, d_gate_SF, d_centre_EF, d_weight_TE, *x_TD.stride(), *strides(mlp),
        *weight_TE.stride(), *dy_TD.stride(), *down_EFD.stride(),
        D=D, F=F, ACT=activation, PRECISION=precision(),
    )  # fmt: skip
    d_x_TD, d_down_EFD = sums(need.x, T, D), like(down_EFD, need.down)
    d_up_EFD, d_gate_EFD = like(up_EFD, weights), like(gate_EFD, weights)
    d_up_bias_EF, d_gate_bias_EF = (
        like(up_bias_EF, need.up_bias),
        like(gate_bias_EF, need.gate_bias),
    )
    if d_x_TD is not None:
        assert d_up_SF is not None
        scatter(lists, x_TD, d_x_TD, d_up_SF, up_EFD, d_gate_SF, gate_EFD)
        d_x_TD = d_x_TD.to(x_TD.dtype)
    if d_up_EFD is not None:
        assert d_up_SF is not None
        outer(lists, x_TD, d_up_SF, d_gate_SF, d_up_EFD, d_gate_EFD, d_up_bias_EF, d_gate_bias_EF)
    if d_down_EFD is not None:
        assert h_SF is not None
        outer(lists, dy_TD, h_SF, None, d_down_EFD, None, None, None)
    if d_centre_EF is not None and centre_EF is not None:
        d_centre_EF = d_centre_EF.to(centre_EF.dtype)
    if d_weight_TE is not None:
        d_weight_TE = d_weight_TE.to(weight_TE.dtype)
    found = (
        d_x_TD, d_up_EFD, d_down_EFD, d_gate_EFD, d_up_bias_EF, d_gate_bias_EF, d_centre_EF,
        d_weight_TE,
    )  # fmt: skip
    return [
        value for value, wanted in zip(found, need, strict=True) if wanted and value is not None
    ]


@gradients.register_fake
def _(
    dy_TD: Tensor,
    x_TD: Tensor,
    up_EFD: Tensor,
    down_EFD: Tensor,
    activation: str,
    *rest: Any,
) -> list[Tensor]:
    *others, _, needed = rest
    values = [x_TD, up_EFD, down_EFD, *others]
    return [v.new_empty(v.shape) for v, wanted in zip(values, needed, strict=True) if wanted]
