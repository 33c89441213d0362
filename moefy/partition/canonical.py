"""One form for every MLP that computes the same function neuron by neuron.

Two MLPs that differ by the order of their neurons, or by a rescale that cancels between a
neuron's input and output weights, are the same function. `canonical_gauge` picks one scale (and,
with a gate, one sign) per neuron and `canonical_order` one order, both without looking at what was
arbitrary, so whatever is computed from the result, random draws included, is the same for both.
Powers of two cancel exactly in floating point; other scales up to rounding.

Shapes: D model width, N neurons.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

from moefy.mlp import DenseMlp

HOMOGENEOUS = {"relu": 1, "leaky_relu": 1, "relu2": 2}
"""Activations with `act(s z) = s**p act(z)` for every s > 0, and their degree p."""

TIE = 1e-6
"""Entries closer than this share of the largest are ties: rounding must not decide the order."""

SORT_COLUMNS = 8


def canonical_gauge(mlp: DenseMlp) -> DenseMlp:
    """The same function in fp32 with every free scale and sign fixed.

    The largest entry of a freely scaled row (bias included) becomes 1 in size, and positive where
    the sign is free too; the row of `down_ND` takes the inverse. Free are: the up row of a gated
    MLP in scale and sign; a row that feeds a homogeneous activation (ReLU, squared ReLU) in
    positive scale. The order of the neurons stays.
    """
    mlp = mlp.to(torch.float32)
    degree = HOMOGENEOUS.get(mlp.activation)
    up_ND, up_bias_N = mlp.up_ND, mlp.up_bias_N
    gate_ND, gate_bias_N = mlp.gate_ND, mlp.gate_bias_N
    down_ND = mlp.down_ND
    if gate_ND is not None:
        scale_N = _largest(up_ND, up_bias_N)
        up_ND, up_bias_N = _divide(up_ND, up_bias_N, scale_N)
        down_ND = down_ND * scale_N[:, None]
        if degree is not None:
            scale_N = _largest(gate_ND, gate_bias_N).abs()
            gate_ND, gate_bias_N = _divide(gate_ND, gate_bias_N, scale_N)
            down_ND = down_ND * scale_N[:, None] ** degree
    elif degree is not None:
        scale_N = _largest(up_ND, up_bias_N).abs()
        up_ND, up_bias_N = _divide(up_ND, up_bias_N, scale_N)
        down_ND = down_ND * scale_N[:, None] ** degree
    return DenseMlp(
        up_ND=up_ND,
        down_ND=down_ND,
        activation=mlp.activation,
        gate_ND=gate_ND,
        up_bias_N=up_bias_N,
        gate_bias_N=gate_bias_N,
        down_bias_D=mlp.down_bias_D,
    )


def canonical_order(mlp: DenseMlp) -> Tensor:
    """Neurons `[N]` of an MLP in canonical gauge, sorted by their first input weights.

    Near-ties in one column are decided by the next, and neurons alike in all of those by a hash of
    all their weights; neurons that tie even there are copies of each other.
    """
    rows_ND = (mlp.up_ND if mlp.gate_ND is None else mlp.gate_ND).numpy()
    group_N = np.zeros(len(rows_ND), dtype=np.int64)
    order_N = np.arange(len(rows_ND))
    for column_N in rows_ND[:, :SORT_COLUMNS].T:
        order_N = np.lexsort((column_N, group_N))
        gap = np.diff(column_N[order_N]) > TIE * np.abs(column_N).max()
        new = gap | (np.diff(group_N[order_N]) > 0)
        group_N[order_N] = np.concatenate([[0], np.cumsum(new)])
        if new.all():
            return torch.from_numpy(order_N)
    size_N = np.bincount(group_N)[group_N]
    keys = {int(j): _digest(mlp, int(j)) for j in np.flatnonzero(size_N > 1)}
    ranked = sorted(order_N.tolist(), key=lambda j: (group_N[j], keys.get(j, b"")))
    return torch.tensor(ranked, dtype=torch.int64)


def _largest(rows_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    """The entry of largest size of each row, signed; 1 for a row of zeros."""
    if bias_N is not None:
        rows_ND = torch.cat([rows_ND, bias_N[:, None]], dim=1)
    at_N = rows_ND.abs().argmax(dim=1, keepdim=True)
    value_N = rows_ND.gather(1, at_N)[:, 0]
    return torch.where(value_N == 0, torch.ones_like(value_N), value_N)


def _divide(
    rows_ND: Tensor, bias_N: Tensor | None, scale_N: Tensor
) -> tuple[Tensor, Tensor | None]:
    # Adding 0.0 turns -0.0 into 0.0, which a flipped sign would otherwise leave in the hash.
    bias = None if bias_N is None else bias_N / scale_N + 0.0
    return rows_ND / scale_N[:, None] + 0.0, bias


def _digest(mlp: DenseMlp, neuron: int) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in ("gate_ND", "gate_bias_N", "up_ND", "up_bias_N", "down_ND"):
        value = getattr(mlp, name)
        if value is not None:
            digest.update((value[neuron] + 0.0).numpy().tobytes())
    return digest.digest()
