"""Random partitions, random weights, other seeds and other texts, each beside a naive reference."""

import math
from collections import Counter
from dataclasses import replace
from itertools import permutations

import numpy as np
import planted
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from tiny_conversion import convert_tiny, corpus_for
from tiny_models import build, random_model, tiny_model

from moefy.data.corpus import Corpus, Document
from moefy.data.documents import Documents
from moefy.errors import CorpusError
from moefy.experts.loading import load
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.inspection.account import observe
from moefy.inspection.controls import halves, matched, random_partition, replication, seeds, texts
from moefy.inspection.controls.random_partition import RandomPartitions, explained
from moefy.inspection.controls.random_weights import balanced, compared, random_weights, randomise
from moefy.inspection.part import Pass
from moefy.inspection.record import rows, table
from moefy.inspection.routing import RoutingSample
from moefy.inspection.texts import read
from moefy.inspection.texts.tokens import Tokens
from moefy.models.locate import read_mlp, sites
from moefy.run.output import Stages


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A tiny model of random weights, converted, and what is read of it."""
    folder = tmp_path_factory.mktemp("controls")
    source = build("llama", folder / "source")
    convert_tiny("llama", source, folder / "out", settings={"partition.shared": "1"})
    model = load(folder / "out")
    return model, read(model, corpus_for("llama"))


@pytest.fixture(scope="module")
def by_domain(tmp_path_factory):
    folder, corpus = planted.build(tmp_path_factory.mktemp("planted"), "domain")
    model = load(folder)
    return model, read(model, corpus)


class Everything:
    """A listener that keeps ledgers."""

    def __init__(self):
        self.ledgers = []

    def hear(self, ledger):
        self.ledgers.append(ledger)


def drawn(model, reading, **settings):
    seed = settings.pop("seed", 0)
    random = RandomPartitions(Pass(model, reading, seed), **settings)
    heard = Everything()
    observe(model, reading, [random, heard])
    return random, heard, random.tables()


@torch.no_grad()
def naive(ledgers, domain_Q, least):
    """Figures of the model's own experts, token by token, in fp64."""
    shared = ledgers[0].module.shared
    runs, energy, on, total, missed, whole, one = [], 0, 0, 0, 0, 0, 0
    for ledger in ledgers:
        mlp, experts = ledger.mlp, ledger.experts
        for t in range(len(ledger.x_TD)):
            h_N = mlp.hidden(ledger.x_TD[t : t + 1].float())[0].double()
            y_ED = (
                (h_N[:, None] * mlp.down_ND.double()).view(experts, -1, mlp.width).sum(1)[shared:]
            )
            square_E = (y_ED**2).sum(1)
            k = int(ledger.mask_TE[t, shared:].sum())
            chosen = sorted(range(len(square_E)), key=lambda e: -float(square_E[e]))[:k]
            run_E = np.isin(np.arange(len(square_E)), chosen)
            tokens = ledger.tokens
            runs.append((int(tokens.ids_T[t]), int(domain_Q[tokens.document_T[t]]), run_E))
            if tokens.position_T[t] > 0:
                energy = energy + square_E.numpy()
                on += float(square_E[chosen].sum())
                total += float(square_E.sum())
                whole += float((y_ED.sum(0) ** 2).sum())
                missed += float((y_ED[torch.from_numpy(~run_E)].sum(0) ** 2).sum())
                one += 1
    load_E = np.mean([run_E for _, _, run_E in runs], axis=0)
    lift_E = np.zeros(len(load_E))
    for domain in {d for _, d, _ in runs}:
        here = [run_E for _, d, run_E in runs if d == domain]
        rate_E = (np.sum(here, axis=0) + load_E) / (len(here) + 1)
        lift_E = np.maximum(lift_E, np.abs(np.log2(rate_E / load_E)))
    return {
        "domain_lift": lift_E,
        "domain_share": share([(d, run_E) for _, d, run_E in runs], 1),
        "token_share": share([(v, run_E) for v, _, run_E in runs], least),
        "energy": energy / total,
        "top_energy": on / total,
        "captured": 1 - missed / whole,
        "cross_terms": 1 - total / whole,
    }


def share(pairs, least):
    """I / H with Miller and Madow's correction, by Counter."""
    often = {v for v, n in Counter(v for v, _ in pairs).items() if n >= least}
    pairs = [(v, run_E) for v, run_E in pairs if v in often]
    found = []
    for expert in range(len(pairs[0][1])):
        joint = Counter((v, bool(run_E[expert])) for v, run_E in pairs)
        n, runs = len(pairs), Counter(bool(run_E[expert]) for _, run_E in pairs)
        sizes = Counter(v for v, _ in pairs)
        entropy = -sum(c / n * math.log(c / n) for c in runs.values()) + (len(runs) - 1) / (2 * n)
        joint_h = -sum(c / n * math.log(c / n) for c in joint.values())
        joint_h += (len(joint) - 1) / (2 * n)
        sizes_h = -sum(c / n * math.log(c / n) for c in sizes.values())
        sizes_h += (len(sizes) - 1) / (2 * n)
        found.append((entropy - (joint_h - sizes_h)) / entropy)
    return np.array(found)


def test_figures_of_the_real_experts_are_those_of_a_loop_over_tokens(converted, monkeypatch):
    monkeypatch.setattr(random_partition, "_CHUNK", 37)
    monkeypatch.setattr(random_partition, "LEAST_COUNT", 3)
    model, reading = converted
    _, heard, tables = drawn(model, reading, draws=3)
    tokens = reading.tokens_Q.sum()
    assert tables["layers"]["oracle_tokens"] == [tokens] * 2
    for layer in (0, 1):
        ledgers = [ledger for ledger in heard.ledgers if ledger.layer == layer]
        want = naive(ledgers, reading.documents.domain_Q, random_partition.LEAST_COUNT)
        experts = [row for row in rows(tables["experts"]) if row["layer"] == layer]
        assert [row["oracle_energy"] for row in experts[:1]] == [None]  # shared: not routed
        for name in random_partition.EXPERT_FIGURES:
            got = [row[f"oracle_{name}"] for row in experts[1:]]
            assert got == pytest.approx(want[name], rel=1e-4, abs=1e-6), name
        row = rows(tables["layers"])[layer]
        for name in ("top_energy", "captured", "cross_terms"):
            assert row[f"oracle_{name}"] == pytest.approx(want[name], rel=1e-4), name


def test_domain_gated_experts_stand_out_from_random_ones_and_random_ones_do_not(by_domain):
    model, reading = by_domain
    _, _, tables = drawn(model, reading, draws=20, tokens=4000)
    row = rows(tables["layers"])[0]
    assert row["oracle_domain_share"] > 0.95
    assert row["oracle_domain_share_percentile"] == 100
    assert row["oracle_domain_share_z"] > 20
    assert row["oracle_captured"] == pytest.approx(1, abs=1e-3)
    assert row["oracle_captured_percentile"] == 100
    module = sparse_mlps(model)[0]
    mixed = torch.randperm(module.weights.neurons, generator=torch.Generator().manual_seed(5))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    with torch.no_grad():
        for name in ("up_ND", "down_ND", "up_bias_N"):
            getattr(module, name).copy_(before[name][mixed])
    _, _, null = drawn(model, reading, draws=20, tokens=4000)
    with torch.no_grad():
        for name in ("up_ND", "down_ND", "up_bias_N"):
            getattr(module, name).copy_(before[name])
    row = rows(null["layers"])[0]
    assert all(abs(row[f"oracle_{n}_z"]) < 4 for n in random_partition.LAYER_FIGURES)
    # The draws themselves are the same: order and place of neurons do not decide them.
    for name in random_partition.LAYER_FIGURES:
        key = f"oracle_{name}_random"
        assert null["layers"][key] == pytest.approx(tables["layers"][key], rel=1e-4)


def test_the_share_of_nothing_is_nothing():
    draw = np.random.default_rng(0)
    size_V = np.full(200, 20.0)
    ran_VE = draw.binomial(20, 0.3, size=(200, 400)).astype(float)
    assert abs(explained(ran_VE, size_V).mean()) < 2e-3
    all_or_none = np.zeros((200, 1))
    all_or_none[:60] = 20
    assert explained(all_or_none, size_V)[0] == pytest.approx(1, abs=1e-3)


def test_jaccard_is_that_of_the_best_matching_of_all():
    draw = np.random.default_rng(1)
    own, other = (draw.permutation(np.repeat(np.arange(4), 5)) for _ in range(2))

    def jaccard(a, b):
        return len(a & b) / len(a | b)

    sets = [[set(np.flatnonzero(o == e)) for e in range(4)] for o in (own, other)]
    best = max(
        permutations(range(4)),
        key=lambda order: sum(jaccard(sets[0][e], sets[1][o]) for e, o in enumerate(order)),
    )
    want = [jaccard(sets[0][e], sets[1][o]) for e, o in enumerate(best)]
    assert sum(matched(own, other)) == pytest.approx(sum(want))
    assert matched(own, (own + 1) % 4) == pytest.approx(np.ones(4))


def test_planted_experts_are_found_again_by_every_seed_and_text(by_domain):
    model, reading = by_domain
    first, second = halves(reading, 0)
    documents = [
        {s.document.source_id for b in half for s in b.samples} for half in (first, second)
    ]
    assert not documents[0] & documents[1]
    tables = seeds(model, reading, count=2)
    row = rows(tables["layers"])[0]
    assert row["stability_ari"] > 0.95
    assert row["stability_ari_own"] > 0.95
    assert row["stability_ami"] > 0.95
    assert min(tables["experts"]["stability"]) > 0.95
    assert tables["experts"]["stability_chance"][0] < 0.3


def test_random_weights_have_no_stable_experts_and_random_partitions_no_stability(converted):
    model, reading = converted
    artefact = model.moefy.artefact
    method = {**artefact.recipe["partition"], "method": "random"}
    model.moefy.artefact = replace(artefact, recipe={**artefact.recipe, "partition": method})
    tables = seeds(model, reading)
    model.moefy.artefact = artefact
    for row in rows(tables["layers"]):
        assert abs(row["stability_ari"]) < 0.1
        # The shared expert is found by its loudness, not at random.
        assert row["stability_ari_texts"] == pytest.approx(1) or row["stability_partitions"] > 2


@pytest.mark.parametrize("method", ["kmeans", "contribution", "coactivation", "markers"])
def test_planted_blocks_are_recovered_by_the_partition_methods(by_domain, method):
    from moefy.methods.partition import partition

    model, reading = by_domain
    heard = Everything()
    observe(model, reading, [heard])
    x_TD = torch.cat([ledger.x_TD for ledger in heard.ledgers])[:4096]
    module = sparse_mlps(model)[0]
    mixed = torch.randperm(module.weights.neurons, generator=torch.Generator().manual_seed(2))
    found = partition(
        module.weights.on_cpu().take(mixed), x_TD, experts=planted.DOMAINS, method=method
    )
    assert adjusted_rand_score(mixed // planted.CONTENT, found.owner_N) > 0.95


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "phi3"])
def test_balancing_changes_no_output_and_forgets_the_gauge(name):
    model = random_model(tiny_model(name).auto, tiny_model(name).make_config())
    mlp = read_mlp(sites(model)[0], lambda n: model.get_parameter(n).detach()).to(torch.float64)
    x_TD = torch.randn(
        9, mlp.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    same = balanced(mlp)
    torch.testing.assert_close(same.to(torch.float64)(x_TD), mlp(x_TD), rtol=1e-4, atol=1e-5)
    if name in ("opt", "llama"):
        scale_N1 = torch.exp(torch.randn(mlp.neurons, 1, dtype=torch.float64))
        bias_N = None if mlp.up_bias_N is None else mlp.up_bias_N * scale_N1[:, 0]
        other = replace(
            mlp, up_ND=mlp.up_ND * scale_N1, down_ND=mlp.down_ND / scale_N1, up_bias_N=bias_N
        ).take(torch.randperm(mlp.neurons))
        torch.testing.assert_close(balanced(other).up_ND, same.up_ND, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(balanced(other).down_ND, same.down_ND, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("control", ["permuted", "reinitialised"])
def test_random_weights_keep_their_distribution_and_leave_the_rest_alone(name, control):
    model = random_model(tiny_model(name).auto, tiny_model(name).make_config())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = sites(model)
    held = [balanced(read_mlp(s, lambda n: before[n])) for s in found]
    randomise(model, control, 0)
    mine = {n for site in found for n in site.parameters}
    for name_, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name_]) == (name_ not in mine), name_
    for site, was in zip(found, held, strict=True):
        now = read_mlp(site, lambda n: model.get_parameter(n).detach())
        for key in ("up_ND", "down_ND", "gate_ND"):
            a, b = getattr(was, key), getattr(now, key)
            if a is None:
                continue
            assert not torch.equal(a, b)
            if control == "permuted":
                assert torch.equal(a.flatten().sort().values, b.flatten().sort().values)
            else:
                assert float(b.std()) == pytest.approx(float(a.std()), rel=0.1)
    again = random_model(tiny_model(name).auto, tiny_model(name).make_config())
    randomise(again, control, 0)
    for (_, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_figure_separates_where_intervals_do_not_meet_or_all_layers_agree():
    def layers(shift, spread):
        value = np.arange(6.0) + shift
        columns = {"layer": list(range(6)), "wide": value, "bare": value, "same": np.ones(6)}
        return table({**columns, "wide_low": value - spread, "wide_high": value + spread})

    random = {"permuted": layers(-3, 1), "reinitialised": layers(-2.5, 1)}
    found = rows(compared(layers(0, 1), random))
    verdict = {(row["figure"], row["layer"]): row["separates"] for row in found}
    assert all(verdict["wide", layer] for layer in range(6))
    assert all(verdict["bare", layer] for layer in range(6))
    assert not any(verdict["same", layer] for layer in range(6))
    assert [row["permuted"] for row in found if row["figure"] == "wide"] == [*np.arange(6.0) - 3]
    near = rows(compared(layers(0, 2), random))
    assert not any(row["separates"] for row in near if row["figure"] == "wide")
    # One control below, one above: trained is not on one side of both.
    between = rows(compared(layers(0, 1), {**random, "permuted": layers(3, 1)}))
    assert not any(row["separates"] for row in between if row["figure"] == "bare")


def test_random_weights_are_converted_by_the_recipe_once(converted, tmp_path):
    model, reading = converted
    calls = []

    def describe(moefied, given):
        assert given is reading
        calls.append(moefied)
        modules = sparse_mlps(moefied)
        assert [m.expert_size for m in modules.values()] == [8, 8]
        norms = [float(m.up_ND.detach().norm()) for m in modules.values()]
        return {"layers": table({"layer": list(modules), "norm": norms})}

    trained = describe(model, reading)
    corpus = corpus_for("llama")
    stages = Stages(tmp_path, {})
    found = random_weights(model, reading, describe, trained, corpus=corpus, stages=stages)
    again = random_weights(model, reading, describe, trained, corpus=corpus, stages=stages)
    assert len(calls) == 3
    assert found == again
    table_ = found["random_weights"]
    assert table_["trained"] == trained["layers"]["norm"]
    assert table_["permuted"] != table_["reinitialised"] != table_["trained"]
    with pytest.raises(CorpusError, match="give that one"):
        random_weights(model, reading, describe, trained, corpus=corpus[:20])
    assert random_weights(model, reading, describe, trained) == {}


def sample_of(corpora, mask_TE, tokens=200):
    """A routing sample of documents of one token each `tokens` long."""
    documents = [Document("d", str(i), ids=(i,)) for i in range(len(corpora))]
    document_T = np.repeat(np.arange(len(corpora)), tokens)
    zeros_T = np.zeros(len(document_T), dtype=np.int64)
    held = Tokens(zeros_T, zeros_T, zeros_T, zeros_T, zeros_T, document_T)
    packed = [np.packbits(mask_TE, axis=1)]
    experts = [mask_TE.shape[1]]
    shards = ["select"] * len(corpora)
    return RoutingSample(Documents(documents, shards, corpora), held, packed, experts, [0])


def test_what_the_experts_do_replicates_and_noise_does_not():
    draw = np.random.default_rng(0)
    load_E = np.linspace(0.05, 0.6, 16)
    mask_TE = draw.random((40 * 200, 16)) < load_E

    def describe(sample):
        mask = sample.mask(0)
        columns = {"layer": [0] * 16, "expert": list(range(16)), "load": mask.mean(0)}
        columns |= {"load_low": mask.mean(0), "flag": [True] * 16}
        columns |= {f"noise {i}": draw.random(16) for i in range(30)}
        return {"experts": table(columns)}

    for corpora in (["a"] * 40, ["a", "b"] * 20):
        found = rows(replication(sample_of(corpora, mask_TE), describe)["replication"])
        assert {row["figure"] for row in found} == {"load", *(f"noise {i}" for i in range(30))}
        by_name = {row["figure"]: row for row in found}
        load = by_name.pop("load")
        assert load["correlation"] > 0.95
        assert load["replicates"] is True
        assert load["experts"] == 16
        assert sum(row["replicates"] for row in by_name.values()) <= 1
        if len(set(corpora)) > 1:
            assert (load["text_a"], load["text_b"]) == ("a", "b")


def test_halves_share_no_source():
    documents = [Document(f"d{i % 2}", str(i // 4), ids=(i,)) for i in range(200)]
    held = Documents(documents, ["select"] * 200, ["one"] * 200)
    first, second = texts(held, 0).values()
    assert not (first & second).any()
    assert (first | second).all()
    sources = [{held.sources[i] for i in np.flatnonzero(part)} for part in (first, second)]
    assert not sources[0] & sources[1]
    assert 60 < first.sum() < 140
    assert Corpus("x", documents).domains == ["d0", "d1"]
