"""Many tokens, each with its own experts: prefill and training, with gradients.

The tokens of every expert are listed on the device (`tiles`); one kernel reads their rows of x where
they are and computes gate, up and activation, another multiplies by the down projection and adds to the
rows of y. Between them lies one workspace, the weighted activations of all slots. Gradients
(`grouped_backward`) compute the activations again instead of keeping them.

Shapes: T tokens, D width, E experts, F neurons per expert, S slots, B tokens of a tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefy_kernels import grouped_backward, reference
from moefy_kernels.activation import activate
from moefy_kernels.expert_mlp import ExpertMlp
from moefy_kernels.launching import precision, runs_kernels, strides
from moefy_kernels.tiles import Lists, scatter, tile_and_block, tokens_of, up_and_gate


@triton.jit
def grouped_hidden(
    x, up, gate, up_bias, gate_bias, centre, weight, h,
    x_t, x_d, up_e, up_f, up_d, gate_e, gate_f, gate_d, up_bias_e, gate_bias_e, centre_e,
    weight_t, weight_e, token, slot_end, tile_end, T,
    E: tl.constexpr, D: tl.constexpr, F: tl.constexpr, ACT: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr, SEEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`h[s] = weight * hidden` of every slot."""
    tiles = tl.load(tile_end + E)
    for work in range(tl.program_id(0), tiles * tl.cdiv(F, BLOCK_F), tl.num_programs(0)):
        # Programs that run at a time read the rows of few tiles and the weights of few blocks.
        tile, block = tile_and_block(work, tiles, tl.cdiv(F, BLOCK_F), GROUP)
        expert, slot_B, token_B, live_B = tokens_of(
            tile, token, slot_end, tile_end, T, E, BLOCK_T, SEEN
        )
        at_F = block * BLOCK_F + tl.arange(0, BLOCK_F)
        h_BF, gate_BF = up_and_gate(
            x + token_B * x_t, live_B, expert, at_F, up, gate, up_bias, gate_bias,
            x_d, up_e, up_f, up_d, gate_e, gate_f, gate_d, up_bias_e, gate_bias_e,
            D, F, BLOCK_T, BLOCK_F, BLOCK_D, PRECISION,
        )  # fmt: skip
        if gate is not None:
            h_BF = activate(gate_BF, ACT) * h_BF
        else:
            h_BF = activate(h_BF, ACT)
        if centre is not None:
            centre_F = tl.load(centre + expert * centre_e + at_F, mask=at_F < F, other=0)
            h_BF -= centre_F.to(tl.float32)[None, :]
        w_B = tl.load(weight + token_B * weight_t + expert * weight_e, mask=live_B, other=0)
        h_BF *= w_B.to(tl.float32)[:, None]
        inside_BF = live_B[:, None] & (at_F < F)[None, :]
        at_BF = h + slot_B[:, None] * F + at_F[None, :]
        tl.store(at_BF, h_BF.to(h.dtype.element_ty), mask=inside_BF)


@torch.library.custom_op("moefy::grouped", mutates_args=())
def _grouped(
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
    most: int | None,
) -> Tensor:
    mlp = ExpertMlp(
        up_EFD, down_EFD, activation, gate_EFD, up_bias_EF, gate_bias_EF, centre_EF
    )  # fmt: skip
    (T, D), F = x_TD.shape, mlp.size
    lists = Lists(weight_TE, most)
    h_SF = x_TD.new_empty((lists.slots, F))
    lists.walk(
        grouped_hidden, x_TD, F, F, "BLOCK_F",
        x_TD, mlp.up_EFD, mlp.gate_EFD, mlp.up_bias_EF, mlp.gate_bias_EF, mlp.centre_EF, weight_TE,
        h_SF, *x_TD.stride(), *strides(mlp), *weight_TE.stride(),
        D=D, F=F, ACT=activation, PRECISION=precision(),
    )  # fmt: skip
    y_TD = x_TD.new_zeros((T, D), dtype=torch.float32)
    if bias_D is not None:
        y_TD += bias_D
    scatter(lists, x_TD, y_TD, h_SF, mlp.down_EFD)
    return y_TD.to(down_EFD.dtype)


@_grouped.register_fake
def _(x_TD: Tensor, up_EFD: Tensor, down_EFD: Tensor, *rest: object) -> Tensor:
    return x_TD.new_empty(x_TD.shape, dtype=down_EFD.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x_TD, up, down, ctx.activation, *others, weight_TE, bias_D, ctx.most = inputs
    ctx.bias = None if bias_D is None else bias_D.dtype
    ctx.save_for_backward(x_TD, up, down, *others, weight_TE)


def _backward(ctx: Any, dy_TD: Tensor) -> tuple[Any, ...]:
    x_TD, up, down, *others, weight_TE = ctx.saved_tensors
    of_x, of_up, of_down, _, *of_others, of_weight, of_bias, _ = ctx.needs_input_grad
    needed = [of_x, of_up, of_down, *of_others, of_weight]
    found: list[Tensor | None] = [None] * len(needed)
    if any(needed):
        gradients = iter(
            grouped_backward.gradients(
                dy_TD, x_TD, up, down, ctx.activation, *others, weight_TE, ctx.most, needed
            )
        )
        found = [next(gradients) if wanted else None for wanted in needed]
    bias = dy_TD.sum(0, dtype=torch.float32).to(ctx.bias) if of_bias else None
    return *found[:3], None, *found[3:], bias, None


_grouped.register_autograd(_backward, setup_context=_save)


def grouped(
    x_TD: Tensor,
    mlp: ExpertMlp,
    weight_TE: Tensor,
    bias_D: Tensor | None = None,
    most: int | None = None,
) -> Tensor:
    """Output `[T, D]` of the experts that `weight_TE` gives a weight other than zero, plus `bias_D`.

    A bool mask means weight one. `most` is the largest number of experts that any token has, if
    that is known: it bounds the workspace, which else has room for all of them; a token with more
    gives wrong results. Nothing waits for the device. The output has the dtype of the down projection.
    Everything that is a float has a gradient, but a weight of zero, whose expert is not computed,
    has none; gradients of gradients there are not.
    """
    if not runs_kernels(x_TD):
        return reference.weighted(x_TD, mlp, weight_TE, bias_D)
    y_TD: Tensor = _grouped(x_TD, *mlp, weight_TE, bias_D, most)
    return y_TD
