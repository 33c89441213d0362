"""Tokens in one list per expert, and what every kernel over such lists shares: for many tokens.

Every list is cut into tiles of B tokens, the last one part empty. Where a list lies and how long it is
stays on the device: shapes alone decide what is allocated and launched, nothing waits for the GPU, and
a CUDA graph may hold it all. A launch has at most as many programs as fit on the device; each walks
the tiles that exist, so the worst case (every token chose every expert) costs memory but no time.

A *slot* is a token in the list of an expert; slots are numbered expert by expert.

Shapes: T tokens, D width, E experts, F neurons per expert, S slots, B tokens of a tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moefy_kernels.configs import chosen
from moefy_kernels.launching import precision, processors

SEEN = 1024
"""Tokens or experts that a program looks at at a time to find those it wants."""


@triton.jit
def list_tokens(weight, token, count, T, weight_t, weight_e, SEEN: tl.constexpr):
    """`token[e]`: who chose expert `e`, in order; `count[e + 1]`: how many. `count[0]` is zero."""
    expert = tl.program_id(0)
    weight += expert.to(tl.int64) * weight_e
    token += expert.to(tl.int64) * T
    listed = tl.zeros((), tl.int32)
    for begin in range(0, T, SEEN):
        at_T = begin + tl.arange(0, SEEN)
        w_T = tl.load(weight + at_T.to(tl.int64) * weight_t, mask=at_T < T, other=0)
        chosen_T = (w_T.to(tl.float32) != 0).to(tl.int32)
        tl.store(token + listed + tl.cumsum(chosen_T, 0) - 1, at_T, mask=chosen_T != 0)
        listed += tl.sum(chosen_T, 0)
    tl.store(count + expert + 1, listed)
    if expert == 0:
        tl.store(count, 0)


def _seen(length: int) -> int:
    return min(SEEN, max(16, int(triton.next_power_of_2(length))))


class Lists:
    """The tokens of every expert, on the device."""

    def __init__(self, weight_TE: Tensor, most: int | None) -> None:
        (T, E), new = weight_TE.shape, weight_TE.new_empty
        self.slots = T * (E if most is None else min(most, E))
        """S, the most slots that there can be."""
        self.token_ET = new((E, T), dtype=torch.int32)
        self._count = new(E + 1, dtype=torch.int32)
        list_tokens[(E,)](
            weight_TE, self.token_ET, self._count, T, *weight_TE.stride(), SEEN=_seen(T)
        )
        # Where a token has more experts than was promised, the last slots are lost, but nothing
        # outside the workspace is written.
        self.slot_end = self._ends(1).clamp_(max=self.slots)
        """`[E + 1]`: the slots of expert `e` are those from `slot_end[e]` to `slot_end[e + 1]`."""
        self._tile_end: dict[int, Tensor] = {}

    def _ends(self, block: int) -> Tensor:
        tiles = self._count if block == 1 else (self._count + (block - 1)) // block
        return torch.cumsum(tiles, 0, dtype=torch.int32)

    def tile_end(self, block: int) -> Tensor:
        """`[E + 1]`: as `slot_end`, for tiles of `block` tokens."""
        if block not in self._tile_end:
            self._tile_end[block] = self._ends(block)
        return self._tile_end[block]

    def most_tiles(self, block: int) -> int:
        """The most tiles of `block` tokens that there can be."""
        E, T = self.token_ET.shape
        partly = min(E, self.slots) * (block - 1)
        return min(E * int(triton.cdiv(T, block)), (self.slots + partly) // block)

    def walk(
        self,
        kernel: Any,
        x: Tensor,
        size: int,
        length: int,
        block: str,
        *args: Any,
        **constants: Any,
    ) -> None:
        """Launch a kernel whose programs walk all tiles, times the blocks that `length` has.

        `block` names the constant that is the size of these blocks.
        """
        E, T = self.token_ET.shape
        config = dict(chosen(kernel.__name__, x, size))
        programs = config.pop("per_processor") * processors(x.device)
        work = self.most_tiles(config["BLOCK_T"]) * triton.cdiv(length, config[block])
        kernel[(max(1, min(work, programs)),)](
            *args, self.token_ET, self.slot_end, self.tile_end(config["BLOCK_T"]), T, E=E,
            SEEN=_seen(E), **constants, **config,
        )  # fmt: skip


@triton.jit
def tile_and_block(work, tiles, blocks, group):
    """Which tile and which block: `group` tiles share a block before the next block is turned to."""
    first = work // (group * blocks) * group
    wide = tl.minimum(tiles - first, group)
    rest = work - first * blocks
    return first + rest % wide, rest // wide


@triton.jit
def tokens_of(
    tile, token, slot_end, tile_end, T, E: tl.constexpr, BLOCK_T: tl.constexpr, SEEN: tl.constexpr
):
    """Expert of a tile, its slots and tokens, and which of them exist."""
    expert = tl.zeros((), tl.int32)
    for begin in range(0, E, SEEN):
        at_E = begin + tl.arange(0, SEEN)
        end_E = tl.load(tile_end + 1 + at_E, mask=at_E < E, other=2147483647)
        expert += tl.sum((end_E <= tile).to(tl.int32), 0)
    at_B = (tile - tl.load(tile_end + expert)) * BLOCK_T + tl.arange(0, BLOCK_T)
    slot_B = tl.load(slot_end + expert) + at_B
    live_B = slot_B < tl.load(slot_end + expert + 1)
    # Only what is multiplied by a stride of a whole expert, token or slot needs 64 bits.
    expert = expert.to(tl.int64)
    token_B = tl.load(token + expert * T + at_B, mask=live_B, other=0)
    return expert, slot_B.to(tl.int64), token_B.to(tl.int64), live_B


@triton.jit
def project(
    x_B, live_B, x_d, first_F, second_F, live_F, first_d, second_d, D: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`x first^T` and `x second^T` `[B, F]` in one pass, from pointers to rows; the second may be None."""
    first_BF = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    second_BF = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    for begin in range(0, D, BLOCK_D):
        at_D = begin + tl.arange(0, BLOCK_D)
        inside_BD = live_B[:, None] & (at_D < D)[None, :]
        inside_DF = (at_D < D)[:, None] & live_F[None, :]
        x_BD = tl.load(x_B[:, None] + at_D[None, :] * x_d, mask=inside_BD, other=0)
        w_DF = tl.load(first_F[None, :] + at_D[:, None] * first_d, mask=inside_DF, other=0)
        first_BF = tl.dot(x_BD, w_DF, first_BF, input_precision=PRECISION)
        if second_F is not None:
            w_DF = tl.load(second_F[None, :] + at_D[:, None] * second_d, mask=inside_DF, other=0)
            second_BF = tl.dot(x_BD, w_DF, second_BF, input_precision=PRECISION)
    return first_BF, second_BF


@triton.jit
def up_and_gate(
    x_B, live_B, expert, at_F, up, gate, up_bias, gate_bias,
    x_d, up_e, up_f, up_d, gate_e, gate_f, gate_d, up_bias_e, gate_bias_e,
    D: tl.constexpr, F: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What goes into the activation, `[B, F]` each; without a gate the second is nothing."""
    live_F = at_F < F
    gate_F = None
    if gate is not None:
        gate_F = gate + expert * gate_e + at_F * gate_f
    up_BF, gate_BF = project(
        x_B, live_B, x_d, up + expert * up_e + at_F * up_f, gate_F, live_F, up_d, gate_d,
        D, BLOCK_T, BLOCK_F, BLOCK_D, PRECISION,
    )  # fmt: skip
    if up_bias is not None:
        bias_F = tl.load(up_bias + expert * up_bias_e + at_F, mask=live_F, other=0)
        up_BF += bias_F.to(tl.float32)[None, :]
    if gate_bias is not None:
        bias_F = tl.load(gate_bias + expert * gate_bias_e + at_F, mask=live_F, other=0)
        gate_BF += bias_F.to(tl.float32)[None, :]
    return up_BF, gate_BF


@triton.jit
def add_product(
    y_BD, h, weight, slot_B, live_B, at_D, weight_f, weight_d, D: tl.constexpr, F: tl.constexpr,
    BLOCK_F: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`y + h weight` for the slots of a tile and the matrix of one expert."""
    for begin in range(0, F, BLOCK_F):
        at_F = begin + tl.arange(0, BLOCK_F)
        inside_BF = live_B[:, None] & (at_F < F)[None, :]
        inside_FD = (at_F < F)[:, None] & (at_D < D)[None, :]
        h_BF = tl.load(h + slot_B[:, None] * F + at_F[None, :], mask=inside_BF, other=0)
        at_FD = weight + at_F[:, None] * weight_f + at_D[None, :] * weight_d
        w_FD = tl.load(at_FD, mask=inside_FD, other=0)
        y_BD = tl.dot(h_BF.to(w_FD.dtype), w_FD, y_BD, input_precision=PRECISION)
    return y_BD


@triton.jit
def grouped_scatter(
    first_h, second_h, y, first, second, first_e, first_f, first_d, second_e, second_f, second_d,
    token, slot_end, tile_end, T, E: tl.constexpr, D: tl.constexpr, F: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, SEEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`y[t] += sum_f h[s, f] weight[e, f]` for every slot, of one or two pairs of `h` and `weight`.

    Sums of different experts meet in fp32 atomics, so the last bits depend on who came first.
    """
    tiles = tl.load(tile_end + E)
    for work in range(tl.program_id(0), tiles * tl.cdiv(D, BLOCK_D), tl.num_programs(0)):
        # One stretch of columns for all tiles before the next one: of y, which every expert of a
        # token adds to, only this stretch is touched, and it stays in L2.
        tile, block = tile_and_block(work, tiles, tl.cdiv(D, BLOCK_D), tiles)
        expert, slot_B, token_B, live_B = tokens_of(
            tile, token, slot_end, tile_end, T, E, BLOCK_T, SEEN
        )
        at_D = block * BLOCK_D + tl.arange(0, BLOCK_D)
        y_BD = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        y_BD = add_product(
            y_BD, first_h, first + expert * first_e, slot_B, live_B, at_D, first_f, first_d,
            D, F, BLOCK_F, PRECISION,
        )  # fmt: skip
        if second is not None:
            y_BD = add_product(
                y_BD, second_h, second + expert * second_e, slot_B, live_B, at_D, second_f,
                second_d, D, F, BLOCK_F, PRECISION,
            )  # fmt: skip
        inside_BD = live_B[:, None] & (at_D < D)[None, :]
        at_BD = y + token_B[:, None] * D + at_D[None, :]
        tl.atomic_add(at_BD, y_BD, mask=inside_BD, sem="relaxed")


def scatter(
    lists: Lists,
    x_TD: Tensor,
    y_TD: Tensor,
    h_SF: Tensor,
    weight_EFD: Tensor,
    second_h_SF: Tensor | None = None,
    second_EFD: Tensor | None = None,
) -> None:
    """Add to `y_TD` (fp32) the products of `h_SF` and `weight_EFD`, and of a second pair if there is one."""
    _, F, D = weight_EFD.shape
    lists.walk(
        grouped_scatter, x_TD, F, D, "BLOCK_D",
        h_SF, second_h_SF, y_TD, weight_EFD, second_EFD, *weight_EFD.stride(),
        *((0, 0, 0) if second_EFD is None else second_EFD.stride()),
        D=D, F=F, PRECISION=precision(),
    )  # fmt: skip
