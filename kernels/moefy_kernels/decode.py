"""Decoding: a few tokens, each with a list of experts; weights are read where they are.

Two launches: one program per block of rows and token for gate, up and activation, then one per stretch
of columns, split and token for the down projection. No sort and no permutation; ids stay on the device,
and shapes alone decide the launches, so a CUDA graph may hold them. Tokens share nothing: an expert that
two tokens chose is read twice (from L2 the second time, if it fits); `union` reads it once.

Shapes: T tokens, D width, E experts, F neurons per expert, K listed experts, R rows of a block, S splits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefy_kernels import reference
from moefy_kernels.configs import chosen
from moefy_kernels.expert_mlp import ExpertMlp
from moefy_kernels.launching import runs_kernels, splits, strides
from moefy_kernels.rows import finish, hidden_rows, locate


@triton.jit
def decode_hidden(
    x, up, gate, up_bias, gate_bias, centre, expert, weight, count, h, ticket,
    K, E, x_t, x_d, up_e, up_f, up_d, gate_e, gate_f, gate_d, up_bias_e, gate_bias_e, centre_e,
    expert_t, expert_k, weight_t, weight_k, tickets,
    D: tl.constexpr, F: tl.constexpr, ACT: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr, TICKETS: tl.constexpr,
):  # fmt: skip
    """`h[t, r] = weight * hidden` of every listed row; also sets the tickets of the next launch."""
    block, token = tl.program_id(0), tl.program_id(1)
    if block == 0:
        at = tl.arange(0, TICKETS)
        tl.store(ticket + token * tickets + at, tl.zeros_like(at), mask=at < tickets)
    listed = K
    if count is not None:
        listed = tl.minimum(tl.load(count + token), K)
    if block * BLOCK_R < listed * F:
        row_R = block * BLOCK_R + tl.arange(0, BLOCK_R)
        expert += token * expert_t
        expert_R, neuron_R, live_R = locate(row_R, expert, expert_k, listed * F, E, F)
        if tl.sum(live_R.to(tl.int32)) > 0:
            h_R = hidden_rows(
                x + token.to(tl.int64) * x_t, up, gate, up_bias, gate_bias, centre,
                expert_R, neuron_R, live_R, x_d, up_e, up_f, up_d, gate_e, gate_f, gate_d,
                up_bias_e, gate_bias_e, centre_e, D, ACT, BLOCK_R, BLOCK_D,
            )  # fmt: skip
            if weight is not None:
                at_R = weight + token * weight_t + row_R // F * weight_k
                h_R *= tl.load(at_R, mask=live_R, other=0).to(tl.float32)
            tl.store(h + token.to(tl.int64) * K * F + row_R, h_R, mask=live_R)


@triton.jit
def decode_down(
    h, down, bias, expert, count, y, partial, ticket,
    T, K, E, down_e, down_f, down_d, expert_t, expert_k,
    D: tl.constexpr, F: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """`y[t] = sum_r h[t, r] down[r] + bias`, added up in fp32 in an order that never changes."""
    column, split, token = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    listed = K
    if count is not None:
        listed = tl.minimum(tl.load(count + token), K)
    rows = listed * F
    stretch = tl.cdiv(tl.cdiv(rows, BLOCK_R), SPLITS) * BLOCK_R
    at_D = column * BLOCK_D + tl.arange(0, BLOCK_D)
    expert += token * expert_t
    h += token.to(tl.int64) * K * F
    y_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for begin in range(split * stretch, tl.minimum(rows, (split + 1) * stretch), BLOCK_R):
        row_R = begin + tl.arange(0, BLOCK_R)
        expert_R, neuron_R, live_R = locate(row_R, expert, expert_k, rows, E, F)
        h_R = tl.load(h + row_R, mask=live_R, other=0)
        down_R = down + expert_R * down_e + neuron_R * down_f
        inside_RD = live_R[:, None] & (at_D < D)[None, :]
        w_RD = tl.load(down_R[:, None] + at_D[None, :] * down_d, mask=inside_RD, other=0)
        y_RD += w_RD.to(tl.float32) * h_R[:, None]
    y_at = y + token.to(tl.int64) * D + at_D
    bias_at = None
    if bias is not None:
        bias_at = bias + at_D
    finish(
        tl.sum(y_RD, 0), token * D + at_D, at_D < D, y_at, bias_at, partial,
        ticket + token * tl.num_programs(0) + column, split, T * D, SPLITS,
    )  # fmt: skip


def launch(
    x_TD: Tensor,
    mlp: ExpertMlp,
    expert_TK: Tensor,
    weight_TK: Tensor | None,
    count_T: Tensor | None,
    bias_D: Tensor | None,
) -> Tensor:
    """The two launches."""
    (T, D), K, F = x_TD.shape, expert_TK.shape[1], mlp.size
    first, second = (chosen(name, x_TD, F) for name in ("decode_hidden", "decode_down"))
    columns = triton.cdiv(D, second["BLOCK_D"])
    parts = splits(x_TD.device, T * columns, triton.cdiv(K * F, second["BLOCK_R"]))
    y_TD = x_TD.new_empty((T, D), dtype=mlp.down_EFD.dtype)
    h = x_TD.new_empty((T, max(K, 1) * F), dtype=torch.float32)
    ticket = x_TD.new_empty((T, columns), dtype=torch.int32)
    partial = x_TD.new_empty((parts if parts > 1 else 0, T, D), dtype=torch.float32)
    decode_hidden[(max(1, triton.cdiv(K * F, first["BLOCK_R"])), T)](
        x_TD, mlp.up_EFD, mlp.gate_EFD, mlp.up_bias_EF, mlp.gate_bias_EF, mlp.centre_EF,
        expert_TK, weight_TK, count_T, h, ticket, K, mlp.experts, *x_TD.stride(), *strides(mlp),
        *expert_TK.stride(), *((0, 0) if weight_TK is None else weight_TK.stride()), columns,
        D=D, F=F, ACT=mlp.activation, TICKETS=triton.next_power_of_2(columns), **first,
    )  # fmt: skip
    decode_down[(columns, parts, T)](
        h, mlp.down_EFD, bias_D, expert_TK, count_T, y_TD, partial, ticket, T, K, mlp.experts,
        *mlp.down_EFD.stride(), *expert_TK.stride(), D=D, F=F, SPLITS=parts, **second,
    )  # fmt: skip
    return y_TD


@torch.library.custom_op("moefy::decode", mutates_args=())
def _decode(
    x_TD: Tensor,
    up_EFD: Tensor,
    down_EFD: Tensor,
    activation: str,
    gate_EFD: Tensor | None,
    up_bias_EF: Tensor | None,
    gate_bias_EF: Tensor | None,
    centre_EF: Tensor | None,
    expert_TK: Tensor,
    weight_TK: Tensor | None,
    count_T: Tensor | None,
    bias_D: Tensor | None,
) -> Tensor:
    mlp = ExpertMlp(
        up_EFD, down_EFD, activation, gate_EFD, up_bias_EF, gate_bias_EF, centre_EF
    )  # fmt: skip
    if runs_kernels(x_TD):
        return launch(x_TD, mlp, expert_TK, weight_TK, count_T, bias_D)
    return reference.decode(x_TD, mlp, expert_TK, weight_TK, count_T, bias_D)


@_decode.register_fake
def _(x_TD: Tensor, up_EFD: Tensor, down_EFD: Tensor, *rest: object) -> Tensor:
    return x_TD.new_empty(x_TD.shape, dtype=down_EFD.dtype)


def decode(
    x_TD: Tensor,
    mlp: ExpertMlp,
    expert_TK: Tensor,
    weight_TK: Tensor | None = None,
    count_T: Tensor | None = None,
    bias_D: Tensor | None = None,
) -> Tensor:
    """Output `[T, D]` of the experts listed for every token, weighted, plus `bias_D`.

    Ids outside 0 to E - 1 are no expert, one listed twice counts twice. `count_T` says how many
    of a token's ids are looked at, where the others are known to be none. The output has the dtype
    of the down projection. Without gradients.
    """
    y_TD: Tensor = _decode(x_TD, *mlp, expert_TK, weight_TK, count_T, bias_D)
    return y_TD
