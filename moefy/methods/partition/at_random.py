"""Random experts: the control every other method must beat.

Shapes: T tokens, D model width, N neurons.
"""

import torch
from torch import Tensor

from moefy.models.mlp import DenseMlp


def random(mlp: DenseMlp, x_TD: Tensor, num_experts: int, seed: int) -> Tensor:
    """Owner `[N]` of each neuron: a uniformly drawn balanced partition. Reads no tokens."""
    order_N = torch.randperm(mlp.neurons, generator=torch.Generator().manual_seed(seed))
    owner_N = torch.empty(mlp.neurons, dtype=torch.int64)
    owner_N[order_N] = torch.arange(mlp.neurons) // (mlp.neurons // num_experts)
    return owner_N
