"""A small batch: every expert that any of its tokens chose is read once, for all of them.

The union is listed on the device, and its rows are walked in blocks of R whatever the size of the
experts. Weights stand on the side of a matrix product that is at least 64 wide, tokens on the other,
so that a batch of two already runs on tensor cores without padding the weights. Each token has its own
weight for every expert, zero for those it did not choose: the function is the same as for one token at
a time, and a neuron costs its bytes once. Three launches, none of which waits for the host.

Shapes: T tokens, D width, E experts, F neurons per expert, R rows of a block, S splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefy_kernels import reference
from moefy_kernels.activation import activate
from moefy_kernels.configs import chosen
from moefy_kernels.expert_mlp import ExpertMlp
from moefy_kernels.launching import precision, runs_kernels, splits, strides
from moefy_kernels.routing import WIDEST, listed
from moefy_kernels.rows import finish, locate


@triton.jit
def union_hidden(
    x, up, gate, up_bias, gate_bias, centre, expert, weight, count, h, ticket,
    T, E, x_t, x_d, up_e, up_f, up_d, gate_e, gate_f, gate_d, up_bias_e, gate_bias_e, centre_e,
    weight_t, weight_e, tickets,
    D: tl.constexpr, F: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, TICKETS: tl.constexpr,
):  # fmt: skip
    """`h[r, t] = weight[t, expert of r] * hidden` of every row of the union."""
    block = tl.program_id(0)
    if block == 0:
        at = tl.arange(0, TICKETS)
        tl.store(ticket + at, tl.zeros_like(at), mask=at < tickets)
    rows = tl.load(count) * F
    if block * BLOCK_R < rows:
        row_R = block * BLOCK_R + tl.arange(0, BLOCK_R)
        expert_R, neuron_R, live_R = locate(row_R, expert, 1, rows, E, F)
        at_T = tl.arange(0, BLOCK_T)
        up_R = up + expert_R * up_e + neuron_R * up_f
        up_RT = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
        if gate is not None:
            gate_R = gate + expert_R * gate_e + neuron_R * gate_f
            gate_RT = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
        for begin in range(0, D, BLOCK_D):
            at_D = begin + tl.arange(0, BLOCK_D)
            inside_RD = live_R[:, None] & (at_D < D)[None, :]
            x_DT = tl.load(
                x + at_T[None, :].to(tl.int64) * x_t + at_D[:, None] * x_d,
                mask=(at_T < T)[None, :] & (at_D < D)[:, None], other=0,
            )  # fmt: skip
            w_RD = tl.load(up_R[:, None] + at_D[None, :] * up_d, mask=inside_RD, other=0)
            up_RT = tl.dot(w_RD, x_DT, up_RT, input_precision=PRECISION)
            if gate is not None:
                w_RD = tl.load(gate_R[:, None] + at_D[None, :] * gate_d, mask=inside_RD, other=0)
                gate_RT = tl.dot(w_RD, x_DT, gate_RT, input_precision=PRECISION)
        h_RT = up_RT
        if up_bias is not None:
            bias_R = tl.load(up_bias + expert_R * up_bias_e + neuron_R, mask=live_R, other=0)
            h_RT += bias_R.to(tl.float32)[:, None]
        if gate is not None:
            if gate_bias is not None:
                bias_R = tl.load(
                    gate_bias + expert_R * gate_bias_e + neuron_R, mask=live_R, other=0
                )
                gate_RT += bias_R.to(tl.float32)[:, None]
            h_RT = activate(gate_RT, ACT) * h_RT
        else:
            h_RT = activate(h_RT, ACT)
        if centre is not None:
            centre_R = tl.load(centre + expert_R * centre_e + neuron_R, mask=live_R, other=0)
            h_RT -= centre_R.to(tl.float32)[:, None]
        weight_RT = tl.load(
            weight + at_T[None, :] * weight_t + expert_R[:, None] * weight_e,
            mask=live_R[:, None] & (at_T < T)[None, :], other=0,
        )  # fmt: skip
        h_RT = tl.where(weight_RT != 0, h_RT * weight_RT.to(tl.float32), 0)
        at_RT = h + row_R[:, None].to(tl.int64) * BLOCK_T + at_T[None, :]
        tl.store(at_RT, h_RT.to(h.dtype.element_ty), mask=live_R[:, None])


@triton.jit
def union_down(
    h, down, bias, expert, count, y, partial, ticket, T, E, down_e, down_f, down_d,
    D: tl.constexpr, F: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """`y[t] = sum_r h[r, t] down[r] + bias` over the union, in an order that never changes."""
    column, split = tl.program_id(0), tl.program_id(1)
    rows = tl.load(count) * F
    stretch = tl.cdiv(tl.cdiv(rows, BLOCK_R), SPLITS) * BLOCK_R
    at_D, at_T = column * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
    y_DT = tl.zeros((BLOCK_D, BLOCK_T), tl.float32)
    for begin in range(split * stretch, tl.minimum(rows, (split + 1) * stretch), BLOCK_R):
        row_R = begin + tl.arange(0, BLOCK_R)
        expert_R, neuron_R, live_R = locate(row_R, expert, 1, rows, E, F)
        at_RT = h + row_R[:, None].to(tl.int64) * BLOCK_T + at_T[None, :]
        h_RT = tl.load(at_RT, mask=live_R[:, None], other=0)
        down_R = down + expert_R * down_e + neuron_R * down_f
        inside_RD = live_R[:, None] & (at_D < D)[None, :]
        w_RD = tl.load(down_R[:, None] + at_D[None, :] * down_d, mask=inside_RD, other=0)
        y_DT = tl.dot(tl.trans(w_RD), h_RT, y_DT, input_precision=PRECISION)
    at_DT = at_T[None, :].to(tl.int64) * D + at_D[:, None]
    inside_DT = (at_D < D)[:, None] & (at_T < T)[None, :]
    bias_at = None
    if bias is not None:
        bias_at = bias + at_D[:, None] + 0 * at_T[None, :]
    finish(
        y_DT, at_DT, inside_DT, y + at_DT, bias_at, partial, ticket + column, split, T * D, SPLITS
    )


def launch(x_TD: Tensor, mlp: ExpertMlp, weight_TE: Tensor, bias_D: Tensor | None) -> Tensor:
    """The list of the union and the two products."""
    (T, D), E, F = x_TD.shape, mlp.experts, mlp.size
    first, second = (chosen(name, x_TD, F) for name in ("union_hidden", "union_down"))
    expert_1E, count_1 = listed(weight_TE, together=True)
    columns, padded = triton.cdiv(D, second["BLOCK_D"]), max(16, triton.next_power_of_2(T))
    parts = splits(x_TD.device, columns, triton.cdiv(E * F, second["BLOCK_R"]))
    y_TD = x_TD.new_empty((T, D), dtype=mlp.down_EFD.dtype)
    h_RT = mlp.down_EFD.new_empty((E * F, padded))
    ticket = torch.empty((columns,), dtype=torch.int32, device=x_TD.device)
    partial = x_TD.new_empty((parts if parts > 1 else 0, T, D), dtype=torch.float32)
    shared = {"D": D, "F": F, "PRECISION": precision(), "BLOCK_T": padded}
    union_hidden[(triton.cdiv(E * F, first["BLOCK_R"]),)](
        x_TD, mlp.up_EFD, mlp.gate_EFD, mlp.up_bias_EF, mlp.gate_bias_EF, mlp.centre_EF,
        expert_1E, weight_TE, count_1, h_RT, ticket, T, E, *x_TD.stride(), *strides(mlp),
        *weight_TE.stride(), columns, ACT=mlp.activation,
        TICKETS=triton.next_power_of_2(columns), **shared, **first,
    )  # fmt: skip
    union_down[(columns, parts)](
        h_RT, mlp.down_EFD, bias_D, expert_1E, count_1, y_TD, partial, ticket, T, E,
        *mlp.down_EFD.stride(), SPLITS=parts, **shared, **second,
    )  # fmt: skip
    return y_TD


@torch.library.custom_op("moefy::union", mutates_args=())
def _union(
    x_TD: Tensor,
    up_EFD: Tensor,
    down_EFD: Tensor,
    activation: str,
    gate_EFD: Tensor | None,
    up_bias_EF: Tensor | None,
    gate_bias_EF: Tensor | None,
    centre_EF: Tensor | None,
    weight_TE: Tensor,
    bias_D: Tensor | None,
) -> Tensor:
    mlp = ExpertMlp(
        up_EFD, down_EFD, activation, gate_EFD, up_bias_EF, gate_bias_EF, centre_EF
    )  # fmt: skip
    if runs_kernels(x_TD) and mlp.experts <= WIDEST:
        return launch(x_TD, mlp, weight_TE, bias_D)
    return reference.weighted(x_TD, mlp, weight_TE, bias_D)


@_union.register_fake
def _(x_TD: Tensor, up_EFD: Tensor, down_EFD: Tensor, *rest: object) -> Tensor:
    return x_TD.new_empty(x_TD.shape, dtype=down_EFD.dtype)


def union(x_TD: Tensor, mlp: ExpertMlp, weight_TE: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """Output `[T, D]` of the experts that every token weighs (bool, or numbers of which zero is off).

    Made for 2 to 64 tokens; the output has the dtype of the down projection. Without gradients.
    """
    y_TD: Tensor = _union(x_TD, *mlp, weight_TE, bias_D)
    return y_TD
