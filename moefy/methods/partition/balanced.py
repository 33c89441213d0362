"""Balanced k-means: clusters of exactly equal size, at the scale of a large MLP.

Each round assigns points to centroids under equal capacity and moves the centroids. The assignment
is a transport problem: entropic prices (Sinkhorn iterations in the log domain, Cuturi 2013) bring
demand near capacity, a vectorised rounding by regret makes it exact, and swaps of two points
remove what rounding lost. Cost per round is a few passes over the `[N, E]` distances: nothing is
cubic, and no `[N, N]` matrix is formed. Very many clusters are found in two levels.

Shapes: N points, R features, E clusters, F = N / E points per cluster.
"""

import math

import numpy as np
import torch
from torch import Tensor

FLAT_LIMIT = 2**24
"""Largest N * E that is clustered in one level (64 MiB of distances)."""

ROUNDS = 12
PRICE_STEPS = 24
POLISH_ROUNDS = 30


def balanced_kmeans(features_NR: Tensor, clusters: int, seed: int) -> Tensor:
    """Owner `[N]` (int64, 0..E-1) of each point; every cluster has exactly N / E points.

    Minimises the sum of squared distances to the cluster mean, to a local optimum that depends on
    the seed. Raises `ValueError` if `clusters` does not divide N.
    """
    points = len(features_NR)
    size, rest = divmod(points, clusters)
    if rest:
        raise ValueError(f"{points} points do not split into {clusters} equal clusters")
    if clusters == 1 or size == 1:
        return torch.arange(points) // size
    features_NR = features_NR.to(torch.float32)
    groups = _groups(points, clusters)
    if groups > 1:
        return _two_levels(features_NR, clusters, groups, seed)
    return _one_level(features_NR, clusters, seed)


def inertia(features_NR: Tensor, owner_N: Tensor, clusters: int) -> float:
    """Sum of squared distances of the points to the mean of their cluster."""
    centroids_ER = _centroids(features_NR, owner_N, clusters)
    return float((features_NR - centroids_ER[owner_N]).square().sum(dtype=torch.float64))


def assign(
    cost_NE: Tensor, owner_N: Tensor | None = None, prices_E: Tensor | None = None
) -> Tensor:
    """Owner `[N]` of nearly least total cost `[N, E]` under exactly equal cluster sizes.

    With a start `owner_N` the result never costs more than it. `prices_E` warm-starts the prices
    and is updated in place.
    """
    points, clusters = cost_NE.shape
    if prices_E is None:
        prices_E = torch.zeros(clusters)
    _update_prices(cost_NE, prices_E, points // clusters)
    found_N = swap(cost_NE, _round(cost_NE - prices_E, points // clusters))
    if owner_N is not None and _total(cost_NE, owner_N) <= _total(cost_NE, found_N):
        return owner_N
    return found_N


def swap(cost_NE: Tensor, owner_N: Tensor) -> Tensor:
    """Exchange pairs of points between clusters while that lowers the total cost `[N, E]`."""
    points, clusters = cost_NE.shape
    slack = 1e-6 * float(cost_NE.abs().mean())
    every_E = torch.arange(clusters)
    members_EF = owner_N.argsort(stable=True).view(clusters, -1).clone()
    # leave_EE[a, b]: least cost of moving one member of a to b; place_EE: where in a it stands.
    leave_EE = torch.empty(clusters, clusters)
    place_EE = torch.empty(clusters, clusters, dtype=torch.int64)
    changed = every_E
    for _ in range(points):
        for rows in changed.split(32):
            cost = cost_NE[members_EF[rows]]
            own = cost.gather(2, rows[:, None, None].expand(-1, cost.shape[1], 1))
            leave_EE[rows], place_EE[rows] = cost.sub_(own).min(dim=1)
        gain_EE = leave_EE + leave_EE.T
        gain_EE.fill_diagonal_(math.inf)
        gain_E, partner_E = gain_EE.min(dim=1)
        # Pairs of clusters that are each other's best exchange do not overlap.
        mutual_E = (partner_E[partner_E] == every_E) & (gain_E < -slack)
        one = every_E[mutual_E & (every_E < partner_E)]
        if not len(one):
            break
        other = partner_E[one]
        there, back = place_EE[one, other], place_EE[other, one]
        going = members_EF[one, there]
        members_EF[one, there] = members_EF[other, back]
        members_EF[other, back] = going
        changed = torch.cat([one, other])
    owner_N = torch.empty_like(owner_N)
    owner_N[members_EF.flatten()] = every_E.repeat_interleave(members_EF.shape[1])
    return owner_N


def _one_level(features_NR: Tensor, clusters: int, seed: int) -> Tensor:
    """K-means++ seeds, then rounds of assignment and means until nothing improves."""
    centroids_ER = features_NR[_seeds(features_NR, clusters, seed)]
    prices_E = torch.zeros(clusters)
    owner_N: Tensor | None = None
    for _ in range(ROUNDS):
        found_N = assign(_distances(features_NR, centroids_ER), owner_N, prices_E)
        if owner_N is not None and torch.equal(found_N, owner_N):
            break
        owner_N = found_N
        centroids_ER = _centroids(features_NR, owner_N, clusters)
    assert owner_N is not None
    for _ in range(POLISH_ROUNDS):
        found_N = swap(_distances(features_NR, centroids_ER), owner_N)
        if torch.equal(found_N, owner_N):
            break
        owner_N = found_N
        centroids_ER = _centroids(features_NR, owner_N, clusters)
    return owner_N


def _seeds(features_NR: Tensor, clusters: int, seed: int) -> Tensor:
    """Greedy k-means++ (Arthur and Vassilvitskii 2007): each next seed is the best of a few points
    drawn with probability proportional to the squared distance to the seeds so far.

    scikit-learn has the same, but goes to fp64 and back at every step: an order of magnitude slower
    for many clusters.
    """
    random = np.random.default_rng(seed)
    trials = 2 + int(math.log(clusters))
    norm_N = features_NR.square().sum(1)
    seeds = [int(random.integers(len(features_NR)))]
    nearest_N = torch.full_like(norm_N, math.inf)
    tried = torch.tensor(seeds)
    while True:
        distance_NC = torch.addmm(norm_N[tried], features_NR, features_NR[tried].T, alpha=-2)
        distance_NC = (distance_NC + norm_N[:, None]).clamp_min_(0).minimum(nearest_N[:, None])
        best = int(distance_NC.sum(0).argmin())
        nearest_N = distance_NC[:, best].contiguous()
        seeds[-1:] = [int(tried[best])]
        if len(seeds) == clusters:
            return torch.tensor(seeds)
        cumulative_N = nearest_N.cumsum(0, dtype=torch.float64)
        draw_C = torch.from_numpy(random.random(trials)) * cumulative_N[-1]
        tried = torch.searchsorted(cumulative_N, draw_C).clamp_max_(len(norm_N) - 1)
        seeds.append(-1)


def one_level(points: int, clusters: int) -> bool:
    """Whether the `[N, E]` distances are small enough to work on all clusters at once."""
    return points * clusters <= FLAT_LIMIT


def _groups(points: int, clusters: int) -> int:
    """Clusters of the upper level: 1 where one level is small enough, else a divisor near the
    square root of the count (1 again without one)."""
    if one_level(points, clusters):
        return 1
    divisors = [d for d in range(2, clusters // 2 + 1) if clusters % d == 0]
    return min(divisors, key=lambda d: (abs(math.log(d * d / clusters)), d), default=1)


def _two_levels(features_NR: Tensor, clusters: int, groups: int, seed: int) -> Tensor:
    group_N = balanced_kmeans(features_NR, groups, seed)
    owner_N = torch.empty_like(group_N)
    per_group = clusters // groups
    for group in range(groups):
        members = (group_N == group).nonzero()[:, 0]
        owner = balanced_kmeans(features_NR[members], per_group, seed + group + 1)
        owner_N[members] = group * per_group + owner
    return owner_N


def _centroids(features_NR: Tensor, owner_N: Tensor, clusters: int) -> Tensor:
    """Means of equal clusters `[E, R]`: members side by side, so the sum has a fixed order."""
    members = owner_N.argsort(stable=True)
    return features_NR[members].view(clusters, -1, features_NR.shape[1]).mean(dim=1)


def _distances(features_NR: Tensor, centroids_ER: Tensor) -> Tensor:
    """Squared distances `[N, E]`, less the point's own norm, which no assignment changes."""
    return torch.addmm(centroids_ER.square().sum(1), features_NR, centroids_ER.T, alpha=-2)


def _total(cost_NE: Tensor, owner_N: Tensor) -> float:
    return float(cost_NE.gather(1, owner_N[:, None]).sum(dtype=torch.float64))


def _update_prices(cost_NE: Tensor, prices_E: Tensor, size: int) -> None:
    """Raise the price (lower the value) of clusters in more demand than `size`, in place."""
    best_N2 = (cost_NE - prices_E).topk(2, dim=1, largest=False).values
    temperature = 0.5 * float((best_N2[:, 1] - best_N2[:, 0]).mean())
    if temperature <= 0:
        return
    for _ in range(PRICE_STEPS):
        demand_E = ((prices_E - cost_NE) / temperature).softmax(dim=1).sum(dim=0)
        prices_E += temperature * (math.log(size) - demand_E.clamp_min(1e-9).log())


def _round(cost_NE: Tensor, size: int) -> Tensor:
    """Fill clusters to `size`: every free point asks for its cheapest open cluster, and each
    cluster takes those that would lose most by going to their second choice."""
    points, clusters = cost_NE.shape
    owner_N = torch.full((points,), -1)
    room_E = torch.full((clusters,), size)
    free = torch.arange(points)
    while len(free):
        open_E = room_E.nonzero()[:, 0]
        cost = cost_NE[free][:, open_E]
        best = cost.topk(min(2, len(open_E)), dim=1, largest=False)
        wish = open_E[best.indices[:, 0]]
        regret = best.values[:, -1] - best.values[:, 0]
        by_regret = regret.argsort(descending=True, stable=True)
        queue = by_regret[wish[by_regret].argsort(stable=True)]
        asked_E = torch.bincount(wish, minlength=clusters)
        place = torch.arange(len(free)) - (asked_E.cumsum(0) - asked_E)[wish[queue]]
        taken = queue[place < room_E[wish[queue]]]
        owner_N[free[taken]] = wish[taken]
        room_E -= torch.bincount(wish[taken], minlength=clusters)
        keep = torch.ones(len(free), dtype=torch.bool)
        keep[taken] = False
        free = free[keep]
    return owner_N
