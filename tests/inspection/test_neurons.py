"""Neurons that predict concepts, experts that hold them, and neurons that are alike."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from naive_experts import heard_by, naive
from sklearn.metrics import roc_auc_score
from tiny_conversion import convert_tiny
from tiny_models import build

import moefy
from moefy.data.documents import HELD_OUT, SELECT
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.inspection.account import bare
from moefy.inspection.experts.concepts import BINS, Counts, Predictivity, enrichment
from moefy.inspection.experts.near_duplicates import neuron_families, neuron_rows
from moefy.inspection.part import SeenDocuments, Sum
from moefy.inspection.record import rows
from moefy.inspection.texts import read
from moefy.inspection.texts.tokens import CLASSES, classes_of, token_classes
from moefy.models.mlp import DenseMlp


@pytest.fixture(scope="module", params=["llama", "opt", "bert"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    convert_tiny(request.param, build(request.param, folder / "s"), folder / "o")
    return moefy.load(folder / "o")


@pytest.fixture
def reading(model, tmp_path):
    import json

    generator = torch.Generator().manual_seed(5)
    lines = []
    for number in range(40):
        ids = torch.randint(3, 46, (6 + number % 19,), generator=generator) + 44 * (number % 2)
        lines.append(
            {"domain": "ab"[number % 2], "source_id": str(number), "input_ids": ids.tolist()}
        )
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return read(model, tmp_path / "corpus.jsonl")


@pytest.mark.parametrize("shard", [SELECT, HELD_OUT])
def test_predictivity_is_the_auroc_of_contribution_norms(model, reading, shard):
    found = heard_by(model, reading, Predictivity)
    domain_Q = torch.from_numpy(reading.documents.domain_Q)
    here_D = torch.from_numpy(reading.documents.of_shard(shard))
    for layer, w in naive(model, reading).items():
        keep = (w.position_T > 0) & here_D[w.document_T]
        label = (domain_Q[w.document_T[keep]] == 1).numpy()
        norms_N = sparse_mlps(model)[layer].down_ND.detach().double().norm(dim=1)
        score_TN = (w.h_TN.abs() * norms_N)[keep].numpy()
        got = found.layers[layer].auroc(shard)[1]
        want = np.array([roc_auc_score(label, score_T) for score_T in score_TN.T])
        assert np.abs(got - want).max() < 0.06 and np.abs(got - want).mean() < 0.02
        assert got.std() > 0.02  # the domains differ in their tokens
        assert found.layers[layer].positives(shard).tolist() == [
            int((~label).sum()),
            int(label.sum()),
        ]
        assert np.allclose(found.layers[layer].auroc(shard)[0] + got, 1)


def planted(neurons=256, experts=8, concepts=6, *, seed=0, own=None):
    """Counts of `Predictivity` in which the best neurons of concept c lie in expert `own[c]`, or
    anywhere where that is None."""
    random = np.random.default_rng(seed)
    counts = {}
    size = neurons // experts
    for shard in (SELECT, HELD_OUT):
        cells = np.zeros((concepts + 1, neurons, BINS), dtype=np.int32)
        level = random.normal(0, 0.3, size=(concepts, neurons))
        for concept, expert in enumerate(own or []):
            if expert is not None:
                level[concept, expert * size : (expert + 1) * size] += 1.5
        for concept in range(concepts):
            drawn = random.normal(level[concept][:, None] + 16, 3, size=(neurons, 80))
            bins = np.clip(drawn, 0, BINS - 1).astype(int)
            for neuron in range(neurons):
                cells[concept, neuron] = np.bincount(bins[neuron], minlength=BINS)
        cells[-1] = cells[:-1].sum(0)
        counts[shard] = Sum(cells)
    made = object.__new__(Predictivity)
    made.names, made.kinds = [f"c{i}" for i in range(concepts)], ["domain"] * concepts
    seen = SeenDocuments(40, concepts)
    seen.add(np.arange(40), np.ones((40, concepts), dtype=bool))
    made.layers = {0: Counts(experts, counts, {SELECT: seen, HELD_OUT: seen})}
    return made


def test_an_expert_that_holds_a_concept_is_found_and_no_other(monkeypatch):
    monkeypatch.setattr("moefy.inspection.experts.concepts.TOP", 0.05)
    own = [3, None, 5, None, None, 0]
    tables = enrichment(planted(own=own))
    planted_cells = {("c0", 3), ("c2", 5), ("c5", 0)}
    for row in rows(tables["enrichment"]):
        hit = (row["concept"], row["expert"]) in planted_cells
        # The others stand below what was planted, so a few of their cells may look rich once.
        assert row["replicated"] is True if hit else row["replicated"] is not True
        assert row["extent"] == pytest.approx(row["count"] / row["expected"], rel=1e-4)
        assert not hit or (row["auroc"] > 0.55 and row["extent"] > 3 and row["q"] < 1e-6)
    layer = rows(tables["layers"])[0]
    assert 3 <= layer["enriched_cells"] <= 5 and layer["enriched_replicated"] >= 0.6
    assert layer["enriched_random"] < 0.5 and layer["enriched_p"] < 0.01
    assert layer["enrichment_peak"] > layer["enrichment_peak_random"]


def test_nothing_is_found_where_nothing_was_planted(monkeypatch):
    monkeypatch.setattr("moefy.inspection.experts.concepts.TOP", 0.05)
    hits, peaks = 0, []
    for seed in range(8):
        tables = enrichment(planted(seed=seed))
        hits += sum(r["q"] < 0.05 for r in rows(tables["enrichment"]))
        peaks.append(rows(tables["layers"])[0]["enrichment_peak_p"])
    assert hits <= 1 and min(peaks) > 0.005 and 0.2 < np.mean(peaks) < 0.9


def test_counts_in_experts_are_hypergeometric_under_random_partitions():
    from scipy import stats

    from moefy.inspection.experts.concepts import _counted

    item = _counted(planted().layers[0], 0, 0)
    assert item.count_CE.sum(1).tolist() == [item.best] * 6
    assert (item.random_RCE.sum(2) == item.best).all()
    p = item.p(np.arange(item.best + 1))
    want = [stats.hypergeom.sf(c - 1, 256, item.best, 32) for c in range(item.best + 1)]
    assert np.allclose(p, want)
    # The chance that random partitions meet it is the one that p says.
    assert (item.random_RCE >= 1).mean() == pytest.approx(want[1], abs=0.02)


def test_renumbering_neurons_inside_experts_changes_nothing():
    one = planted(own=[1, None, None, 4, None, None])
    other = planted(own=[1, None, None, 4, None, None])
    order = np.concatenate([np.random.default_rng(e).permutation(32) + 32 * e for e in range(8)])
    for scores in other.layers[0].scores.values():
        scores.total = scores.total[:, order]
    a, b = enrichment(one), enrichment(other)
    assert a["layers"] == b["layers"]
    for name, values in a["enrichment"].items():
        assert b["enrichment"][name] == (pytest.approx(values) if name == "auroc" else values)


def test_classes_of_tokens():
    tokens = ["", " The", "word", " 12", ",", " \n", "漢", "é", "�", " ﷽", "e1"]

    class Tokenizer:
        all_special_ids = (0,)

        def __len__(self):
            return len(tokens)

        def batch_decode(self, ids, **_):
            return [tokens[i] for (i,) in ids]

    found = token_classes(Tokenizer(), 13)
    of = {name: {tokens[i] for i in np.flatnonzero(mask)} for name, mask in found.items()}
    assert (
        of["digits"] == {" 12"} and of["punctuation"] == {",", " ﷽"} and of["whitespace"] == {" \n"}
    )
    assert of["capitalised"] == {" The"} and of["lowercase"] == {"word", "é"}
    assert of["non_latin"] == {"漢"} and of["partial"] == {"�"} and of["word_start"] == {" The"}
    assert set(found) == {*CLASSES, "partial"} and token_classes(None, 5) == {}
    member = classes_of(np.array([3, -1, 6]), found)
    assert member.shape == (len(found), 3) and member.sum(0).tolist() == [1, 0, 1]


def mlp_of(rows_by_part, activation="relu"):
    return DenseMlp(activation=activation, **rows_by_part)


def module_of(mlp, experts):
    return SimpleNamespace(weights=mlp, experts=experts)


def random_mlp(neurons=64, width=48, *, gated=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    names = ("up_ND", "down_ND", "gate_ND") if gated else ("up_ND", "down_ND")
    parts = {name: torch.randn(neurons, width, generator=generator) for name in names}
    if not gated:
        parts["up_bias_N"] = torch.randn(neurons, generator=generator)
    return mlp_of(parts, "silu" if gated else "relu")


@pytest.mark.parametrize("gated", [True, False])
def test_rows_of_neurons_do_not_depend_on_scale_or_sign(gated):
    mlp = random_mlp(gated=gated)
    factor = 2.0 ** torch.randint(-3, 4, (64, 1), generator=torch.Generator().manual_seed(1))
    if gated:
        factor[::2] *= -1
    bias = None if gated else mlp.up_bias_N * factor[:, 0]
    other = replace(mlp, up_ND=mlp.up_ND * factor, down_ND=mlp.down_ND / factor, up_bias_N=bias)
    assert torch.allclose(neuron_rows(mlp), neuron_rows(other), atol=1e-6)
    assert torch.allclose(neuron_rows(mlp).norm(dim=1), torch.ones(64))


def test_planted_duplicates_are_found_within_and_across_layers():
    one, two = random_mlp(), random_mlp(seed=1)
    parts = {n: getattr(one, n).clone() for n in ("up_ND", "down_ND", "gate_ND")}
    for part in parts.values():
        part[9] = part[8]  # in one expert of 8
        part[40] = part[3]  # in two experts
    parts["up_ND"][9] *= -3
    parts["down_ND"][9] /= -3
    others = {n: getattr(two, n).clone() for n in ("up_ND", "down_ND", "gate_ND")}
    for name, part in others.items():
        part[50] = parts[name][20]
    modules = {0: module_of(mlp_of(parts, "silu"), 8), 1: module_of(mlp_of(others, "silu"), 8)}
    tables = neuron_families(modules)
    found = rows(tables["families"])
    strong = {
        (r["layer"], r["neuron"], r["neighbour_layer"], r["neighbour"]): r
        for r in found
        if r["cosine"] > 0.99
    }
    assert set(strong) == {(0, 8, 0, 9), (0, 3, 0, 40), (0, 20, 1, 50)}
    assert strong[0, 8, 0, 9]["same_expert"] is True and strong[0, 8, 0, 9]["expert"] == 1
    assert (
        strong[0, 3, 0, 40]["same_expert"] is False and strong[0, 3, 0, 40]["neighbour_expert"] == 5
    )
    assert strong[0, 20, 1, 50]["same_expert"] is None
    layers = rows(tables["layers"])
    assert [r["duplicate_neurons"] for r in layers] == [2, 0]
    assert [r["duplicates_in_later_layers"] for r in layers] == [1, 0]
    within = [r["within_cosine_z"] for r in rows(tables["experts"])[:8]]
    assert max(range(8), key=within.__getitem__) == 1


def test_within_expert_similarity_against_drawn_partitions():
    mlp = random_mlp(neurons=60, width=8)
    shared_ND = torch.randn(1, 8, generator=torch.Generator().manual_seed(9))
    mlp.down_ND[12:24] += 2 * shared_ND  # expert 1 of 5 writes alike
    table = neuron_families({0: module_of(mlp, 5)})["experts"]
    cosine = (neuron_rows(mlp) @ neuron_rows(mlp).T).abs().double().numpy()
    pair = np.triu_indices(12, 1)
    drawn, random = [], np.random.default_rng(0)
    for _ in range(20000):
        chosen = random.permutation(60)[:12]
        drawn.append(cosine[np.ix_(chosen, chosen)][pair].mean())
    for expert in range(5):
        own = np.arange(12) + 12 * expert
        mean = cosine[np.ix_(own, own)][pair].mean()
        assert table["within_cosine"][expert] == pytest.approx(mean, rel=1e-4)
        z = (mean - np.mean(drawn)) / np.std(drawn)
        assert table["within_cosine_z"][expert] == pytest.approx(z, rel=0.03, abs=0.05)
    assert table["within_cosine_z"][1] > 3


def test_random_partitions_have_z_about_zero():
    z = []
    for seed in range(6, 18):
        table = neuron_families({0: module_of(random_mlp(128, 16, seed=seed), 16)})["experts"]
        z += table["within_cosine_z"]
    assert abs(np.mean(z)) < 0.25 and 0.8 < np.std(z) < 1.2


def test_families_of_real_layers_run(model):
    modules = sparse_mlps(model)
    tables = neuron_families(modules)
    assert len(tables["experts"]["expert"]) == sum(m.experts for m in modules.values())
    features = neuron_rows(bare(modules[0]))
    for row in rows(tables["families"])[:20]:
        cosine = abs(float(features[row["neuron"]] @ features[row["neighbour"]]))
        assert row["cosine"] == pytest.approx(cosine, rel=1e-4)
