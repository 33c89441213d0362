"""Experts by contribution: neurons that matter on the same tokens, as far as a router can tell.

moefy's own method, in two steps, both on contributions `h_j d_j` and so the same in every gauge.

When: the profile of a neuron is the size of its contribution to each token of the sample, and
balanced k-means of the profiles puts neurons together that matter together. A profile's length is
set to the square root of its loudness: a loud neuron in the wrong expert costs more than a quiet
one, but loudness alone must not shape the experts.

Where a router can follow: a partition is worth what a router can predict of it (in MoEfication's
own tables an oracle does as well on random experts as on clustered ones). So the profiles are then
clustered again around what a router would switch on. Each round fits the norm of every expert's
output by ridge regression on the MLP's input, takes the top quarter of the experts for each token,
and moves neurons, sizes held equal, to the expert that is on where their squared contribution is.
The partition that lost the least squared contribution to its own router is kept. Where experts are
so many that clusters are found in two levels, the first step is all.

Shapes: T tokens, D model width, N neurons, E experts, F neurons per expert, R features of inputs.
"""

import torch
from torch import Tensor

from moefy.mlp import DenseMlp
from moefy.partition.balanced import assign, balanced_kmeans, one_level
from moefy.partition.signals import CHUNK, MOST_FEATURES, hidden, principal, sample

ROUNDS = 10
ACTIVE_SHARE = 0.25
"""Experts on per token while routing is imitated; the gain holds at a half as well."""

RIDGE = 1e-2
"""Penalty of the regression over the mean variance of its features."""


def contribution(mlp: DenseMlp, x_TD: Tensor, num_experts: int, seed: int) -> Tensor:
    """Owner `[N]` of each neuron, from its contributions to the tokens `x_TD`."""
    x_TD = sample(x_TD, mlp.neurons)
    size_N = torch.linalg.vector_norm(mlp.down_ND, dim=1)
    h_TN = hidden(mlp, x_TD)
    profile_TN = h_TN.abs().mul_(size_N)
    profile_TN /= torch.linalg.vector_norm(profile_TN, dim=0).clamp_min(1e-30).sqrt()
    owner_N = balanced_kmeans(principal(profile_TN.T, MOST_FEATURES, seed), num_experts, seed)
    del profile_TN
    if not 1 < num_experts < mlp.neurons or not one_level(mlp.neurons, num_experts):
        return owner_N
    features_TR = _input_features(x_TD, seed)
    square_RR = features_TR.T @ features_TR
    square_RR.diagonal().add_(RIDGE * square_RR.diagonal().mean())
    factor_RR = torch.linalg.cholesky(square_RR)
    active = max(1, round(ACTIVE_SHARE * num_experts))
    kept_N, least = owner_N, float("inf")
    for _ in range(ROUNDS):
        norm_TE = _expert_norms(mlp, h_TN, owner_N, num_experts)
        weight_RE = torch.cholesky_solve(features_TR.T @ norm_TE, factor_RR)
        on_TK = (features_TR @ weight_RE).topk(active, dim=1).indices
        off_TE = torch.ones_like(norm_TE).scatter_(1, on_TK, 0.0)
        lost_NE = torch.zeros(mlp.neurons, num_experts)
        for h_CN, off_CE in zip(h_TN.split(CHUNK), off_TE.split(CHUNK), strict=True):
            lost_NE.addmm_(h_CN.square().T, off_CE)
        lost_NE *= size_N.square()[:, None]
        lost = float(lost_NE.gather(1, owner_N[:, None]).sum(dtype=torch.float64))
        if lost < least:
            kept_N, least = owner_N, lost
        moved_N = assign(lost_NE, owner_N)
        if torch.equal(moved_N, owner_N):
            break
        owner_N = moved_N
    return kept_N


def _input_features(x_TD: Tensor, seed: int) -> Tensor:
    """Standardised inputs on their leading directions, and a constant: `[T, R + 1]`."""
    x_TD = (x_TD - x_TD.mean(dim=0)) / x_TD.std(dim=0).clamp_min(1e-6)
    short_TR = principal(x_TD, MOST_FEATURES, seed)
    return torch.cat([short_TR, short_TR.std().expand(len(x_TD), 1)], dim=1)


def _expert_norms(mlp: DenseMlp, h_TN: Tensor, owner_N: Tensor, experts: int) -> Tensor:
    """Norm of every expert's output on every token, `[T, E]`."""
    norm_TE = torch.empty(len(h_TN), experts)
    for expert, members_F in enumerate(owner_N.argsort(stable=True).view(experts, -1)):
        h_TF, down_FD = h_TN[:, members_F], mlp.down_ND[members_F]
        gram_FF = down_FD @ down_FD.T
        norm_TE[:, expert] = ((h_TF @ gram_FF) * h_TF).sum(dim=1).clamp_min(0).sqrt()
    return norm_TE
