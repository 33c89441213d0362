"""What the methods read of a neuron: how much it contributes to each token, and a short form of it.

The contribution of neuron j to a token is the vector `h_j d_j`; its size is `|h_j| ||d_j||`. Both
are the same for every gauge of the MLP, and the sign of `h_j` against `d_j` never shows.

Shapes: T tokens, D model width, N neurons, R features.
"""

import torch
from torch import Tensor

from moefy.models.mlp import DenseMlp

MOST_TOKENS = 8192
MOST_ENTRIES = 2**26
"""Most tokens times neurons held at once: 256 MiB, or 4681 tokens of 14336 neurons."""

MOST_FEATURES = 256
CHUNK = 1024
OVERSAMPLE = 16
POWER_STEPS = 2


def sample(x_TD: Tensor, neurons: int) -> Tensor:
    """Evenly spaced rows of `x_TD`, in fp32: at most 8192, and fewer for very many neurons."""
    most = min(MOST_TOKENS, max(1, MOST_ENTRIES // neurons))
    if len(x_TD) > most:
        x_TD = x_TD[torch.linspace(0, len(x_TD) - 1, most).long()]
    return x_TD.to(torch.float32)


def contributions(mlp: DenseMlp, x_TD: Tensor) -> Tensor:
    """Size of each neuron's contribution, `|h_j| ||d_j||`, to the tokens `x_TD`: `[N, T]`."""
    size_N = torch.linalg.vector_norm(mlp.down_ND, dim=1)
    found_NT = torch.empty(mlp.neurons, len(x_TD))
    for first in range(0, len(x_TD), CHUNK):
        h_CN = mlp.hidden(x_TD[first : first + CHUNK])
        found_NT[:, first : first + CHUNK] = h_CN.abs_().mul_(size_N).T
    return found_NT


def mean_contribution(mlp: DenseMlp, x_TD: Tensor) -> Tensor:
    """Mean over a sample of tokens of the size of each neuron's contribution: `[N]` in fp64."""
    x_TD = sample(x_TD, mlp.neurons)
    total_N = torch.zeros(mlp.neurons, dtype=torch.float64)
    for x_CD in x_TD.split(CHUNK):
        total_N += mlp.hidden(x_CD).abs_().sum(dim=0, dtype=torch.float64)
    size_N: Tensor = torch.linalg.vector_norm(mlp.down_ND, dim=1)
    return total_N * size_N.double() / len(x_TD)


def principal(rows_NR: Tensor, features: int, seed: int) -> Tensor:
    """Coordinates `[N, features]` of the rows along their leading right singular vectors.

    Distances between rows are kept as well as that many numbers can. Truncated SVD by a randomised
    range finder with power steps (Halko, Martinsson and Tropp 2011), exact where either side is
    short. Fewer columns come back where the rows have fewer.
    """
    points, width = rows_NR.shape
    rank = features + OVERSAMPLE
    if width <= rank:
        basis_RK = torch.eye(width)
    elif points <= rank:
        basis_RK = torch.linalg.qr(rows_NR.T).Q
    else:
        random = torch.Generator().manual_seed(seed)
        basis_RK = torch.randn(width, rank, generator=random)
        for _ in range(POWER_STEPS):
            basis_RK = torch.linalg.qr(rows_NR.T @ (rows_NR @ basis_RK)).Q
    short_NK = rows_NR @ basis_RK
    vectors_KK: Tensor = torch.linalg.eigh(short_NK.T @ short_NK).eigenvectors
    return short_NK @ vectors_KK[:, -features:]
