"""Intervals, tests and chance levels of the causal matrix on data where the answer is known, and planted
experts in a whole model.

Shapes: S sets, D documents, C domains, E experts.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_conversion import convert_tiny
from tiny_models import FAMILIES_TINY, random_model

import moefy
from moefy.data.corpus import Document
from moefy.data.documents import HELD_OUT, Documents
from moefy.evaluation.statistics import q_values
from moefy.inspection.causal.documents import Texts, draw
from moefy.inspection.causal.engine import AblationEngine, Effects, neurons_of, of_layer, of_sets
from moefy.inspection.causal.matrix import (
    Measured,
    matrix,
    pooled_p,
    selectivity,
    selectivity_p,
    strongest,
)
from moefy.inspection.causal.nulls import RandomSets, against_null, energy_slope, matches
from moefy.inspection.record import rows
from moefy.inspection.texts import read
from moefy.run.console import Reporter

DOMAINS = ("low", "middle", "high")


def uneven(random: np.random.Generator, sets: int, domains: int, each: int, means_SC=None):
    """Damage of documents whose spread differs between domains, heavy on one side."""
    domain_Q = np.repeat(np.arange(domains), each)
    spread_D = 0.1 * (1 + domain_Q)
    values_SQ = spread_D * (random.exponential(size=(sets, len(domain_Q))) - 1)
    if means_SC is not None:
        values_SQ += means_SC[:, domain_Q]
    return values_SQ, domain_Q


def test_selectivity_is_the_contrast_of_domain_means_and_covers_it():
    random = np.random.default_rng(0)
    means_SC = random.normal(size=(200, 4))
    values_SQ, domain_Q = uneven(random, 200, 4, 30, means_SC)
    found = selectivity(values_SQ, domain_Q, np.arange(len(domain_Q)))
    truth_SC = np.empty_like(means_SC)
    for s in range(200):
        for c in range(4):
            own = values_SQ[s, domain_Q == c].mean()
            rest = np.mean([values_SQ[s, domain_Q == o].mean() for o in range(4) if o != c])
            assert found.mean_C[s, c] == pytest.approx(own - rest)
            truth_SC[s, c] = means_SC[s, c] - np.delete(means_SC[s], c).mean()
    covered_C = ((found.low_C <= truth_SC) & (truth_SC <= found.high_C)).mean(0)
    assert 0.89 < covered_C.mean() < 0.98 and covered_C.min() > 0.86
    # As wide as the normal interval of the contrast of independent means.
    error_C = np.array([values_SQ[:, domain_Q == c].var(1).mean() / 30 for c in range(4)])
    want_C = 2 * 1.96 * np.sqrt(error_C + (error_C.sum() - error_C) / 9)
    assert np.abs((found.high_C - found.low_C).mean(0) / want_C - 1).max() < 0.1


def test_selectivity_corrects_for_skewness_below_a_hundred_units():
    values_SQ, domain_Q = uneven(np.random.default_rng(1), 40, 2, 20)
    few = selectivity(values_SQ, domain_Q, np.arange(40))
    right = few.high_C[:, 1] - few.mean_C[:, 1]
    left = few.mean_C[:, 1] - few.low_C[:, 1]
    assert right.mean() > 1.2 * left.mean()
    one = selectivity(values_SQ[:1], np.zeros(40, dtype=int), np.arange(40))
    assert np.isnan(one.mean_C).all()


def test_units_of_one_source_are_drawn_together():
    random = np.random.default_rng(2)
    domain_Q, unit_Q = np.repeat([0, 1], 100), np.arange(200) // 10
    values_SQ = random.normal(size=(50, 20))[:, unit_Q]
    by_source = selectivity(values_SQ, domain_Q, unit_Q)
    by_document = selectivity(values_SQ, domain_Q, np.arange(200))
    ratio = (by_source.high_C - by_source.low_C) / (by_document.high_C - by_document.low_C)
    assert 2.3 < ratio.mean() < 3.8  # sqrt(10), ten documents being one draw; BCa is a little wider


def test_shuffled_labels_give_false_positives_at_their_level():
    random = np.random.default_rng(3)
    p_values = []
    for seed in range(3):
        # Documents differ, domains do not: labels are shuffled over them.
        values_SQ, domain_Q = uneven(random, 100, 5, 30)
        random.shuffle(domain_Q)
        p_values.append(selectivity_p(values_SQ, domain_Q, seed=seed))
    p = np.concatenate(p_values)
    assert (p < 0.05).mean() <= 0.07 and stats.kstest(p.ravel(), "uniform").statistic < 0.06
    assert (q_values(p) < 0.05).sum() == 0
    # Domains that vary differently about the same mean are no finding either.
    values_SQ, domain_Q = uneven(random, 300, 5, 40)
    assert (selectivity_p(values_SQ, domain_Q) < 0.05).mean() <= 0.075
    planted_SC = np.zeros((300, 5))
    planted_SC[7, 2] = 1.0
    values_SQ, domain_Q = uneven(random, 300, 5, 40, planted_SC)
    q = q_values(selectivity_p(values_SQ, domain_Q))
    assert q[7, 2] < 0.05 and (np.delete(q, 7, axis=0) < 0.05).sum() <= 2


def random_layer(random, experts: int, per_bin: int, extra_EC):
    """Experts that are random sets themselves, four bins of them, and the sets beside them."""
    bin_E, bin_S = np.repeat(np.arange(4), experts // 4), np.repeat(np.arange(4), per_bin)
    scale = np.array([0.1, 0.3, 1.0, 3.0])
    increase_EC = scale[bin_E, None] * random.gamma(4, size=(experts, 3)) + extra_EC
    null_SC = scale[bin_S, None] * random.gamma(4, size=(len(bin_S), 3))
    sets = RandomSets([], bin_S, scale[bin_S], bin_E, scale[bin_E])
    return increase_EC, null_SC, sets


def test_experts_like_random_sets_are_not_told_from_them():
    random = np.random.default_rng(4)
    increase_EC, null_SC, sets = random_layer(random, 400, 20, 0.0)
    found = against_null(increase_EC, null_SC, sets)
    p_EC = pooled_p(found.z_EC, found.null_z_SC.ravel())
    assert abs(found.percentile_EC.mean() - 50) < 6
    assert 0.02 < (p_EC < 0.05).mean() < 0.08
    assert (q_values(p_EC) < 0.05).mean() < 0.01
    for expert, domain in ((3, 0), (150, 1), (399, 2)):
        null = null_SC[sets.bin_S == sets.bin_E[expert], domain]
        want = (increase_EC[expert, domain] - null.mean()) / null.std(ddof=1)
        assert found.z_EC[expert, domain] == pytest.approx(want)
        below = 100 * np.mean(null < increase_EC[expert, domain])
        assert found.percentile_EC[expert, domain] == pytest.approx(below)
    for s in (0, 30, 79):
        others = np.delete(null_SC[sets.bin_S == sets.bin_S[s]], s % 20, axis=0)
        want_C = (null_SC[s] - others.mean(0)) / others.std(0, ddof=1)
        assert found.null_z_SC[s] == pytest.approx(want_C)
    # An expert that does far more than its bin is found among 1200 cells.
    extra_EC = np.zeros((400, 3))
    extra_EC[11, 1] = 4.0
    increase_EC, null_SC, sets = random_layer(random, 400, 20, extra_EC)
    found = against_null(increase_EC, null_SC, sets)
    p_EC = pooled_p(found.z_EC, found.null_z_SC.ravel())
    assert p_EC[11, 1] == p_EC.min() < 0.01
    assert found.percentile_EC[11, 1] == 100
    missing = np.where(np.arange(3) == 1, np.nan, found.z_EC[:1])
    assert np.isnan(pooled_p(missing, found.null_z_SC.ravel())[0]).tolist() == [False, True, False]


def layer_of_a_law(random, slope: float):
    """32 experts that are random sets themselves, energies a factor of 100 apart, and what damage such a
    set of any energy does: energy^slope, a spread that grows with it, and noise that does not."""
    energy_E = np.exp(random.uniform(0, np.log(100), 32))

    def damage(energy):
        size = energy[:, None] ** slope * random.lognormal(0, 0.4, (len(energy), 1))
        return size * random.lognormal(0, 0.2, (len(energy), 3)) + 0.05 * random.normal(
            size=(len(energy), 3)
        )

    return energy_E, damage


def equal_counts(energy_E, count):
    """Three bins of equal count, a set for each expert in turn: what `matches` must be better than."""
    bin_E = np.empty(32, dtype=int)
    bin_E[np.argsort(energy_E)] = np.arange(32) * 3 // 32
    members = [np.flatnonzero(bin_E == b) for b in range(3)]
    return bin_E, np.concatenate(
        [m[np.argsort(energy_E[m])][np.arange(count) % len(m)] for m in members]
    )


def p_of_a_law(slope: float, choose, *, corrected: bool, layers: int = 120):
    """p and percentile of every expert `[layers, E, C]`, the weakest first."""
    random = np.random.default_rng(6)
    z, percentile, null = [], [], []
    for _ in range(layers):
        energy_E, damage = layer_of_a_law(random, slope)
        bin_E, model_S = choose(energy_E, 20)
        energy_S = energy_E[model_S] * random.uniform(0.95, 1.05, len(model_S))
        increase_EC, null_SC = damage(energy_E), damage(energy_S)
        order = np.argsort(energy_E)
        if not corrected:
            energy_E, energy_S = (np.ones_like(v) for v in (energy_E, energy_S))
        found = against_null(
            increase_EC, null_SC, RandomSets([], bin_E[model_S], energy_S, bin_E, energy_E)
        )
        z.append(found.z_EC[order])
        percentile.append(found.percentile_EC[order])
        null.append(found.null_z_SC.ravel())
    p = pooled_p(np.concatenate(z), np.concatenate(null)).reshape(layers, 32, 3)
    return p, np.stack(percentile)


def found_rate(p: np.ndarray, at: slice) -> float:
    return float((p[:, at] < 0.05).mean())


WEAKEST, STRONGEST = slice(0, 1), slice(31, 32)


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0])
def test_the_strongest_expert_is_not_flattered_by_weaker_random_sets(slope):
    p, percentile = p_of_a_law(slope, matches, corrected=True)
    assert 0.03 < found_rate(p, slice(None)) < 0.07
    for at in (WEAKEST, STRONGEST):
        assert 0.01 < found_rate(p, at) < 0.09
        assert abs(percentile[:, at].mean() - 50) < 7
    if slope:  # what this is for
        p, percentile = p_of_a_law(slope, equal_counts, corrected=False)
        assert found_rate(p, STRONGEST) > 0.09 and percentile[:, STRONGEST].mean() > 57


def test_a_special_expert_is_found_at_every_energy():
    random = np.random.default_rng(8)
    for rank in (0, 16, 31):
        energy_E, damage = layer_of_a_law(random, 0.6)
        special = np.argsort(energy_E)[rank]
        bin_E, model_S = matches(energy_E, 20)
        energy_S = energy_E[model_S]
        increase_EC, null_SC = damage(energy_E), damage(energy_S)
        increase_EC[special, 1] = 8 * energy_E[special] ** 0.6
        sets = RandomSets([], bin_E[model_S], energy_S, bin_E, energy_E)
        found = against_null(increase_EC, null_SC, sets)
        p_EC = pooled_p(found.z_EC, found.null_z_SC.ravel())
        assert found.z_EC[special, 1] == found.z_EC.max() > 8
        assert p_EC[special, 1] == p_EC.min() <= 0.01
        assert found.percentile_EC[special, 1] == 100


def test_random_sets_are_matched_to_all_experts_of_their_bins():
    energy_E = np.array([1.0, 12.0, 13.0, 24.0, 26.0, 49.0, 51.0, 100.0])
    bin_E, model_S = matches(energy_E, 3)
    assert bin_E.tolist() == [3, 3, 2, 2, 1, 1, 0, 0]
    assert energy_E[model_S].reshape(4, 3)[:, [0, 2]].tolist() == [
        [51, 100], [26, 49], [13, 24], [1, 12],
    ]  # fmt: skip
    # More experts than sets: the strongest is among those that are matched.
    bin_E, model_S = matches(np.linspace(60, 100, 50), 5)
    assert not bin_E.any() and model_S.tolist() == [0, 12, 24, 37, 49]
    bin_E, model_S = matches(np.array([0.0, 0.0, 5.0]), 2)
    assert bin_E.tolist() == [1, 1, 0] and model_S.tolist() == [2, 2, 0, 1]


def test_the_slope_is_that_of_the_law_whatever_a_few_sets_do():
    random = np.random.default_rng(9)
    for slope in (0.2, 0.5, 0.8):
        away = []
        for _ in range(60):
            energy_S = np.exp(random.uniform(0, 4, 80))
            increase_S = energy_S**slope * random.lognormal(0, 0.5, 80)
            found, error = energy_slope(increase_S, energy_S)
            away.append((found - slope) / error)
            least_squares = stats.linregress(np.log(energy_S), np.log(increase_S))
            assert found == pytest.approx(least_squares.slope, abs=0.08)
            assert error == pytest.approx(least_squares.stderr, rel=0.6)
        assert abs(np.mean(away)) < 0.5 and 0.7 < np.std(away) < 1.4
        # Sets that do no harm, at any energy, and one that does enormous harm.
        increase_S[::16] *= -1
        increase_S[5] = 1e6
        assert energy_slope(increase_S, energy_S)[0] == pytest.approx(slope, abs=0.15)
    assert energy_slope(energy_S**-1.0, energy_S)[0] == 0.0
    assert energy_slope(energy_S**3.0, energy_S)[0] == 1.0
    slope, error = energy_slope(np.array([1.0, 2.0]), np.array([3.0, 3.0]))
    assert slope == 1.0 and np.isnan(error)


@pytest.mark.parametrize("harmless", [0, 2, 4, 10, 14, 20])
def test_a_slope_has_no_error_where_many_sets_raise_no_loss(harmless):
    random = np.random.default_rng(3)
    energy_S = random.lognormal(0, 0.6, 20)
    increase_S = energy_S**0.5 * random.lognormal(0, 0.1, 20)
    increase_S[random.permutation(20)[:harmless]] = -1e-6
    error = energy_slope(increase_S, energy_S)[1]
    assert error < 0.3 if harmless <= 2 else np.isnan(error)


def test_matrix_is_the_mean_over_documents_of_means_over_tokens():
    random = np.random.default_rng(5)
    docs = [Document(DOMAINS[i % 3], str(i), ids=(i, 1)) for i in range(36)]
    texts = Texts([], Documents(docs, [HELD_OUT] * 36, ["c"] * 36), np.arange(36), 2)
    values_SQ = random.normal(size=(4, 36)) + 0.5
    effects = Effects(values_SQ, np.abs(values_SQ), np.ones((4, 3)))

    class Counted(Texts):
        tokens_Q = np.full(36, 2)

    texts = Counted(texts.batches, texts.documents, texts.number_Q, 2)
    found, table = matrix([Measured([(0, e) for e in range(4)], effects)], texts)
    domain_Q = texts.documents.domain_Q
    names = texts.documents.domains
    for row in rows(table):
        here = domain_Q == names.index(row["domain"])
        assert row["ce"] == pytest.approx(values_SQ[row["expert"], here].mean(), rel=1e-4)
        assert row["kl"] == pytest.approx(np.abs(values_SQ)[row["expert"], here].mean(), rel=1e-4)
        assert (row["documents"], row["tokens"], row["few"]) == (12, 24, True)
        boot = stats.bootstrap((values_SQ[row["expert"], here],), np.mean, rng=0, n_resamples=4000)
        low, high = boot.confidence_interval
        assert row["ce_low"] == pytest.approx(low, abs=0.12)
        assert row["ce_high"] == pytest.approx(high, abs=0.12)
        assert row["z_random"] is None and row["p"] is None
    order = strongest(found, 4).tolist()
    tops = found.csi.mean_C.max(1)
    assert order == sorted(range(4), key=lambda e: -tops[e])


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> tuple[Path, Path]:
    """A llama without attention whose experts 1, 4 and 6 of layer 0 each lift the tokens of one domain
    where that domain is read; the others write noise that no domain sees more than another."""
    folder = tmp_path_factory.mktemp("planted")
    tiny = FAMILIES_TINY["llama"]
    model = random_model(tiny.auto, tiny.make_config())
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        embed, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embed.copy_(0.3 * torch.randn(embed.shape, generator=generator))
        head.copy_(0.3 * torch.randn(head.shape, generator=generator))
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.mul_(0.02)
            for norm in (block.input_layernorm, block.post_attention_layernorm):
                norm.weight.fill_(1.0)
        model.model.norm.weight.fill_(1.0)
        mlp = model.model.layers[0].mlp
        for domain, expert in enumerate((1, 4, 6)):
            words = slice(3 + 29 * domain, 32 + 29 * domain)
            embed[:, domain], head[:, 8 + domain] = 0.0, 0.0
            embed[words, domain], head[words, 8 + domain] = 2.0, 1.0
            own = slice(8 * expert, 8 * expert + 8)
            for matrix_ in (mlp.gate_proj, mlp.up_proj):
                matrix_.weight[own] = 0.0
                matrix_.weight[own, domain] = 1.0
            mlp.down_proj.weight[:, own] = 0.0
            mlp.down_proj.weight[8 + domain, own] = 0.2
    model.save_pretrained(folder / "source")
    settings = {"partition.method": "contiguous", "router.epochs": 1, "compensation.name": "none"}
    convert_tiny("llama", folder / "source", folder / "out", settings=settings)
    docs = []
    for number in range(240):
        low = 3 + 29 * (number % 3)
        ids = torch.randint(low, low + 29, (16,), generator=generator).tolist()
        docs.append({"domain": DOMAINS[number % 3], "source_id": str(number), "input_ids": ids})
    path = folder / "corpus.jsonl"
    path.write_text("\n".join(map(json.dumps, docs)))
    return folder / "out", path


def test_planted_experts_are_selective_for_their_domain_alone(planted):
    folder, corpus = planted
    model = moefy.load(folder)
    reading = read(model, corpus)
    texts = draw(reading, HELD_OUT, 1500)
    assert np.bincount(texts.documents.domain_Q).min() >= 30
    engine = AblationEngine(model, mode="zero")
    pairs = [(layer, e) for layer in (0, 1) for e in range(8)]
    sets = [of_layer(engine, layer, neurons_of(engine, layer, e)) for layer, e in pairs]
    parts = [Measured(pairs, of_sets(engine, texts, sets, Reporter(quiet=True), ""))]
    _, table = matrix(parts, texts)
    found = {
        (row["layer"], row["expert"], row["domain"])
        for row in rows(table)
        if row["csi_low"] > 0 and row["csi"] > 0.01
    }
    want = {(0, 1, "low"), (0, 4, "middle"), (0, 6, "high")}
    assert found == want
    for row in rows(table):
        cell = (row["layer"], row["expert"], row["domain"])
        assert (row["ce_low"] > 0.05) == (cell in want)
        if cell in want:
            assert row["csi_p"] <= 0.001 and row["ce"] > 0.1
    # With the labels of documents shuffled nothing is left.
    shuffled = texts.documents.documents.copy()
    order = np.random.default_rng(0).permutation(len(shuffled))
    labels = [shuffled[i].domain for i in order]
    documents = Documents(
        [Document(d, x.source_id, ids=x.ids) for d, x in zip(labels, shuffled, strict=True)],
        texts.documents.shards, texts.documents.corpora,
    )  # fmt: skip
    _, null = matrix(parts, Texts(texts.batches, documents, texts.number_Q, texts.length))
    p = np.array([row["csi_p"] for row in rows(null)])
    # The noise of the other experts is shared between cells, so that few experts stand for them all.
    assert (p < 0.05).mean() <= 0.15 and (q_values(p) < 0.05).sum() == 0
