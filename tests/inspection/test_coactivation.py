"""Co-activation against loops, margins, exact nulls, and pairs that are planted."""

import numpy as np
import pytest
from routing_samples import World, top_k

from moefy.inspection.routing import RoutingFrame
from moefy.inspection.routing.coactivation import (
    best_phi,
    between_layers,
    pair_tables,
    trade,
    traded_phi,
    within_layer,
)


def of(sample, *layers):
    frame = RoutingFrame(sample)
    return frame, *(frame.routed(layer) for layer in layers)


def test_figures_of_every_pair_against_loops():
    world = World(documents=10, length=30)
    mask_TE = world.draw(np.broadcast_to([1.0, 0.3, 0.6, 0.5, 0.1], (300, 5)))
    frame, routed = of(world.sample(mask_TE, shared=1), 0)
    pairs = within_layer(frame, routed)
    assert pairs.size == 6 and pairs.a_P.min() == 1
    for at, (a, b) in enumerate(zip(pairs.a_P, pairs.b_P, strict=True)):
        one, other = mask_TE[:, a], mask_TE[:, b]
        both = (one & other).sum()
        values = {name: column[at] for name, column in pairs.figures.items()}
        assert values["together"] == both
        assert values["p_given"] == pytest.approx(both / one.sum())
        assert values["p_given_back"] == pytest.approx(both / other.sum())
        assert values["lift"] == pytest.approx(np.log2(both * 300 / (one.sum() * other.sum())))
        assert values["jaccard"] == pytest.approx(both / (one | other).sum())
        assert values["phi"] == pytest.approx(np.corrcoef(one, other)[0, 1])


def test_trades_keep_both_margins_and_mix():
    random = np.random.default_rng(0)
    state_TE = random.random((501, 12)) < random.random(12)
    before_TE = state_TE.copy()
    for _ in range(10):
        trade(state_TE, random)
    assert (state_TE.sum(0) == before_TE.sum(0)).all()
    assert (state_TE.sum(1) == before_TE.sum(1)).all()
    assert (state_TE != before_TE).mean() > 0.15


def test_trades_reach_every_arrangement_equally():
    """Three tokens and three experts, one each: the six permutation matrices, and no other."""
    random = np.random.default_rng(0)
    state_TE = np.eye(3, dtype=bool)
    seen = {}
    for _ in range(3000):
        trade(state_TE, random)
        key = state_TE.tobytes()
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 6
    assert all(abs(count - 500) < 100 for count in seen.values())


def test_uniform_routing_runs_pairs_as_often_as_k_and_e_say_and_nothing_is_found():
    world = World(documents=100, length=100)
    mask_TE = top_k(world.random.random((10_000, 16)), 4)
    frame, routed = of(world.sample(mask_TE), 0)
    pairs = within_layer(frame, routed)
    np.testing.assert_allclose(pairs.figures["p_given"], 3 / 15, atol=0.025)
    assert pairs.figures["p_given"].mean() == pytest.approx(3 / 15, abs=0.002)
    # One expert pushes out another: independence would be phi = 0.
    np.testing.assert_allclose(pairs.figures["phi_null"], -1 / 15, atol=0.01)
    assert 0.8 < pairs.figures["z"].std() < 1.2
    tables, counts = pair_tables([pairs])
    assert counts[0, 0]["pairs_found"] == len(tables["pairs"]["q"]) <= 1
    assert not len(tables["duplicates"]["q"])


def test_null_of_uneven_loads_is_their_own():
    """Loads of 0.9 to 0.1 and top-k: pairs are far from independent, and none is planted."""
    world = World(documents=100, length=100)
    mask_TE = top_k(world.random.gumbel(size=(10_000, 8)) + np.linspace(2, -2, 8), 3)
    frame, routed = of(world.sample(mask_TE), 0)
    pairs = within_layer(frame, routed)
    assert np.abs(pairs.figures["phi"]).max() > 0.15
    # Sampling without replacement by weights is close to, not quite, even over all arrangements.
    assert np.abs(pairs.figures["phi"] - pairs.figures["phi_null"]).max() < 0.04
    mean_EE, _ = traded_phi(frame, routed.mask_TE)
    assert np.allclose(mean_EE, mean_EE.T, equal_nan=True)


def test_a_planted_pair_is_found_first_and_twins_are_duplicates():
    world = World(documents=80, length=60)
    score_TE = world.random.random((4800, 12))
    score_TE[:, 7] = 0.7 * score_TE[:, 2] + 0.3 * score_TE[:, 7]
    mask_TE = top_k(score_TE, 4)
    mask_TE[:, 11] = mask_TE[:, 0]
    frame, routed = of(world.sample(mask_TE), 0)
    tables, _ = pair_tables([within_layer(frame, routed)])
    names = list(zip(tables["pairs"]["expert_a"], tables["pairs"]["expert_b"], strict=True))
    assert names[:2] == [(0, 11), (2, 7)]
    assert tables["pairs"]["phi"][1] > 0.3 and tables["pairs"]["z"][1] > 10
    assert list(tables["duplicates"]["expert_b"]) == [11]
    assert tables["duplicates"]["phi"][0] == pytest.approx(1)


def test_documents_that_are_unlike_each_other_are_no_evidence_of_pairs():
    """Each document has loads of its own: tokens agree within documents, and no pair is planted."""
    hits, p = 0, []
    for seed in range(4):
        world = World(documents=60, length=100, seed=seed)
        way_DE = world.random.normal(size=(60, 10)) * 0.5
        score_TE = np.repeat(way_DE, 100, axis=0) + world.random.gumbel(size=(6000, 10))
        frame, routed = of(world.sample(top_k(score_TE, 3)), 0)
        pairs = within_layer(frame, routed)
        p.append(pairs.figures["p"])
        hits += pair_tables([pairs])[1][0, 0]["pairs_found"]
    assert (np.concatenate(p) < 0.05).mean() <= 0.1
    assert hits <= 2


def test_null_between_layers_is_that_of_permutations():
    world = World(documents=6, length=20)
    way_DE = np.repeat(world.random.random((6, 3)), 20, axis=0)
    one_TE, other_TE = world.draw(way_DE), world.draw(way_DE)
    frame, first, second = of(world.sample(one_TE, other_TE), 0, 1)
    pairs = between_layers(frame, first, second)
    drawn = []
    for seed in range(400):
        at = frame.shuffled(frame.stratum, np.random.default_rng(seed))
        assert (frame.stratum.index_T[at] == frame.stratum.index_T).all()
        drawn.append(
            [np.corrcoef(one_TE[:, a], other_TE[at, b])[0, 1] for a in range(3) for b in range(3)]
        )
    error = np.std(drawn, axis=0) / np.sqrt(400)
    assert (np.abs(np.mean(drawn, axis=0) - pairs.figures["phi_null"]) < 4 * error).all()
    sure = (pairs.figures["phi"] - pairs.figures["phi_null"]) / np.std(drawn, axis=0)
    assert (np.abs(pairs.figures["z"]) <= np.abs(sure) * 1.15).all()


def test_between_layers_finds_what_tokens_tell_and_not_what_documents_tell():
    world = World(documents=80, length=60)
    way_DE = np.repeat(world.random.uniform(0.2, 0.8, size=(80, 6)), 60, axis=0)
    one_TE, other_TE = world.draw(way_DE), world.draw(way_DE)
    frame, *layers = of(world.sample(one_TE, other_TE), 0, 1)
    pairs = between_layers(frame, *layers)
    same = pairs.a_P == pairs.b_P
    assert pairs.figures["phi"][same].min() > 0.05
    assert pair_tables([pairs])[1][0, 1]["pairs_found"] == 0
    other_TE[:, 3] = one_TE[:, 1] ^ (world.random.random(4800) < 0.1)
    frame, *layers = of(world.sample(one_TE, other_TE), 0, 1)
    tables, counts = pair_tables([between_layers(frame, *layers)])
    assert counts[0, 1]["pairs_found"] == 1 and counts[0, 1]["pairs"] == 36
    assert (tables["pairs"]["expert_a"][0], tables["pairs"]["expert_b"][0]) == (1, 3)
    assert tables["pairs"]["layer_b"][0] == 1


def test_best_phi_of_layers_apart():
    random = np.random.default_rng(0)
    one_TE, far_TE = (random.random((5000, 8)) < 0.3 for _ in range(2))
    other_TE = one_TE[:, ::-1] ^ (random.random((5000, 8)) < 0.05)
    found = best_phi([0, 1, 4], [one_TE, other_TE, far_TE])
    assert found[0, 1][0] > 0.8 and found[0, 1][1] < 0.05
    assert abs(found[0, 4][0] - found[0, 4][1]) < 0.01
