"""Activation markers: neurons that are among the loudest on the same tokens form an expert.

CMoE (Pei et al. 2025, "CMoE: Fast Carving of Mixture-of-Experts for Efficient LLM Inference")
marks, for every token, the few neurons of largest activation, and clusters the binary columns of
marks under equal sizes. Three departures: neurons are ranked by the size of their contribution
`|h_j| ||d_j||` where CMoE ranks `|h_j|`, which depends on the gauge; the count of marks a token
gives grows with N (CMoE: 10 of about 11,000); and the clustering starts from k-means++ seeds and
runs to convergence where CMoE makes one assignment to the columns of the most active neurons.

Shapes: T tokens, D model width, N neurons, M marks per token.
"""

from torch import Tensor

from moefy.methods.partition.balanced import balanced_kmeans
from moefy.methods.partition.signals import MOST_FEATURES, contributions, principal, sample
from moefy.models.mlp import DenseMlp

LEAST_MARKS = 10
MARKED_SHARE = 1 / 64


def markers(mlp: DenseMlp, x_TD: Tensor, num_experts: int, seed: int) -> Tensor:
    """Owner `[N]` of each neuron, from which of them lead on the tokens `x_TD`."""
    found_NT = contributions(mlp, sample(x_TD, mlp.neurons))
    marks = min(mlp.neurons, max(LEAST_MARKS, round(MARKED_SHARE * mlp.neurons)))
    leaders_MT = found_NT.topk(marks, dim=0).indices
    found_NT.zero_().scatter_(0, leaders_MT, 1.0)
    return balanced_kmeans(principal(found_NT, MOST_FEATURES, seed), num_experts, seed)
