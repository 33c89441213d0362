"""Co-activation graph: neurons that contribute to the same tokens form an expert.

MoEfication (Zhang et al. 2022) weighs the edge between two neurons by how strongly they fire
together and cuts the graph into equal parts. Here a neuron's strength is the size of its
contribution, `A_jk = sum_t |h_tj| ||d_j|| |h_tk| ||d_k||`, which no gauge changes, and the cut is
spectral (Ng, Jordan and Weiss 2001): the leading eigenvectors of `D^-1/2 A D^-1/2`, rows set to
unit length, clustered under equal sizes. With `A = C'C` they are right singular vectors of the
scaled `C' [N, T]`, so the graph itself is never formed.

Shapes: T tokens, D model width, N neurons, R eigenvectors.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from moefy.methods.partition.balanced import balanced_kmeans
from moefy.methods.partition.signals import MOST_FEATURES, contributions, principal, sample
from moefy.models.mlp import DenseMlp


def coactivation(mlp: DenseMlp, x_TD: Tensor, num_experts: int, seed: int) -> Tensor:
    """Owner `[N]` of each neuron, from its contributions to the tokens `x_TD`."""
    scaled_NT = contributions(mlp, sample(x_TD, mlp.neurons))
    degree_N = scaled_NT @ scaled_NT.sum(dim=0)
    scaled_NT *= torch.where(degree_N > 0, degree_N, 1.0).rsqrt()[:, None]
    spectrum_NR = principal(scaled_NT, min(num_experts, MOST_FEATURES), seed)
    vectors_NR = spectrum_NR / torch.linalg.vector_norm(spectrum_NR, dim=0).clamp_min(1e-30)
    return balanced_kmeans(normalize(vectors_NR, dim=1), num_experts, seed)
