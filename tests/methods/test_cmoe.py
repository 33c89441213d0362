"""Partitions and shared experts of CMoE and ExpertWeaver against plain references.

Shapes: T tokens, D width, N neurons, E experts, C domains.
"""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from moefy.errors import RecipeError
from moefy.methods.partition import Partition, partition
from moefy.methods.partition.clusters import cmoe, gate_activity, marker_table
from moefy.methods.partition.shared import SHARED_BY, shared_share, variation
from moefy.models.mlp import DenseMlp

T, D, N, E = 150, 8, 60, 6
SIZE = N // E


def make_mlp(gated: bool = True, seed: int = 0, neurons: int = N) -> DenseMlp:
    g = torch.Generator().manual_seed(seed)
    return DenseMlp(
        up_ND=torch.randn(neurons, D, generator=g),
        down_ND=torch.randn(neurons, D, generator=g),
        gate_ND=torch.randn(neurons, D, generator=g) if gated else None,
        activation="silu" if gated else "gelu",
    )


def inputs(seed: int = 1, tokens: int = T) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed)) * 3 + 0.5


def unit(value: np.ndarray) -> np.ndarray:
    return value / np.linalg.norm(value, axis=-1, keepdims=True)


def naive_act(mlp: DenseMlp, value: np.ndarray) -> np.ndarray:
    if mlp.activation == "silu":
        return value / (1 + np.exp(-value))
    return value * 0.5 * (1 + np.vectorize(math.erf)(value / math.sqrt(2)))


def naive_markers(mlp: DenseMlp, x_TD: Tensor) -> np.ndarray:
    """`[N, T]`, with numpy in fp64, by sorting."""
    x, up = unit(x_TD.double().numpy()), unit(mlp.up_ND.double().numpy())
    if mlp.gate_ND is None:
        strength = naive_act(mlp, x @ up.T)
    else:
        strength = naive_act(mlp, x @ unit(mlp.gate_ND.double().numpy()).T) * (x @ up.T)
    table = np.zeros(strength.shape)
    for t in range(len(strength)):
        table[t, np.argsort(-np.abs(strength[t]))[:10]] = 1
    return table.T


@pytest.mark.parametrize("gated", [True, False])
def test_markers_are_the_ten_strongest_of_each_token(gated: bool) -> None:
    mlp, x_TD = make_mlp(gated), inputs()
    got = marker_table(mlp, x_TD).numpy()
    assert (got.sum(0) == 10).all()
    assert np.array_equal(got, naive_markers(mlp, x_TD))
    few = marker_table(make_mlp(gated, neurons=6), x_TD)
    assert few.all()


def naive_cost(markers: np.ndarray, seeds: list[int]) -> np.ndarray:
    """L1 distances `[N, E]` between columns of markers, one pair at a time."""
    return np.array([[np.abs(row - markers[seed]).sum() for seed in seeds] for row in markers])


def untied(mlp: DenseMlp, seed: int, *ranks: int) -> tuple[Tensor, np.ndarray]:
    """Inputs for which the neurons before and after these ranks are not marked equally often."""
    for trial in range(100 * seed, 100 * seed + 100):
        x_TD = inputs(trial)
        markers = naive_markers(mlp, x_TD)
        ranked = -np.sort(-markers.mean(1))
        if all(ranked[rank - 1] > ranked[rank] for rank in ranks):
            return x_TD, markers
    raise AssertionError("no such inputs")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_cmoe_is_an_exact_balanced_assignment_to_the_seeds(gated: bool, seed: int) -> None:
    mlp = make_mlp(gated, seed)
    x_TD, markers = untied(mlp, seed, E)
    rate_N = markers.mean(1)
    seeds = np.argsort(-rate_N, kind="stable")[:E].tolist()
    cost = naive_cost(markers, seeds)
    # The reference: every expert's column as often as it has places, one linear assignment.
    row, column = linear_sum_assignment(np.repeat(cost, SIZE, axis=1))
    best = np.repeat(cost, SIZE, axis=1)[row, column].sum()
    owner_N = cmoe(mlp, x_TD, E, 0)
    assert torch.bincount(owner_N).tolist() == [SIZE] * E
    # Seeds of equal rate may come in any order: experts are matched by whom they lie nearest to.
    table = np.array([[cost[owner_N == e, s].sum() for s in range(E)] for e in range(E)])
    match = linear_sum_assignment(table)
    assert len({round(rate_N[s] * T) for s in seeds}) > 1
    assert table[match].sum() == pytest.approx(best)
    # Neither rounds of moving on from there nor chance come as low.
    other = owner_N[torch.randperm(N, generator=torch.Generator().manual_seed(0))].numpy()
    assert sum(cost[n, match[1][other[n]]] for n in range(N)) > 1.02 * best


def test_cmoe_shares_the_most_marked_and_seeds_with_the_next() -> None:
    mlp = make_mlp()
    x_TD, table = untied(mlp, 0, 2 * SIZE, 2 * SIZE + E - 2)
    found = partition(mlp, x_TD, experts=E, method="cmoe", shared=2, shared_by="activation_rate")
    rate_N = table.mean(1)
    shared_N = (found.owner_N < 2).numpy()
    assert rate_N[shared_N].min() >= rate_N[~shared_N].max()
    # Of the routed neurons the best marked are seeds: one each, nearest to itself.
    routed = np.flatnonzero(~shared_N)
    first = routed[np.argsort(-rate_N[routed], kind="stable")]
    seeds = first[: E - 2]
    assert len({int(found.owner_N[n]) for n in seeds}) == E - 2
    # Markers are those among all neurons, shared ones too, and the assignment is the best there is.
    markers = table[routed]
    cost = naive_cost(markers, [int(np.flatnonzero(routed == s)[0]) for s in seeds])
    wide = np.repeat(cost, SIZE, axis=1)
    best = wide[linear_sum_assignment(wide)].sum()
    expert_of_seed = [int(found.owner_N[s]) for s in seeds]
    got = sum(cost[i, expert_of_seed.index(int(found.owner_N[n]))] for i, n in enumerate(routed))
    assert got == pytest.approx(best)


# ---- ExpertWeaver


def test_gate_activity_is_the_activated_gate_or_the_activation() -> None:
    for gated in (True, False):
        mlp, x_TD = make_mlp(gated), inputs()
        rows = mlp.up_ND if mlp.gate_ND is None else mlp.gate_ND
        want = naive_act(mlp, x_TD.double().numpy() @ rows.double().numpy().T)
        got = gate_activity(mlp, x_TD).double().numpy()
        assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)


def planted(gated: bool) -> tuple[DenseMlp, Tensor, Tensor]:
    """Neurons whose gates open on the same topics, up rows that say nothing, tokens of a topic."""
    g = torch.Generator().manual_seed(2)
    topics_ED = torch.linalg.qr(torch.randn(D, D, generator=g)).Q[:E]
    group_N = (torch.arange(N) % E)[torch.randperm(N, generator=g)]
    rows_ND = topics_ED[group_N] + 0.05 * torch.randn(N, D, generator=g)
    noise_ND = torch.randn(N, D, generator=g)
    mlp = DenseMlp(
        up_ND=noise_ND if gated else rows_ND,
        down_ND=torch.randn(N, D, generator=g),
        gate_ND=rows_ND if gated else None,
        activation="silu" if gated else "relu",
    )
    x_TD = 3 * topics_ED[torch.randint(E, (600,), generator=g)]
    return mlp, x_TD + 0.3 * torch.randn(600, D, generator=g), group_N


@pytest.mark.parametrize("gated", [True, False])
def test_patterns_finds_gates_that_open_together(gated: bool) -> None:
    mlp, x_TD, group_N = planted(gated)
    found = partition(mlp, x_TD, experts=E, method="patterns")
    assert adjusted_rand_score(group_N, found.owner_N) > 0.95
    if gated:
        other = DenseMlp(
            up_ND=mlp.up_ND.flip(0),
            down_ND=mlp.down_ND.flip(1),
            gate_ND=mlp.gate_ND,
            activation="silu",
        )
        again = partition(other, x_TD, experts=E, method="patterns")
        assert adjusted_rand_score(found.owner_N, again.owner_N) > 0.95


DOMAINS = torch.arange(T) % 3


def naive_variation(mlp: DenseMlp, x_TD: Tensor, domain_T: Tensor) -> np.ndarray:
    activity = np.abs(gate_activity(mlp, x_TD).double().numpy())
    domains = sorted(set(domain_T.tolist()))
    means = [activity[(domain_T == d).numpy()].mean(0) for d in domains]
    return np.array(
        [
            math.sqrt(
                sum((m[n] - np.mean([k[n] for k in means])) ** 2 for m in means) / (len(means) - 1)
            )
            / np.mean([m[n] for m in means])
            for n in range(mlp.neurons)
        ]
    )


def test_rankings_by_a_plain_computation() -> None:
    mlp, x_TD = make_mlp(), inputs()
    x_TD[DOMAINS == 1] *= 3
    want = {
        "variation": -naive_variation(mlp, x_TD, DOMAINS),
        "activation_rate": naive_markers(mlp, x_TD).mean(1),
        "contribution": (
            mlp.hidden(x_TD).double().abs().mean(0) * mlp.down_ND.double().norm(dim=1)
        ),
    }
    assert set(want) == set(SHARED_BY)
    for name, ranking in SHARED_BY.items():
        got = ranking(mlp, x_TD, DOMAINS).double()
        wanted = torch.as_tensor(want[name])
        assert ((got - wanted).norm() / wanted.norm()) < 1e-5
        found = partition(
            mlp, x_TD, experts=E, method="random", shared=2, shared_by=name, domain_T=DOMAINS
        )
        on_N = found.owner_N < 2
        assert wanted[on_N].min() >= wanted[~on_N].max() - 1e-6
        assert on_N.sum() == 2 * SIZE


def test_variation_needs_domains_to_compare() -> None:
    for domain_T in (None, torch.zeros(T, dtype=torch.int64)):
        with pytest.raises(RecipeError, match="fewer than two"):
            variation(make_mlp(), inputs(), domain_T)


def test_the_rule_shares_less_where_neurons_are_specialised() -> None:
    assert shared_share(torch.zeros(10)) == pytest.approx(0.7)
    assert shared_share(torch.ones(10)) == pytest.approx(0.2)
    assert shared_share(torch.tensor([0.59, 0.61, 0.1, 2.0])) == pytest.approx(0.45)


def shared_of(experts: int, **options: object) -> Partition:
    mlp, x_TD = make_mlp(), inputs()
    x_TD[DOMAINS == 1] *= 3
    return partition(
        mlp,
        x_TD,
        experts=experts,
        method="random",
        shared=None,
        shared_by="variation",
        domain_T=DOMAINS,
        **options,  # type: ignore[arg-type]
    )


def test_shared_null_follows_the_rule_up_to_the_cap() -> None:
    mlp, x_TD = make_mlp(), inputs()
    x_TD[DOMAINS == 1] *= 3
    # The partition looks at the canonical gauge, which leaves gates of SiLU as they are.
    special = (naive_variation(mlp, x_TD, DOMAINS) > 0.6).mean()
    assert 0.05 < special < 0.95
    for experts in (6, 12, 30, 60):
        assert abs(shared_of(experts).shared - (0.7 - 0.5 * special) * experts) < 0.5 + 1e-6
        assert shared_of(experts, most_shared=1).shared == 1
        assert shared_of(experts, most_shared=0).shared == 0
    assert shared_of(1).shared == 0
    assert shared_of(1, most_shared=5).shared == 0
