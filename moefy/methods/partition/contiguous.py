"""Contiguous experts: blocks of neurons as the checkpoint stores them.

The order of neurons in a trained MLP carries no meaning, so this is a second control, and the one
partition that leaves the weights where they are. It is exempt from the rule that a permutation of
neurons changes nothing.

Shapes: T tokens, D model width, N neurons.
"""

import torch
from torch import Tensor

from moefy.models.mlp import DenseMlp


def contiguous(mlp: DenseMlp, x_TD: Tensor, num_experts: int, seed: int) -> Tensor:
    """Owner `[N]` of each neuron: its place divided by N / E. Reads no tokens and no seed."""
    return torch.arange(mlp.neurons) // (mlp.neurons // num_experts)
