"""The inspection says of a planted model exactly what was planted."""

import json
from functools import partial

import numpy as np
import planted
import pytest
import torch
from naive_experts import heard_by

from moefy.data.corpus import IGNORED
from moefy.data.documents import HELD_OUT, SELECT
from moefy.evaluation.bigram import Bigram
from moefy.evaluation.evaluate import evaluate
from moefy.experts.loading import load
from moefy.experts.passes import run
from moefy.experts.sparse_mlp import all_experts
from moefy.inspection.causal import causal
from moefy.inspection.quality import fit_bigram, induction, other_text, quality_summary
from moefy.inspection.record import rows
from moefy.inspection.routing import RoutingSampler
from moefy.inspection.routing.statistics import routing_statistics
from moefy.inspection.texts import read


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By kind of routing: model, reading, sample."""
    folder, found = tmp_path_factory.mktemp("planted"), {}
    for kind in ("domain", "token", "coin"):
        out, corpus = planted.build(folder, kind)
        model = load(out, plugins=kind == "coin")
        reading = read(model, corpus)
        everything = np.ones(len(reading.documents), dtype=bool)
        sampler = heard_by(model, reading, partial(RoutingSampler, chosen_Q=everything))
        found[kind] = model, reading, sampler.sample()
    return found


@pytest.fixture(scope="module")
def routing(made):
    return {
        kind: routing_statistics(sample, planted.VOCABULARY)
        for kind, (_, _, sample) in made.items()
    }


def bits_beyond_token(sample):
    """H(e | token) / H(e), counted."""
    mask_TE, ids_T = sample.mask(0), sample.tokens.ids_T

    def entropy(mask):
        rate = mask.mean(0)
        rate = rate[(rate > 0) & (rate < 1)]
        return -(rate * np.log2(rate) + (1 - rate) * np.log2(1 - rate)).sum()

    inside = sum((ids_T == v).mean() * entropy(mask_TE[ids_T == v]) for v in np.unique(ids_T))
    return inside / entropy(mask_TE)


def test_the_plant_is_what_it_is_said_to_be(made):
    model, reading, sample = made["domain"]
    domain_T = reading.documents.domain_Q[sample.tokens.document_T]
    assert (sample.mask(0) == (domain_T[:, None] == np.arange(planted.DOMAINS))).all()
    _, _, by_token = made["token"]
    ids_T = by_token.tokens.ids_T
    assert (by_token.mask(0).argmax(1) == ids_T % planted.DOMAINS).all()
    bigram = fit_bigram(model, reading)
    total = evaluate(model, reading.of_shard(HELD_OUT), bigram=bigram)["total"]
    # Routed by domain nothing that does something is left out.
    assert total["ce"]["mean"] == pytest.approx(total["ce_dense"]["mean"], abs=1e-3)
    assert total["ce_dense"]["mean"] < total["ce_bigram"]["mean"] - 0.5


def test_routing_by_domain_is_explained_by_the_domain_beyond_the_token(made, routing):
    (row,) = rows(routing["domain"]["layers"])
    want = bits_beyond_token(made["domain"][2])
    assert 0.3 < want < 1
    assert row["share_domain_low"] > 0
    assert row["share_domain"] == pytest.approx(want, abs=0.1)
    assert row["share_token"] + row["share_domain"] == pytest.approx(1, abs=0.05)
    for cell in rows(routing["domain"]["domains"]):
        own = cell["domain"] == f"d{cell['expert']}"
        assert cell["ds"] == pytest.approx(float(own))
        assert (cell["ds_adj_low"] > 0) if own else (cell["ds_adj_high"] < 0)
        assert cell["q_adj"] < 0.05


def test_routing_by_token_differs_between_domains_and_says_nothing_beyond_the_token(routing):
    (row,) = rows(routing["token"]["layers"])
    assert row["share_token"] > 0.95
    assert abs(row["share_domain"]) < 0.02
    cells = rows(routing["token"]["domains"])
    assert sum(abs(cell["ds"] - 0.25) > 0.03 for cell in cells) >= 4
    assert sum(cell["q"] < 0.05 for cell in cells) >= 4
    covered = [cell["ds_adj_low"] <= 0 <= cell["ds_adj_high"] for cell in cells]
    assert sum(covered) >= len(cells) - 2
    assert all(abs(cell["ds_adj"]) < 0.01 for cell in cells)


def test_routing_by_a_coin_is_explained_by_nothing(routing):
    (row,) = rows(routing["coin"]["layers"])
    for name in ("token", "domain", "previous", "position"):
        assert abs(row[f"share_{name}"]) < 0.01, name
    assert abs(row["vs_adj"]) < 0.05
    assert all(cell["q"] > 0.05 for cell in rows(routing["coin"]["domains"]))


def test_ablating_a_block_costs_its_domain_alone(made):
    model, reading, _ = made["domain"]
    found = causal(model, reading, tokens=4000, mode="zero", nulls=0)["causal"]
    cells = [
        row
        for row in rows(found)
        if (row["model"], row["mode"]) == ("dense", "zero")
        and row["domain"] in reading.documents.domains
    ]
    assert len(cells) == planted.DOMAINS**2
    for row in cells:
        if row["domain"] == f"d{row['expert']}":
            assert row["ce_low"] > 0.3
            assert row["csi_low"] > 0.3
        else:
            assert abs(row["ce"]) < 1e-4
            assert row["csi_high"] < 0


def test_a_bigram_scored_as_moefied_has_no_skill_although_its_top_10_look_well(made, tmp_path):
    dense, reading, _ = made["domain"]
    fitted = other_text(dense, reading)
    bigram = fit_bigram(dense, reading)
    out, _ = planted.build(tmp_path, "token", planted.bigram_model(bigram, fitted.documents))
    model, batches = load(out), reading.of_shard(HELD_OUT)
    record = evaluate(model, batches, against=dense_of(dense, tmp_path), bigram=bigram)
    assert abs(record["total"]["bigram_skill"]["mean"]) < 0.01
    hits = seen = 0
    for batch in batches:
        keep_BT = batch.targets_BT != IGNORED
        best = run(model, batch).logits.topk(10).indices[keep_BT]
        hits += int((best == batch.targets_BT[keep_BT][:, None]).any(1).sum())
        seen += int(keep_BT.sum())
    assert hits / seen > 0.75


def dense_of(model, folder):
    planted.dense_model().save_pretrained(folder / "dense")
    return type(model).from_pretrained(folder / "dense")


def test_page_one_of_the_planted_model(made, routing):
    model, reading, _ = made["domain"]
    found = quality_summary(model, reading, routing["domain"])
    assert json.loads(json.dumps(found)) == found
    for name, entry in found.items():
        assert entry.keys() >= {"value", "low", "high", "what"}, name
        if entry["value"] is not None and entry["low"] is not None:
            assert entry["low"] <= entry["value"] <= entry["high"], name
    assert found["bigram_skill"]["value"] == pytest.approx(1, abs=1e-3)
    assert found["kl"]["value"] < 1e-3
    assert found["perfect"]["value"] < 1e-4
    assert found["perfect"]["verdict"].startswith("equal")
    assert found["share_domain"]["value"] == routing["domain"]["routing"]["share_domain"][0]
    assert found["random_weights"]["value"] is None
    assert found["stability"]["value"] is None
    # It has no head that looks back for repeats, and no document is long.
    assert found["induction_dense"]["high"] > -0.1
    assert found["late_dense"]["value"] is None
    by_token = quality_summary(*made["token"][:2], {"layers": {"stability_ari": [0.9, None, 0.7]}})
    assert by_token["bigram_skill"]["high"] < 0.6
    assert by_token["ce_increase"]["low"] > 0.3
    assert by_token["stability"]["value"] == pytest.approx(0.8)
    assert (by_token["stability"]["low"], by_token["stability"]["high"]) == (0.7, 0.9)
    assert by_token["perfect"]["verdict"].startswith("equal")


def test_a_model_that_is_not_the_dense_one_with_all_experts_on_is_told(made):
    from moefy.experts.sparse_mlp import sparse_mlps
    from moefy.inspection.quality import perfect

    model, reading, _ = made["token"]
    weight = sparse_mlps(model)[0].down_ND
    with torch.no_grad():
        weight[0, planted.OUT] += 3
        entry = perfect(model, reading.batches[0])
        weight[0, planted.OUT] -= 3
    assert entry["verdict"].startswith("NOT equal")
    assert entry["value"] > 0.01


def test_the_bigram_of_page_one_has_seen_no_held_out_document(made):
    model, reading, _ = made["domain"]
    documents = reading.documents
    known = {doc.sha256 for doc in other_text(model, reading).documents}
    for doc, shard in zip(documents.documents, documents.shards, strict=True):
        assert (doc.sha256 in known) == (shard == SELECT)
    assert isinstance(fit_bigram(model, reading), Bigram)


def test_induction_is_the_second_time_less_the_first(made):
    model, reading, _ = made["token"]
    found = induction(model, reading, seed=3)
    known = torch.unique(
        torch.cat([s.inputs["input_ids"] for b in reading.batches for s in b.samples])
    )
    draw = torch.randint(len(known), (32, 40), generator=torch.Generator().manual_seed(3))
    ids_BT = known[draw].repeat(1, 2)
    with torch.no_grad(), all_experts(model):
        nats_BT = (
            -model(input_ids=ids_BT)
            .logits.log_softmax(-1)[:, :-1]
            .gather(2, ids_BT[:, 1:, None])[..., 0]
        )
    # The prediction of tokens 1 to 39, and of 41 to 79.
    away_B = nats_BT[:, 40:79].mean(1) - nats_BT[:, :39].mean(1)
    assert float(found["dense"].mean_C[0]) == pytest.approx(float(away_B.mean()), abs=1e-4)
    assert float(found["moefied"].mean_C[0]) != pytest.approx(float(away_B.mean()), abs=1e-4)
