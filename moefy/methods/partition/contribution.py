"""Experts by contribution: neurons that matter on the same tokens, as far as a router can tell.

moefy's own method, in two steps, both on the size of contributions `h_j d_j` and so the same in
every gauge.

When: the profile of a neuron is the size of its contribution to each token of the sample, and
balanced k-means of the profiles puts neurons together that matter together. A profile's length is
set to the square root of its loudness: a loud neuron in the wrong expert costs more than a quiet
one, but loudness alone must not shape the experts.

Where a router can follow: a partition is worth what a router can predict of it (in MoEfication's
own tables an oracle does as well on random experts as on clustered ones). So the neurons are then
grouped again around what a router would switch on. Each round predicts the energy of every expert
(the squared contributions of its neurons, as a root) from the MLP's input by ridge regression,
takes the top quarter of the experts for each token, and moves neurons, sizes held equal, to the
expert that is on where their energy is. The partition that lost the least energy to its own router
is kept. With too many experts for one level of clusters, only the first step is done.

Shapes: T tokens, D model width, N neurons, E experts, K experts on per token, R features of inputs.
"""

import torch
from torch import Tensor

from moefy.methods.partition.balanced import assign, balanced_kmeans, one_level
from moefy.methods.partition.signals import MOST_FEATURES, contributions, principal, sample
from moefy.models.mlp import DenseMlp

ROUNDS = 10
ACTIVE_SHARE = 0.25
"""Experts on per token while routing is imitated; the gain holds at a half as well."""

RIDGE = 1e-2
"""Penalty of the regression over the mean variance of its features."""


def contribution(mlp: DenseMlp, x_TD: Tensor, num_experts: int, seed: int) -> Tensor:
    """Experts by contribution: neurons that matter on the same tokens, as far as a router can tell.

    Owner `[N]` of each neuron, from its contributions to the tokens `x_TD`.
    """
    x_TD = sample(x_TD, mlp.neurons)
    profile_NT = contributions(mlp, x_TD)
    energy_NT = profile_NT.square()
    profile_NT /= torch.linalg.vector_norm(profile_NT, dim=1, keepdim=True).clamp_min(1e-30).sqrt()
    owner_N = balanced_kmeans(principal(profile_NT, MOST_FEATURES, seed), num_experts, seed)
    del profile_NT
    if 1 < num_experts < mlp.neurons and one_level(mlp.neurons, num_experts):
        return _follow_router(energy_NT, x_TD, owner_N, num_experts, seed)
    return owner_N


def _follow_router(
    energy_NT: Tensor, x_TD: Tensor, owner_N: Tensor, experts: int, seed: int
) -> Tensor:
    """The owners after rounds of predicting which experts run and moving neurons to follow."""
    features_TR = _input_features(x_TD, seed)
    square_RR = features_TR.T @ features_TR
    square_RR.diagonal().add_(RIDGE * square_RR.diagonal().mean())
    factor_RR = torch.linalg.cholesky(square_RR)
    active = max(1, round(ACTIVE_SHARE * experts))
    kept_N, least = owner_N, float("inf")
    for _ in range(ROUNDS):
        members = owner_N.argsort(stable=True).view(experts, -1)
        size_TE = torch.stack([energy_NT[row].sum(dim=0) for row in members], dim=1).sqrt_()
        weight_RE = torch.cholesky_solve(features_TR.T @ size_TE, factor_RR)
        on_TK = (features_TR @ weight_RE).topk(active, dim=1).indices
        lost_NE = energy_NT @ torch.ones_like(size_TE).scatter_(1, on_TK, 0.0)
        lost = float(lost_NE.gather(1, owner_N[:, None]).sum(dtype=torch.float64))
        if lost < least:
            kept_N, least = owner_N, lost
        moved_N = assign(lost_NE, owner_N)
        if torch.equal(moved_N, owner_N):
            break
        owner_N = moved_N
    return kept_N


def _input_features(x_TD: Tensor, seed: int) -> Tensor:
    """Standardised inputs on their leading directions, and a constant of like size: `[T, R + 1]`."""
    x_TD = (x_TD - x_TD.mean(dim=0)) / x_TD.std(dim=0, correction=0).clamp_min(1e-6)
    short_TR = principal(x_TD, MOST_FEATURES, seed)
    constant = short_TR.square().mean().sqrt().clamp_min(1.0)
    return torch.cat([short_TR, constant.expand(len(x_TD), 1)], dim=1)
