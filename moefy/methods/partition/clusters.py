"""Experts as clusters of neurons: by their weights, by what they do on the same tokens, and controls.

Shapes: T tokens, D model width, N neurons, E experts, R features, M marks per token.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import linear, normalize

from moefy.methods.partition.balanced import assign, balanced_kmeans
from moefy.methods.partition.signals import MOST_FEATURES, contributions, principal, sample
from moefy.models.mlp import DenseMlp, activation_function


def kmeans(mlp: DenseMlp, x_TD: Tensor, num_experts: int, seed: int) -> Tensor:
    """Balanced k-means on input weights: neurons that look for the same thing form an expert.

    MoEfication (Zhang et al. 2022, "MoEfication: Transformer Feed-forward Layers are Mixtures of
    Experts") clusters the L2-normalised rows of the input projection under equal sizes; with a gated
    MLP the rows of the gate take their place. Rows longer than 256 are first put on their leading 256
    singular directions.

    Owner `[N]` of each neuron. Reads no tokens.
    """
    rows_ND = normalize(mlp.up_ND if mlp.gate_ND is None else mlp.gate_ND, dim=1)
    return balanced_kmeans(principal(rows_ND, MOST_FEATURES, seed), num_experts, seed)


def coactivation(mlp: DenseMlp, x_TD: Tensor, num_experts: int, seed: int) -> Tensor:
    """Co-activation graph: neurons that contribute to the same tokens form an expert.

    MoEfication (Zhang et al. 2022) weighs the edge between two neurons by how strongly they fire
    together and cuts the graph into equal parts. Here a neuron's strength is the size of its
    contribution, `A_jk = sum_t |h_tj| ||d_j|| |h_tk| ||d_k||`, which no gauge changes, and the cut is
    spectral (Ng, Jordan and Weiss 2001): the leading eigenvectors of `D^-1/2 A D^-1/2`, rows set to
    unit length, clustered under equal sizes. With `A = C'C` they are right singular vectors of the
    scaled `C' [N, T]`, so the graph itself is never formed.

    Owner `[N]` of each neuron, from its contributions to the tokens `x_TD`.
    """
    scaled_NT = contributions(mlp, sample(x_TD, mlp.neurons))
    degree_N = scaled_NT @ scaled_NT.sum(dim=0)
    scaled_NT *= torch.where(degree_N > 0, degree_N, 1.0).rsqrt()[:, None]
    spectrum_NR = principal(scaled_NT, min(num_experts, MOST_FEATURES), seed)
    vectors_NR = spectrum_NR / torch.linalg.vector_norm(spectrum_NR, dim=0).clamp_min(1e-30)
    return balanced_kmeans(normalize(vectors_NR, dim=1), num_experts, seed)


LEAST_MARKS = 10
MARKED_SHARE = 1 / 64


def markers(mlp: DenseMlp, x_TD: Tensor, num_experts: int, seed: int) -> Tensor:
    """Activation markers: neurons that are among the loudest on the same tokens form an expert.

    CMoE (Pei et al. 2025, "CMoE: Fast Carving of Mixture-of-Experts for Efficient LLM Inference")
    marks, for every token, the few neurons of largest activation, and clusters the binary columns of
    marks under equal sizes. Three departures: neurons are ranked by the size of their contribution
    `|h_j| ||d_j||` where CMoE ranks `|h_j|`, which depends on the gauge; the count of marks a token
    gives grows with N (CMoE: 10 of about 11,000); and the clustering starts from k-means++ seeds and
    runs to convergence where CMoE makes one assignment to the columns of the most active neurons.

    Owner `[N]` of each neuron, from which of them lead on the tokens `x_TD`.
    """
    found_NT = contributions(mlp, sample(x_TD, mlp.neurons))
    marks = min(mlp.neurons, max(LEAST_MARKS, round(MARKED_SHARE * mlp.neurons)))
    leaders_MT = found_NT.topk(marks, dim=0).indices
    found_NT.zero_().scatter_(0, leaders_MT, 1.0)
    return balanced_kmeans(principal(found_NT, MOST_FEATURES, seed), num_experts, seed)


def gate_activity(mlp: DenseMlp, x_TD: Tensor) -> Tensor:
    """Activated gates `[T, N]`, or activations without a gate."""
    return activation_function(mlp.activation)(mlp.deciding(x_TD))


def patterns(mlp: DenseMlp, x_TD: Tensor, num_experts: int, seed: int) -> Tensor:
    """Gate patterns: neurons whose gates open on the same tokens form an expert (ExpertWeaver).

    arXiv 2602.15521 clusters, under equal sizes, the activated gates of every neuron over a sample.

    Owner `[N]` of each neuron, from its gate's activations on the tokens `x_TD`.
    """
    activity_NT = gate_activity(mlp, sample(x_TD, mlp.neurons)).T.contiguous()
    activity_NT = torch.nn.functional.normalize(activity_NT, dim=1)
    return balanced_kmeans(principal(activity_NT, MOST_FEATURES, seed), num_experts, seed)


MARKS = 10
EXACT_LIMIT = 4096
"""Most neurons for which the assignment is solved exactly (cubic); beyond, by prices and swaps."""


def marker_table(mlp: DenseMlp, x_TD: Tensor) -> Tensor:
    """1 where a neuron is among the `MARKS` strongest of the token, else 0: `[N, T]`."""
    act, x_TD = activation_function(mlp.activation), normalize(x_TD.float(), dim=-1)
    strength_TN = linear(x_TD, normalize(mlp.up_ND.float(), dim=-1))
    if mlp.gate_ND is None:
        strength_TN = act(strength_TN)
    else:
        strength_TN = act(linear(x_TD, normalize(mlp.gate_ND.float(), dim=-1))) * strength_TN
    leaders_TM = strength_TN.abs().topk(min(MARKS, mlp.neurons), dim=1).indices
    return torch.zeros_like(strength_TN).scatter_(1, leaders_TM, 1.0).T.contiguous()


def cmoe(
    mlp: DenseMlp, x_TD: Tensor, num_experts: int, seed: int, routed_N: Tensor | None = None
) -> Tensor:
    """CMoE's own carving: binary markers, seeds of highest rate, one exact balanced assignment.

    Pei et al. 2025, as their code does it: with token, gate and up rows normalised, the 10 neurons of
    largest `|act(g.x) (u.x)|` are a token's markers; the neurons marked most often are shared; the next
    most often marked seed the routed experts; the others go to the nearest seed by L1 distance of marker
    columns, sizes equal, by one solution of the assignment problem. The `markers` ranks by contribution and
    iterates.

    Owner of each neuron in `routed_N` (all); markers are found among all neurons of `mlp`.
    """
    routed_N = torch.arange(mlp.neurons) if routed_N is None else routed_N
    marker_NT = marker_table(mlp, x_TD)[routed_N]
    rate_N = marker_NT.mean(1)
    seeds_E = rate_N.topk(num_experts).indices
    # Binary columns: |a - b| summed is |a| + |b| - 2 a.b
    cost_NE = (
        rate_N[:, None]
        + rate_N[seeds_E]
        - 2 / marker_NT.shape[1] * (marker_NT @ marker_NT[seeds_E].T)
    )
    if len(routed_N) > EXACT_LIMIT:
        return assign(cost_NE)
    size = len(routed_N) // num_experts
    row, column = linear_sum_assignment(cost_NE.double().repeat_interleave(size, dim=1).numpy())
    owner_N = torch.empty(len(routed_N), dtype=torch.int64)
    owner_N[torch.from_numpy(row)] = torch.from_numpy(column) // size
    return owner_N


def random(mlp: DenseMlp, x_TD: Tensor, num_experts: int, seed: int) -> Tensor:
    """Random experts: the control every other method must beat.

    Owner `[N]` of each neuron: a uniformly drawn balanced partition. Reads no tokens.
    """
    order_N = torch.randperm(mlp.neurons, generator=torch.Generator().manual_seed(seed))
    owner_N = torch.empty(mlp.neurons, dtype=torch.int64)
    owner_N[order_N] = torch.arange(mlp.neurons) // (mlp.neurons // num_experts)
    return owner_N


def contiguous(mlp: DenseMlp, x_TD: Tensor, num_experts: int, seed: int) -> Tensor:
    """Contiguous experts: blocks of neurons as the checkpoint stores them.

    The order of neurons in a trained MLP carries no meaning, so this is a second control, and the one
    partition that leaves the weights where they are. It is exempt from the rule that a permutation of
    neurons changes nothing.

    Owner `[N]` of each neuron: its place divided by N / E. Reads no tokens and no seed.
    """
    return torch.arange(mlp.neurons) // (mlp.neurons // num_experts)
