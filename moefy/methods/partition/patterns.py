"""Gate patterns: neurons whose gates open on the same tokens form an expert (ExpertWeaver).

arXiv 2602.15521 clusters, under equal sizes, the activated gates of every neuron over a sample.

Shapes: T tokens, D model width, N neurons, R features.
"""

import torch
from torch import Tensor

from moefy.methods.partition.balanced import balanced_kmeans
from moefy.methods.partition.signals import MOST_FEATURES, principal, sample
from moefy.models.mlp import DenseMlp, activation_function


def gate_activity(mlp: DenseMlp, x_TD: Tensor) -> Tensor:
    """Activated gates `[T, N]`, or activations where there is no gate."""
    return activation_function(mlp.activation)(mlp.deciding(x_TD))


def patterns(mlp: DenseMlp, x_TD: Tensor, num_experts: int, seed: int) -> Tensor:
    """Owner `[N]` of each neuron, from its gate's activations on the tokens `x_TD`."""
    activity_NT = gate_activity(mlp, sample(x_TD, mlp.neurons)).T.contiguous()
    activity_NT = torch.nn.functional.normalize(activity_NT, dim=1)
    return balanced_kmeans(principal(activity_NT, MOST_FEATURES, seed), num_experts, seed)
