"""Statistics of routing against planted samples, null data and loops over single tokens."""

import json

import numpy as np
import pytest
from routing_samples import World, entropy, load_matched, sample_of, top_k

from moefy.errors import CorpusError, MoefyError
from moefy.evaluation.statistics import q_values
from moefy.inspection.record import rows, table
from moefy.inspection.routing import (
    RoutingFrame,
    bin_edges,
    position_bin,
    ratio_columns,
)
from moefy.inspection.routing.explained import (
    cross_fitted,
    explained,
    lexical_router,
)
from moefy.inspection.routing.specialization import (
    domain_specialization,
    evenness,
    gini,
    load,
    log_odds,
    token_lists,
    vocabulary_specialization,
)
from moefy.inspection.routing.statistics import router_saturation, routing_statistics


def frame_of(sample, layer=0, seed=0):
    frame = RoutingFrame(sample, seed)
    return frame, frame.routed(layer)


def shares(sample, seed=0):
    """What explains routing, as one row."""
    frame, routed = frame_of(sample, seed=seed)
    found = explained(frame, routed).totals(frame.tokens_Q.astype(float))
    return {name: float(values[0]) for name, values in ratio_columns(frame, found).items()}


# Load


def test_load_counts_what_ran():
    world = World(documents=12, length=20)
    mask_TE = world.draw(np.broadcast_to([1.0, 0.5, 0.0, 0.1], (240, 4)))
    frame, routed = frame_of(world.sample(mask_TE, shared=1))
    found = load(frame, routed)
    experts = found["experts"]
    np.testing.assert_allclose(experts["load"], mask_TE.mean(0))
    assert experts["tokens"] == mask_TE.sum(0).tolist()
    documents = [sum(mask_TE[d * 20 : d * 20 + 20, e].any() for d in range(12)) for e in range(4)]
    assert experts["documents"] == documents
    assert found["dead"] == {"layer": [0], "expert": [2], "tokens": [240], "documents": [12]}
    assert found["layers"]["dead"] == [1] and found["layers"]["routed_experts"] == [3]
    for row in rows(table(found["positions"])):
        at = (world.position_T >= row["position"]) & (world.position_T <= row["position_last"])
        assert row["tokens"] == at.sum()
        assert row["load"] == pytest.approx(mask_TE[at, row["expert"]].mean(), rel=1e-5)


def test_evenness_and_gini_at_their_ends():
    assert evenness(np.full(8, 0.25)) == pytest.approx(1) and gini(np.full(8, 0.25)) == 0
    alone = np.array([0, 0, 0, 1.0])
    assert evenness(alone) == 0 and gini(alone) == pytest.approx(0.75)
    load_E = np.array([0.1, 0.7, 0.4])
    pairs = np.abs(load_E[:, None] - load_E[None]).sum() / (2 * 9 * load_E.mean())
    assert gini(load_E) == pytest.approx(pairs)


def test_position_bins_hold_the_positions_between_their_edges():
    position = np.arange(70)
    bins = position_bin(position)
    first, last = bin_edges(int(bins.max()) + 1)
    assert ((first[bins] <= position) & (position <= last[bins])).all()
    assert (np.diff(first) > 0).all() and (last[:-1] + 1 == first[1:]).all()


# Tokens


def test_log_odds_is_the_formula_of_monroe():
    ran = np.array([[30.0, 0], [5, 5], [1, 20]])
    total = np.array([[40.0], [30], [30]])
    found = log_odds(ran, total)
    n, a0 = 100, 3
    for e in range(2):
        n_in, n_out = ran[:, e].sum(), n - ran[:, e].sum()
        for v in range(3):
            a = total[v, 0] / n * a0
            y, z = ran[v, e] + a, total[v, 0] - ran[v, e] + a
            away = np.log(y / (n_in + a0 - y)) - np.log(z / (n_out + a0 - z))
            assert found[v, e] == pytest.approx(away / np.sqrt(1 / y + 1 / z), rel=1e-9)


def test_token_lists_against_loops():
    world = World(documents=15, length=40, types=25)
    mask_TE = world.draw(0.2 + 0.6 * (world.ids_T[:, None] % 3 == np.arange(3)))
    frame, routed = frame_of(world.sample(mask_TE))
    tokens = frame.sample.tokens
    found = rows(table(token_lists(frame, routed)))
    kinds = {"current": tokens.ids_T, "previous": tokens.previous_T, "target": tokens.target_T}
    assert {row["kind"] for row in found} == {*kinds, "predicted"}
    for row in found[::7]:
        ids_T = kinds.get(row["kind"], tokens.target_T)
        known, here = ids_T >= 0, ids_T == row["token"]
        ran = mask_TE[:, row["expert"]]
        assert row["total"] == here.sum() >= 10
        assert row["count"] == (here & ran).sum()
        assert row["recall"] == pytest.approx((here & ran).sum() / (ran & known).sum(), rel=1e-5)
        assert row["precision"] == pytest.approx(ran[here].mean(), rel=1e-5)
        if row["lift"] is not None:
            lift = np.log2(ran[here].mean() / ran[known].mean())
            assert row["lift"] == pytest.approx(lift, rel=1e-4, abs=1e-4)
        assert row["documents"] == len(set(tokens.document_T[here & ran].tolist()))
    top = [r for r in found if r["kind"] == "current" and r["end"] == "top" and r["expert"] == 1]
    assert [r["z"] for r in top] == sorted((r["z"] for r in top), reverse=True)
    assert all(r["token"] % 3 == 1 for r in top[:5])


def test_vocabulary_specialization_of_uniform_and_of_lexical_routers():
    world = World(documents=60, length=100, types=150)
    uniform = top_k(world.random.random((6000, 16)), 4)
    by_token = top_k(world.random.random((150, 16)), 4)[world.ids_T]
    frame, routed = frame_of(world.sample(uniform))
    found = vocabulary_specialization(frame, routed)
    often = [v for v in range(150) if (world.ids_T == v).sum() >= 10]
    naive = np.mean([uniform[world.ids_T == v].mean(0).max() for v in often])
    assert found["vs"][0] == pytest.approx(naive, rel=1e-5)
    # The naive figure is far above k / E = 0.25, the adjusted one at 0.
    assert found["vs"][0] > 0.4
    assert abs(found["vs_adj"][0]) < 0.02
    assert found["vs_adj_low"][0] < 0 < found["vs_adj_high"][0]
    found = vocabulary_specialization(*frame_of(world.sample(by_token)))
    assert found["vs"][0] == found["vs_adj"][0] == 1


# What explains routing


def test_nothing_explains_random_routing():
    world = World(own=1.5, documents=100)
    found = shares(world.sample(top_k(world.random.random((len(world.ids_T), 16)), 4)))
    for name in ("token", "previous", "domain", "position", "previous_first", "domain_last"):
        assert abs(found[f"share_{name}"]) < 2e-3, name
    assert found["bits_entropy"] == pytest.approx(16 * entropy(0.25), rel=1e-3)
    assert found["share_rest"] == pytest.approx(1, abs=3e-3)


def test_document_labels_that_mean_nothing_explain_nothing():
    """Documents route each in its own way, and domains are dealt to them by chance."""
    world = World(own=0.0, documents=120)
    way_DE = 0.5 + 0.25 * world.random.uniform(-1, 1, size=(120, 8))
    found = shares(world.sample(world.draw(np.repeat(way_DE, world.length, axis=0))))
    assert abs(found["share_domain"]) < 5e-3 and abs(found["share_token"]) < 5e-3


def test_a_router_of_tokens_alone_leaves_the_domain_nothing():
    for seed, types in ((0, 60), (1, 2000)):
        world = World(seed=seed, types=types, own=2.0)
        p_VE = world.random.random((types, 8))
        found = shares(world.sample(world.draw(p_VE[world.ids_T])))
        assert abs(found["share_domain"]) < 2e-3 and abs(found["share_previous"]) < 2e-3
        bits = entropy(p_VE[world.ids_T].mean(0)).sum()
        truth = 1 - entropy(p_VE)[world.ids_T].sum(1).mean() / bits
        # Rare tokens can hide what they tell, but never add to it.
        assert found["share_token"] < truth + 0.005
        assert found["share_token"] > (truth - 0.01 if types == 60 else truth / 2)


def test_a_router_that_is_a_table_of_tokens_is_explained_whole():
    world = World()
    found = shares(world.sample(top_k(world.random.random((60, 12)), 3)[world.ids_T]))
    assert found["share_token"] > 0.99
    assert abs(found["share_domain"]) < 1e-3 and found["share_rest"] < 0.01


def closed_form(world, p_MVE):
    """Shares of token, then of domain, of a router of chances `p` by domain and token."""
    joint_MV = np.bincount(world.domain_Q)[:, None] / len(world.domain_Q) * world.p_MV
    load_E = np.einsum("mv,mve->e", joint_MV, p_MVE)
    token_VE = np.einsum("mv,mve->ve", joint_MV, p_MVE) / joint_MV.sum(0)[:, None]
    bits = entropy(load_E).sum()
    left_token = (joint_MV.sum(0) @ entropy(token_VE)).sum()
    left = np.einsum("mv,mve->", joint_MV, entropy(p_MVE))
    return 1 - left_token / bits, (left_token - left) / bits


@pytest.mark.parametrize("mixture", ["domain", "both", "interaction"])
def test_planted_mixtures_are_explained_as_the_closed_form_says(mixture):
    world = World(documents=160, length=200, types=40, own=1.0, seed=3)
    token_VE = 0.2 + 0.5 * world.random.random((40, 6))
    domain_ME = world.random.uniform(-0.2, 0.25, size=(4, 6))
    p_MVE = {
        "domain": np.broadcast_to(0.4 + domain_ME[:, None], (4, 40, 6)),
        "both": token_VE[None] + domain_ME[:, None],
        "interaction": world.random.uniform(0.05, 0.95, size=(4, 40, 6)),
    }[mixture]
    found = shares(world.sample(world.draw(p_MVE[world.domain_T, world.ids_T])))
    token, domain = closed_form(world, p_MVE)
    assert domain > 0.02
    assert found["share_token"] == pytest.approx(token, abs=0.01)
    assert found["share_domain"] == pytest.approx(domain, abs=0.012)
    assert found["share_domain_low"] > 0
    assert abs(found["share_position"]) < 2e-3 and abs(found["share_previous"]) < 4e-3


def test_previous_tokens_and_positions_get_what_is_theirs():
    world = World(own=0.5, types=30, documents=160)
    previous_T = np.where(world.position_T > 0, np.roll(world.ids_T, 1), 30)
    late_T1 = (world.position_T >= 32)[:, None]
    before_VE = world.random.uniform(-0.3, 0.3, size=(31, 6))
    at_TE = world.draw(0.5 + before_VE[previous_T])
    found = shares(world.sample(at_TE))
    truth = 1 - entropy(0.5 + before_VE)[previous_T].sum(1).mean() / found["bits_entropy"]
    assert truth > 0.05
    assert found["share_previous"] == pytest.approx(truth, abs=0.012)
    assert found["share_previous_first"] == pytest.approx(truth, abs=0.012)
    assert abs(found["share_domain"]) < 5e-3 and abs(found["share_position"]) < 5e-3
    found = shares(world.sample(world.draw(np.where(late_T1, 0.3, 0.7) * np.ones((1, 6)))))
    share = late_T1.mean()
    truth = 1 - entropy(0.3) / entropy(0.3 * share + 0.7 * (1 - share))
    assert found["share_position"] == pytest.approx(truth, abs=0.012)
    assert abs(found["share_domain"]) < 2e-3 and abs(found["share_token"]) < 2e-3


# Lexical router and domains


def naive_lexical(frame, mask_TE):
    """P(e|v) of every token from tokens of the other folds; NaN where there are none."""
    ids_T = frame.sample.tokens.ids_T
    found = np.full(mask_TE.shape, np.nan)
    for t in range(len(ids_T)):
        others = (frame.fold_T != frame.fold_T[t]) & (ids_T == ids_T[t])
        if others.any():
            found[t] = mask_TE[others].mean(0)
    return found


def test_folds_never_share_a_document_and_hold_every_domain():
    frame, _ = frame_of((world := World(documents=40, length=5)).sample(np.ones((200, 2))))
    for document in range(40):
        assert len(set(frame.fold_T[frame.document.index_T == document])) == 1
    assert (np.bincount(frame.fold_T) == 40).all()
    held = {(f, d) for f, d in zip(frame.fold_T, world.domain_T, strict=True)}
    assert len(held) == frame.folds * 4


def test_lexical_router_against_loops():
    world = World(documents=20, length=25, types=30)
    mask_TE = top_k(world.random.random((30, 8))[world.ids_T] + world.random.random((500, 8)), 3)
    frame, routed = frame_of(world.sample(mask_TE))
    found = ratio_columns(frame, lexical_router(frame, routed))
    recalls, constant = [], []
    for t, v in enumerate(world.ids_T):
        others = frame.fold_T != frame.fold_T[t]
        here = others & (world.ids_T == v)
        load_E = mask_TE[others].mean(0)
        score_E = (mask_TE[here].sum(0) + load_E) / (here.sum() + 1)
        recalls.append(mask_TE[t, np.argsort(-score_E, kind="stable")[:3]].mean())
        constant.append(mask_TE[t, np.argsort(-load_E, kind="stable")[:3]].mean())
    assert found["lexical_recall"][0] == pytest.approx(np.mean(recalls), abs=1e-6)
    assert found["constant_recall"][0] == pytest.approx(np.mean(constant), abs=1e-6)
    assert found["chance_recall"][0] == pytest.approx(3 / 8)
    assert found["load_recall"][0] == pytest.approx((mask_TE.mean(0) ** 2).sum() / 3, rel=1e-5)
    random = frame_of(load_matched(frame.sample))
    other = ratio_columns(random[0], lexical_router(*random))
    assert other["lexical_recall"][0] == pytest.approx(found["lexical_recall_random"][0], abs=0.04)
    assert found["lexical_recall"][0] > other["lexical_recall"][0] + 0.1


def test_a_load_matched_router_keeps_loads_and_k_and_nothing_else():
    world = World(documents=40, length=50)
    sample = world.sample(world.draw(world.random.random((60, 8))[world.ids_T]))
    random = load_matched(sample)
    assert (random.mask(0).sum(0) == sample.mask(0).sum(0)).all()
    assert (random.mask(0).sum(1) == sample.mask(0).sum(1)).all()
    # Whatever is left of tokens comes of how many experts each token runs.
    assert shares(random)["share_token"] < 0.3 * shares(sample)["share_token"]


def test_lexical_rate_of_domains_against_loops():
    world = World(documents=16, length=20, types=80)
    mask_TE = world.draw(np.full((320, 3), 0.4))
    frame, routed = frame_of(world.sample(mask_TE))
    lexical_TE = naive_lexical(frame, mask_TE)
    unseen_T = np.isnan(lexical_TE[:, 0])
    assert 0 < unseen_T.mean() < 0.3
    found = rows(table(domain_specialization(frame, routed)))
    assert len(found) == 12
    for row in found:
        here = world.domain_T == int(row["domain"][-1])
        e = row["expert"]
        assert row["ds"] == pytest.approx(mask_TE[here, e].mean(), rel=1e-5)
        expected = np.where(unseen_T, mask_TE[:, e], lexical_TE[:, e])[here].mean()
        assert row["ds_lex"] == pytest.approx(expected, rel=1e-5)
        assert row["ds_adj"] == pytest.approx(row["ds"] - row["ds_lex"], abs=1e-5)
        assert row["lift"] == pytest.approx(np.log2(row["ds"] / mask_TE[:, e].mean()), abs=1e-4)
        assert row["unseen"] == pytest.approx(unseen_T[here].mean())
        assert row["tokens"] == mask_TE[here, e].sum() and row["domain_tokens"] == 80


def test_token_only_routers_differ_between_domains_but_not_beyond_tokens():
    covered, cells = 0, 0
    for seed in range(3):
        world = World(seed=seed, types=200, own=2.0)
        p_VE = world.random.random((200, 8))
        frame, routed = frame_of(world.sample(world.draw(p_VE[world.ids_T])), seed=seed)
        found = domain_specialization(frame, routed)
        assert (q_values(found["p"]) < 0.05).mean() > 0.5
        assert np.abs(found["lift"]).max() > 0.3
        assert np.abs(found["ds_adj"]).max() < 0.03
        covered += ((found["ds_adj_low"] <= 0) & (found["ds_adj_high"] >= 0)).sum()
        cells += len(found["p"])
        assert (q_values(found["p_adj"]) < 0.05).sum() <= 2
    assert covered / cells > 0.9


def test_domain_routers_differ_beyond_tokens():
    world = World(own=0.5)
    p_ME = np.where(np.arange(4)[:, None] == np.arange(8) % 4, 0.6, 0.3)
    found = domain_specialization(*frame_of(world.sample(world.draw(p_ME[world.domain_T]))))
    right = np.array([int(d[-1]) for d in found["domain"]]) == found["expert"] % 4
    assert (found["ds_adj_low"][right] > 0.1).all() and (found["ds_adj_high"][~right] < 0).all()
    assert (q_values(found["p_adj"]) < 0.01).all()


def test_labels_dealt_to_documents_by_chance_are_not_found():
    """Documents are unlike each other (tokens of one are alike), and labels mean nothing."""
    p_values, hits = [], 0
    for seed in range(6):
        world = World(seed=seed, own=0.0, documents=100, length=80)
        way_DE = 0.5 + 0.3 * world.random.uniform(-1, 1, size=(100, 12))
        found = domain_specialization(
            *frame_of(world.sample(world.draw(np.repeat(way_DE, 80, axis=0))), seed=seed)
        )
        for name in ("p", "p_adj"):
            p_values.append(found[name])
            hits += (q_values(found[name]) < 0.05).sum()
    p = np.concatenate(p_values)
    assert 0.02 < (p < 0.05).mean() <= 0.07
    assert hits <= 3


# Saturation


def test_saturation_of_the_same_of_random_and_of_swapped_routers():
    world = World(documents=10, length=60)
    score_TE = world.random.random((600, 8)) + np.arange(8) / 8
    mask_TE = top_k(score_TE, 2)
    first = world.sample(mask_TE)
    same = rows(router_saturation(first, first))[0]
    assert same["saturation"] == 1 and same["saturation_chance"] == 0.25
    load_E = mask_TE.mean(0)
    assert same["saturation_load"] == pytest.approx((load_E**2).sum() / 2, rel=1e-4)
    other_TE = top_k(world.random.random((600, 8)) + np.arange(8) / 8, 2)
    found = rows(router_saturation(world.sample(other_TE), first))[0]
    assert found["saturation"] == pytest.approx((mask_TE & other_TE).sum(1).mean() / 2, rel=1e-5)
    assert found["saturation_low"] < found["saturation_load"] < found["saturation_high"]
    with pytest.raises(MoefyError, match="not the same"):
        router_saturation(first, first.take(np.arange(599)))
    with pytest.raises(MoefyError, match="same conversion"):
        router_saturation(world.sample(mask_TE[:, :7]), first)


# All of it


def test_all_tables_of_a_sample_are_json_and_the_same_again():
    world = World(documents=30, length=40)
    masks = []
    for _ in range(3):
        routed = top_k(world.random.random((60, 8))[world.ids_T], 2)
        masks.append(np.concatenate([np.ones((1200, 1), dtype=bool), routed], axis=1))
    sample = world.sample(*masks, shared=1)
    found = routing_statistics(sample, 60)
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(routing_statistics(sample, 60)))
    keys = list(zip(found["experts"]["layer"], found["experts"]["expert"], strict=True))
    assert keys == [(layer, e) for layer in range(3) for e in range(9)]
    assert found["layers"]["layer"] == [0, 1, 2]
    for row in rows(found["experts"]):
        if row["expert"] == 0:
            assert row["load"] == 1 and row["share_token"] is None
    for name in ("domains", "tokens", "pairs"):
        key = "expert_a" if name == "pairs" else "expert"
        assert 0 not in found[name][key], name
    assert len(found["domains"]["q"]) == 3 * 8 * 4
    (overall,) = rows(found["routing"])
    assert overall["share_token"] > 0.95 and overall["lexical_recall"] > 0.95
    chain = ("token", "domain", "previous", "position", "rest")
    for row in rows(found["layers"]):
        assert sum(row[f"share_{name}"] for name in chain) == pytest.approx(1, abs=1e-4)
    assert len(found["layer_pairs"]["layer_a"]) == 6


def test_too_few_documents_are_refused():
    sample = sample_of([np.ones((20, 2))], np.zeros(20), [0, 1], 10)
    with pytest.raises(CorpusError, match=r"2 document\(s\).*3 or more"):
        routing_statistics(sample, 1)


def test_one_domain_and_dead_experts_give_none_and_no_error():
    world = World(domains=1, documents=20, length=30)
    mask_TE = world.draw(np.broadcast_to([0.5, 0.0, 1.0], (600, 3)))
    found = routing_statistics(world.sample(mask_TE), 60)
    assert found["experts"]["share_token"][1:] == [None, None]
    assert found["dead"]["expert"] == [1]
    assert set(found["domains"]["p_adj"]) == {1.0}


def test_cross_fitted_counts_leave_out_the_own_fold():
    world = World(documents=10, length=12, types=9)
    mask_TE = world.draw(np.full((120, 2), 0.5))
    frame, routed = frame_of(world.sample(mask_TE))
    fitted = cross_fitted(frame, routed.mask_TE)
    np.testing.assert_allclose(
        fitted.mean_CE[fitted.cell.index_T], naive_lexical(frame, mask_TE), rtol=1e-6
    )
