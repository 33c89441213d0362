"""Contributions, router quality and examples against outputs formed one by one; contexts of hostile text."""

import base64
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from naive_experts import column, heard_by, naive
from tiny_conversion import convert_tiny
from tiny_models import build

import moefy
from moefy.data.corpus import Document, Sample
from moefy.data.documents import HELD_OUT, SELECT, Documents
from moefy.errors import MoefyError
from moefy.inspection.experts import ERROR, Contributions, RouterQualityOfExperts
from moefy.inspection.experts.examples import REACH, Best, Chunk, Examples
from moefy.inspection.part import Blocks
from moefy.inspection.record import NOTHING, rows
from moefy.inspection.texts import Reading, context, read, spans_of
from moefy.inspection.texts.tokens import Tokens, uniforms

SETTINGS = {
    "llama": {
        "partition.shared": 2,
        "selection.name": "threshold",
        "compensation.name": "conditional_mean",
    },
    "opt": {"partition.shared": 0, "selection.name": "topk", "compensation.name": "none"},
    "bert": {"partition.shared": 0, "selection.name": "topk", "compensation.name": "mean"},
}


def documents():
    """Ids of two domains and unlike lengths; the first token is the same everywhere."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for number in range(36):
        ids = torch.randint(3, 90, (5 + number % 19,), generator=generator)
        domain = "low" if number % 2 else "high"
        found.append(Document(domain, str(number), ids=(1, *(ids // 2 * 2 + number % 2).tolist())))
    return found


@pytest.fixture(scope="module", params=SETTINGS)
def case(request, tmp_path_factory):
    """A model, what is read, and what its experts put out."""
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    convert_tiny(name, build(name, folder / "s"), folder / "o", settings=SETTINGS[name])
    model = moefy.load(folder / "o")
    reading = read(model, _corpus(folder, documents()))
    return model, reading, naive(model, reading)


def _corpus(folder, docs):
    import json

    path = folder / "corpus.jsonl"
    lines = [{"domain": d.domain, "source_id": d.source_id, "input_ids": list(d.ids)} for d in docs]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_shards_share_no_document(case):
    _, reading, _ = case
    hashes = {
        shard: {
            d.sha256
            for d, s in zip(reading.documents.documents, reading.documents.shards, strict=True)
            if s == shard
        }
        for shard in (SELECT, HELD_OUT)
    }
    assert all(hashes.values()) and not hashes[SELECT] & hashes[HELD_OUT]


def test_contributions_are_those_of_every_output_formed(case):
    model, reading, want = case
    tables = heard_by(model, reading, Contributions).tables()
    for layer, w in want.items():
        here = [row for row in rows(tables["experts"]) if row["layer"] == layer]
        ran = w.ran_TE.double()
        for suffix, keep in (("", w.position_T >= 0), ("_later", w.position_T > 0)):
            norm, share, on = w.norm_TE[keep], w.share_TE[keep], ran[keep]
            energy = norm.square().mean(0)
            for name, value in {
                "norm": norm.mean(0),
                "norm_routed": (norm * on).sum(0) / on.sum(0),
                "share": share.mean(0),
                "share_routed": (share * on).sum(0) / on.sum(0),
                "energy": energy / energy.sum(),
            }.items():
                got = [row[name + suffix] for row in here]
                want_E = [None if np.isnan(v) else v for v in value.tolist()]
                assert got == [None if v is None else pytest.approx(v, rel=1e-4) for v in want_E]
            got = [row["share" + suffix] for row in here]
            assert sum(got) == pytest.approx(1, abs=1e-4)
            whole = rows(tables["layers"])[layer]
            y_TD = w.y_TED.sum(1)[keep]
            total = y_TD.square().sum(1).mean()
            error = w.error_TD[keep].square().sum(1).mean()
            assert whole["error_energy" + suffix] == pytest.approx(float(error / total), rel=1e-3)
            cross = 1 - energy.sum() / total
            assert whole["cross_term" + suffix] == pytest.approx(float(cross), rel=1e-3, abs=1e-4)
        assert whole["share_sum_error"] < 1e-4
        assert whole["contribution_tokens"] == len(w.norm_TE)
        low, mean, high = (column(tables["experts"], f"norm{e}") for e in ("_low", "", "_high"))
        assert bool(((low < mean) & (mean < high)).all())


def test_energy_is_given_by_domain_and_for_the_error(case):
    model, reading, want = case
    table = heard_by(model, reading, Contributions).tables()["energy"]
    domain_Q = torch.from_numpy(reading.documents.domain_Q)
    found = {(r["layer"], r["expert"], r["domain"]): r for r in rows(table)}
    for layer, w in want.items():
        for number, domain in enumerate(reading.documents.domains):
            keep = domain_Q[w.document_T] == number
            values = w.norm_TE[keep].square().mean(0).tolist()
            for expert, value in enumerate(values):
                assert found[layer, expert, domain]["energy"] == pytest.approx(value, rel=1e-4)
            row = found[layer, ERROR, domain]
            error = w.error_TD[keep].square().sum(1).mean()
            assert row["energy"] == pytest.approx(float(error), rel=1e-3)
            assert row["energy_low"] < row["energy"] < row["energy_high"]
            assert row["documents"] == int((domain_Q == number).sum())


def test_router_quality_of_each_expert_is_that_of_a_loop(case):
    model, reading, want = case
    tables = heard_by(model, reading, RouterQualityOfExperts).tables()
    from moefy.experts.sparse_mlp import sparse_mlps

    for layer, module in sparse_mlps(model).items():
        w, shared = want[layer], module.shared
        oracle_TE = torch.zeros_like(w.ran_TE[:, shared:])
        for token, ran in enumerate(w.ran_TE[:, shared:]):
            order = w.norm_TE[token, shared:].argsort(descending=True)
            oracle_TE[token, order[: int(ran.sum())]] = True
        ran_TE = w.ran_TE[:, shared:]
        hits = (oracle_TE & ran_TE).sum(0).double()
        here = {
            name: column(tables["experts"], name, len(want), -1)[layer, shared:]
            for name in ("router_recall", "router_precision", "router_tokens")
        }
        assert torch.allclose(
            here["router_recall"], hits / oracle_TE.sum(0), equal_nan=True, atol=1e-5
        )
        assert torch.allclose(
            here["router_precision"], hits / ran_TE.sum(0), equal_nan=True, atol=1e-5
        )
        assert here["router_tokens"].tolist() == ran_TE.sum(0).tolist()
        row = rows(tables["layers"])[layer]
        assert row["recall"] == pytest.approx(float(hits.sum() / ran_TE.sum()), rel=1e-5)
        energy = w.y_TED.sum(1).square().sum()
        missed = w.error_TD.square().sum() / energy
        assert row["missed_energy"] == pytest.approx(float(missed), rel=1e-3)
        off_TED = w.y_TED[:, shared:] * ~oracle_TE[:, :, None]
        extra = module.compensation(w.x_TD, oracle_TE)
        best = off_TED.sum(1) - (0 if extra is None else extra.double())
        assert row["unavoidable"] == pytest.approx(float(best.square().sum() / energy), rel=1e-3)
        assert row["router_added"] == pytest.approx(
            row["missed_energy"] - row["unavoidable"], abs=1e-5
        )
        shared_rows = column(tables["experts"], "router_recall", len(want), -1)[layer, :shared]
        assert bool(shared_rows.isnan().all())


def test_a_share_of_the_tokens_stands_for_all(case):
    model, reading, _ = case
    tokens = int(reading.tokens_Q.sum())
    half = partial(RouterQualityOfExperts, tokens=tokens // 2)
    sums = heard_by(model, reading, half).layers[0].sums.all_GX
    whole = heard_by(model, reading, RouterQualityOfExperts).layers[0].sums.all_GX
    assert 0.3 < sums.sum() / whole.sum() < 0.7


@pytest.fixture(scope="module")
def examples(case):
    model, reading, want = case
    found = heard_by(model, reading, partial(Examples, kept=20, sampled=500))
    return reading, want, found.tables(), model


def _panel(tables, layer, expert, panel, shard):
    return [
        r
        for r in rows(tables["examples"])
        if (r["layer"], r["expert"], r["panel"], r["shard"]) == (layer, expert, panel, shard)
    ]


def _later(reading, want, shard):
    here_D = torch.from_numpy(reading.documents.of_shard(shard))
    return (want.position_T > 0) & here_D[want.document_T]


@pytest.mark.parametrize("shard", [SELECT, HELD_OUT])
def test_top_examples_are_the_best_of_each_document(examples, shard):
    reading, want, tables, _ = examples
    for layer, w in want.items():
        keep = _later(reading, w, shard)
        for expert in range(w.norm_TE.shape[1]):
            best = {}
            for t in keep.nonzero().flatten().tolist():
                value, document = float(w.norm_TE[t, expert]), int(w.document_T[t])
                best[document] = max(best.get(document, (-1.0, 0)), (value, int(w.position_T[t])))
            expected = sorted(best.values(), reverse=True)[:20]
            got = _panel(tables, layer, expert, "top", shard)
            assert [r["norm"] for r in got] == pytest.approx([v for v, _ in expected], rel=1e-4)
            assert len({r["document"] for r in got}) == len(got)
            assert all(r["position"] > 0 for r in got)


def test_every_example_says_what_is_true_of_its_token(examples):
    reading, want, tables, _ = examples
    at = {
        layer: {
            (int(d), int(p)): t
            for t, (d, p) in enumerate(zip(w.document_T, w.position_T, strict=True))
        }
        for layer, w in want.items()
    }
    largest = column(tables["experts"], "norm_max", len(want), -1)
    shards = reading.documents.shards
    for row in rows(tables["examples"])[::7]:
        w, expert = want[row["layer"]], row["expert"]
        t = at[row["layer"]][row["document"], row["position"]]
        assert row["norm"] == pytest.approx(float(w.norm_TE[t, expert]), rel=1e-3, abs=1e-5)
        assert row["share"] == pytest.approx(float(w.share_TE[t, expert]), rel=1e-2, abs=1e-4)
        assert row["ran"] == bool(w.ran_TE[t, expert])
        assert shards[row["document"]] == row["shard"]
        if row["panel"] == "random":
            assert row["ran"]
        if row["margin"] is not None:
            assert (row["margin"] > 0) == row["ran"]
        window = np.frombuffer(base64.b64decode(row["window"]), dtype=np.uint8)
        assert len(window) == 2 * REACH + 1
        top = float(largest[row["layer"], expert])
        for offset, level in enumerate(window.tolist()):
            there = at[row["layer"]].get((row["document"], row["position"] + offset - REACH))
            if there is None:
                assert level == NOTHING
            else:
                expected = min(254.0, 254 * float(w.norm_TE[there, expert]) / top)
                assert abs(level - expected) <= 0.7


def test_spectrum_has_bins_of_equal_count(examples):
    reading, want, tables, _ = examples
    for layer, w in want.items():
        norm = w.norm_TE[_later(reading, w, HELD_OUT), 1]
        got = _panel(tables, layer, 1, "spectrum", HELD_OUT)
        assert sorted({r["bin"] for r in got}) == list(range(10))
        assert all(sum(r["bin"] == b for r in got) == 2 for b in range(10))
        for row in got:  # the place of its norm among all of them
            place = float((norm < row["norm"] * (1 - 1e-5)).double().mean())
            assert row["bin"] / 10 - 0.05 <= place <= (row["bin"] + 1) / 10 + 0.05


def test_near_examples_are_pairs_of_one_document(examples):
    _, _, tables, model = examples
    from moefy.experts.sparse_mlp import sparse_mlps

    shared = sparse_mlps(model)[0].shared
    pairs = {}
    for row in rows(tables["examples"]):
        if row["panel"] == "near":
            assert row["expert"] >= shared
            pairs.setdefault((row["layer"], row["expert"], row["bin"]), []).append(row)
    assert pairs
    gaps = {}
    for key, (one, other) in pairs.items():
        assert {one["ran"], other["ran"]} == {True, False} and one["document"] == other["document"]
        gaps.setdefault(key[:2], []).append(abs(one["margin"]) + abs(other["margin"]))
    assert all(np.all(np.diff(g) >= -1e-4) for g in gaps.values())


def test_negative_examples_cancel(examples):
    _, _, tables, _ = examples
    got = [r for r in rows(tables["examples"]) if r["panel"] == "negative"]
    assert got and all(r["share"] < 0 and r["shard"] == SELECT for r in got)


def test_quantiles_are_those_of_the_norms(examples):
    _, want, tables, _ = examples
    checked = 0
    for row in rows(tables["quantiles"]):
        if row["domain"] is None:
            w = want[row["layer"]]
            keep = (w.position_T > 0) & (w.ran_TE[:, row["expert"]] == row["ran"])
            norm = w.norm_TE[keep, row["expert"]].numpy()
            assert row["tokens"] == len(norm)  # fewer than the sample: all of them
            assert row["p90"] == pytest.approx(np.quantile(norm, 0.9), rel=1e-4)
            assert row["p1"] <= row["p50"] <= row["p99"]
            checked += 1
    assert checked >= 8


def test_draws_depend_on_the_place_alone():
    place = np.arange(4000)
    tokens = Tokens(place, place, place, place, place % 40, place // 40)
    found = uniforms(tokens, 3)
    order = np.random.default_rng(0).permutation(4000)
    assert (uniforms(tokens.take(order), 3) == found[order]).all()
    assert abs(found.mean() - 0.5) < 0.02 and len(set(found)) == 4000
    assert abs(np.corrcoef(found, uniforms(tokens, 4))[0, 1]) < 0.05
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.05


def test_a_document_in_two_chunks_has_one_record():
    kept = Best(1, 4, reach=1, by_document=True)
    for position, norm in ((1, [3.0, 1.0]), (3, [5.0, 2.0]), (5, [4.0, 9.0])):
        document = np.array([7, 7]) if position < 5 else np.array([8, 9])
        none = np.zeros(2, dtype=np.int64)
        tokens = Tokens(none, none, none, none, np.array([position, position + 1]), document)
        norm_TE = np.array(norm)[:, None]
        chunk = Chunk(tokens, norm_TE, norm_TE, norm_TE, norm_TE > 0)
        kept.add(norm_TE, np.arange(2)[:, None], chunk)
    records = kept.total
    assert records.document_EN[0, :3].tolist() == [9, 7, 8]
    assert records.norm_EN[0, :3].tolist() == [9, 5, 4] and records.key_EN[0, 3] == -np.inf
    assert np.nan_to_num(records.window_ENW[0, 1], nan=-1).tolist() == [-1, 5, 2]


def test_blocks_keep_domains_apart_and_bound_memory():
    docs = [Document("ab"[i % 2], str(i), ids=(1, i)) for i in range(100)]
    blocks = Blocks(Documents(docs, [SELECT] * 100, ["c"] * 100), most=20)
    assert len(blocks) == 20
    for block in range(20):
        assert len({docs[d].domain for d in np.flatnonzero(blocks.block_Q == block)}) == 1


HOSTILE = "été 😀👩‍👩‍👧 שלום <b>x</b> </script> 漢字\n\ttab 12,5 ﷽ e\u0301"


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_contexts_point_into_the_original_text(name):
    from pathlib import Path

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(moefy.__file__).parent / "demo" / name)
    bos = tokenizer.bos_token_id
    ids = [bos, *tokenizer(HOSTILE)["input_ids"]]
    document = Document("d", "s", HOSTILE)
    sample = Sample(document, {"input_ids": torch.tensor(ids)}, None, 0)
    from moefy.data.corpus import Batch

    batch = Batch([sample], {"input_ids": sample.inputs["input_ids"][None]}, None)
    reading = Reading(
        [batch], Documents([document], [SELECT], ["c"]), tokenizer, "decoder", 3072, {}
    )
    spans = spans_of(reading, 0)
    assert len(spans) == len(ids) and spans[0] == (0, 0) and spans[-1][1] == len(HOSTILE)
    covered = set()
    for position, (start, end) in enumerate(spans):
        found = context(reading, 0, position, width=2)
        assert HOSTILE[found.start : found.start + len(found.text)] == found.text
        assert found.ids == ids[found.first : found.first + 5][: len(found.ids)]
        assert found.spans[position - found.first] == (start, end)
        assert all(
            found.start <= a <= b <= found.start + len(found.text) for a, b in found.spans if b > a
        )
        assert "\ufffd" not in found.text
        covered |= set(range(start, end))
    assert {i for i, c in enumerate(HOSTILE) if not c.isspace()} <= covered
    emoji = [p for p, (a, b) in enumerate(spans) if HOSTILE[a:b] == "😀"]
    assert len(emoji) > 1  # one character in several tokens, each points at all of it
    # Without a tokenizer there are ids; a tokenizer that reads otherwise is noticed.
    assert context(replace(reading, tokenizer=None), 0, 3).text == ""
    with pytest.raises(MoefyError, match="no longer gives"):
        sample.inputs["input_ids"][2] += 1
        spans_of(reading, 0)
    with pytest.raises(MoefyError, match="position 999"):
        context(reading, 0, 999)
    with pytest.raises(MoefyError, match="document 1"):
        context(reading, 1, 0)
