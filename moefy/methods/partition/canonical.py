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

from moefy.models.mlp import DenseMlp

HOMOGENEOUS = {"relu": 1, "leaky_relu": 1, "relu2": 2}
"""Activations with `act(s z) = s**p act(z)` for every s > 0, and their degree p."""

TIE = 1e-6
"""Entries closer than this share of the largest are ties: rounding must not decide the order."""

SORT_COLUMNS = 8
CHUNK = 1024


def canonical_gauge(mlp: DenseMlp, neurons: Tensor) -> DenseMlp:
    """The MLP of these neurons, in this order, in fp32 with every free scale and sign fixed.

    The largest entry of a freely scaled row (bias included) becomes 1 in size, and positive where
    the sign is free too; the row of `down_ND` takes the inverse. Free are: the up row of a gated
    MLP in scale and sign; a row that feeds a homogeneous activation (ReLU, squared ReLU) in
    positive scale.
    """
    up_N, gate_N = (None if s is None else s[neurons] for s in _scales(mlp))
    down_ND = mlp.down_ND[neurons].to(torch.float32)
    degree = HOMOGENEOUS.get(mlp.activation, 0)
    for scale_N, power in ((up_N, degree if mlp.gate_ND is None else 1), (gate_N, degree)):
        if scale_N is not None:
            down_ND *= scale_N[:, None] ** power
    return DenseMlp(
        up_ND=_rows(mlp.up_ND, neurons, up_N),
        down_ND=down_ND,
        activation=mlp.activation,
        gate_ND=None if mlp.gate_ND is None else _rows(mlp.gate_ND, neurons, gate_N),
        up_bias_N=None if mlp.up_bias_N is None else _rows(mlp.up_bias_N, neurons, up_N),
        gate_bias_N=None if mlp.gate_bias_N is None else _rows(mlp.gate_bias_N, neurons, gate_N),
        down_bias_D=None if mlp.down_bias_D is None else mlp.down_bias_D.to(torch.float32),
    )


def canonical_order(mlp: DenseMlp) -> Tensor:
    """Neurons `[N]` sorted by the first of their canonical input weights.

    Near-ties in one column are decided by the next, and neurons alike in all of those by a hash of
    all their weights; neurons that tie even there are copies of each other.
    """
    up_N, gate_N = _scales(mlp)
    rows_ND, scale_N = (mlp.up_ND, up_N) if mlp.gate_ND is None else (mlp.gate_ND, gate_N)
    first = _rows(rows_ND[:, :SORT_COLUMNS], torch.arange(mlp.neurons), scale_N).numpy()
    group_N = np.zeros(mlp.neurons, dtype=np.int64)
    order_N = np.arange(mlp.neurons)
    for column_N in first.T:
        order_N = np.lexsort((column_N, group_N))
        gap = np.diff(column_N[order_N]) > TIE * np.abs(column_N).max()
        new = gap | (np.diff(group_N[order_N]) > 0)
        group_N[order_N] = np.concatenate([[0], np.cumsum(new)])
        if new.all():
            return torch.from_numpy(order_N)
    tied = torch.from_numpy(np.flatnonzero(np.bincount(group_N)[group_N] > 1))
    keys = dict(zip(tied.tolist(), _hashes(canonical_gauge(mlp, tied)), strict=True))
    ranked = sorted(order_N.tolist(), key=lambda j: (group_N[j], keys.get(j, b"")))
    return torch.tensor(ranked, dtype=torch.int64)


def _scales(mlp: DenseMlp) -> tuple[Tensor | None, Tensor | None]:
    """What the up and the gate row of each neuron are divided by, `[N]`; None where not free."""
    homogeneous = mlp.activation in HOMOGENEOUS
    if mlp.gate_ND is None:
        return (_largest(mlp.up_ND, mlp.up_bias_N).abs() if homogeneous else None), None
    gate_N = _largest(mlp.gate_ND, mlp.gate_bias_N).abs() if homogeneous else None
    return _largest(mlp.up_ND, mlp.up_bias_N), gate_N


def _largest(rows_ND: Tensor, bias_N: Tensor | None) -> Tensor:
    """The entry of largest size of each row, signed, the first of equals; 1 for a row of zeros."""
    found = []
    for first in range(0, len(rows_ND), CHUNK):
        rows = rows_ND[first : first + CHUNK].to(torch.float32)
        if bias_N is not None:
            bias = bias_N[first : first + CHUNK, None].to(torch.float32)
            rows = torch.cat([rows, bias], dim=1)
        found.append(rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))[:, 0])
    value_N = torch.cat(found)
    return torch.where(value_N == 0, torch.ones_like(value_N), value_N)


def _rows(values: Tensor, neurons: Tensor, scale_N: Tensor | None) -> Tensor:
    """These rows (or entries of a bias) in fp32, divided by their scales; -0.0 becomes 0.0."""
    rows = values[neurons].to(torch.float32)
    if scale_N is not None:
        rows /= scale_N if rows.ndim == 1 else scale_N[:, None]
    return rows.add_(0.0)


def _hashes(mlp: DenseMlp) -> list[bytes]:
    values = (mlp.gate_ND, mlp.gate_bias_N, mlp.up_ND, mlp.up_bias_N, mlp.down_ND + 0.0)
    found = []
    for neuron in range(mlp.neurons):
        digest = hashlib.blake2b(digest_size=16)
        for value in values:
            if value is not None:
                digest.update(value[neuron].numpy().tobytes())
        found.append(digest.digest())
    return found
