"""Rows of weights that lie anywhere, read once and multiplied by one vector: for one token at a time.

A *row* is one neuron of one chosen expert. A list of rows is walked in blocks of R whatever the size of
the experts, so that experts of one neuron (neuron sparsity) and of thousands run the same code. Products
are accumulated in fp32, element by element, and summed once.

The down projection is a sum over all rows of a token; where one program per stretch of columns would
leave most of a GPU idle, the rows are split. Every split writes its partial sum, and the program that
comes last adds them in the order of the splits: the result does not depend on who came last.

Shapes: T tokens, D width, E experts, F neurons per expert, K listed experts, R rows of a block, S splits.
"""

import triton
import triton.language as tl

from moefy_kernels.activation import activate


@triton.jit
def locate(row_R, expert, expert_k, rows, E, F: tl.constexpr):
    """Expert, neuron in it and whether it exists, of every listed row; ids beyond E are no expert."""
    live_R = row_R < rows
    expert_R = tl.load(expert + row_R // F * expert_k, mask=live_R, other=-1)
    live_R = live_R & (expert_R >= 0) & (expert_R < E)
    # Only what is multiplied by a stride of a whole expert needs 64 bits.
    return tl.where(live_R, expert_R, 0).to(tl.int64), row_R % F, live_R


@triton.jit
def hidden_rows(
    x, up, gate, up_bias, gate_bias, centre, expert_R, neuron_R, live_R,
    x_d, up_e, up_f, up_d, gate_e, gate_f, gate_d, up_bias_e, gate_bias_e, centre_e,
    D: tl.constexpr, ACT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Activations `[R]` (fp32) of these rows for the token that `x` points to."""
    up_R = up + expert_R * up_e + neuron_R * up_f
    up_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    if gate is not None:
        gate_R = gate + expert_R * gate_e + neuron_R * gate_f
        gate_RD = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for begin in range(0, D, BLOCK_D):
        at_D = begin + tl.arange(0, BLOCK_D)
        inside_RD = live_R[:, None] & (at_D < D)[None, :]
        x_D = tl.load(x + at_D * x_d, mask=at_D < D, other=0).to(tl.float32)
        w_RD = tl.load(up_R[:, None] + at_D[None, :] * up_d, mask=inside_RD, other=0)
        up_RD += w_RD.to(tl.float32) * x_D[None, :]
        if gate is not None:
            w_RD = tl.load(gate_R[:, None] + at_D[None, :] * gate_d, mask=inside_RD, other=0)
            gate_RD += w_RD.to(tl.float32) * x_D[None, :]
    h_R = tl.sum(up_RD, 1)
    if up_bias is not None:
        bias_R = tl.load(up_bias + expert_R * up_bias_e + neuron_R, mask=live_R, other=0)
        h_R += bias_R.to(tl.float32)
    if gate is not None:
        g_R = tl.sum(gate_RD, 1)
        if gate_bias is not None:
            bias_R = tl.load(gate_bias + expert_R * gate_bias_e + neuron_R, mask=live_R, other=0)
            g_R += bias_R.to(tl.float32)
        h_R = activate(g_R, ACT) * h_R
    else:
        h_R = activate(h_R, ACT)
    if centre is not None:
        centre_R = tl.load(centre + expert_R * centre_e + neuron_R, mask=live_R, other=0)
        h_R -= centre_R.to(tl.float32)
    return h_R


@triton.jit
def finish(
    part, part_at, inside, y, bias, partial, ticket, split, split_stride, SPLITS: tl.constexpr
):
    """Store `part + bias` at `y`, or leave it to the last of the splits, which adds up all of them.

    `y` and `bias` are pointers of the shape of `part`; `partial + split * split_stride + part_at` is
    where this split's part goes, `ticket` a counter that stands at zero before the first of them.
    """
    if SPLITS == 1:
        if bias is not None:
            part += tl.load(bias, mask=inside, other=0).to(tl.float32)
        tl.store(y, part.to(y.dtype.element_ty), mask=inside)
    else:
        tl.store(partial + split * split_stride + part_at, part, mask=inside)
        # All threads have written before one of them takes the ticket, which releases what they
        # wrote to whoever takes the last one.
        tl.debug_barrier()
        if tl.atomic_add(ticket, 1, sem="acq_rel") == SPLITS - 1:
            total = tl.zeros(part.shape, tl.float32)
            for other in range(SPLITS):
                at = partial + other * split_stride + part_at
                # Past L1, which may hold what lay there before.
                total += tl.load(at, mask=inside, other=0, cache_modifier=".cg")
            if bias is not None:
                total += tl.load(bias, mask=inside, other=0).to(tl.float32)
            tl.store(y, total.to(y.dtype.element_ty), mask=inside)
