import json
import math
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plain_bigram import plain_bigram, plain_score
from scipy.stats import bootstrap
from tiny_conversion import convert_tiny, corpus_for
from tiny_models import build
from typer.testing import CliRunner

import moefy
from moefy.cli.verbs import app
from moefy.data.corpus import load_corpus, make_batches
from moefy.data.inputs import read_batches
from moefy.evaluation.bigram import Bigram
from moefy.evaluation.evaluate import evaluate
from moefy.evaluation.groups import Sinks
from moefy.evaluation.statistics import ratios, unit_words, units_of
from moefy.evaluation.tables import sample_lines
from moefy.experts.loading import load_dense
from moefy.experts.sparse_mlp import all_experts, sparse_mlps
from moefy.methods.tables import ROUTERS
from moefy.models.checkpoint import Checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    convert_tiny("llama", build("llama", folder / "source"), folder / "out")
    return folder


def batches_of(folder):
    corpus = load_corpus(corpus_for("llama"))
    return read_batches(Checkpoint.open(folder / "out"), "decoder", corpus, 32)


@torch.no_grad()
def test_means_are_those_of_a_plain_loop_over_documents(llama):
    sparse, dense = moefy.load(llama / "out"), load_dense(Checkpoint.open(llama / "source"))
    record = evaluate(sparse, batches_of(llama), against=dense)
    sums = np.zeros(4)
    kls = []
    for ids in corpus_for("llama"):
        row = torch.tensor([ids])
        p = dense(row).logits[0, :-1].double().log_softmax(-1)
        q = sparse(row).logits[0, :-1].double().log_softmax(-1)
        target = row[0, 1:, None]
        kl = (p.exp() * (p - q)).sum(-1)
        kls += kl.tolist()
        sums += [
            -p.gather(1, target).sum().item(),
            -q.gather(1, target).sum().item(),
            kl.sum().item(),
            (p.argmax(-1) == q.argmax(-1)).sum().item(),
        ]
    tokens, total = len(kls), record["total"]
    assert record["tokens"] == tokens
    for name, value in zip(("ce_dense", "ce", "kl", "agreement"), sums, strict=True):
        assert total[name]["mean"] == pytest.approx(value / tokens, rel=1e-4)
        low, high = total[name]["ci95"]
        assert low <= total[name]["mean"] <= high
    assert total["kl_p99"] == pytest.approx(np.quantile(kls, 0.99), rel=1e-3)
    assert record["ffn_density"] == pytest.approx(0.5)


def test_the_oracle_is_closer_to_dense_than_the_router(llama):
    batches = batches_of(llama)
    fitted = evaluate(moefy.load(llama / "out"), batches)["total"]["kl"]["mean"]
    model = moefy.load(llama / "out")
    for module in sparse_mlps(model).values():
        module.router = ROUTERS["oracle"](0, module.experts)
    assert evaluate(model, batches)["total"]["kl"]["mean"] < fitted


def test_active_budget_counts_router_and_compensation(llama):
    model = moefy.load(llama / "out")
    record = evaluate(model, batches_of(llama))
    module = sparse_mlps(model)[0]
    width, neurons, experts = 32, 64, module.experts
    # The router reads a row per expert, the conditional mean one per expert that is off: half.
    extra = experts * width + experts // 2 * width
    read = 0.5 * 3 * neurons * width + extra
    assert record["active_budget"] == pytest.approx(read / (3 * neurons * width))
    assert record["bits_read"] == pytest.approx(16 * read / (3 * neurons * width))
    dense = sum(p.numel() for p in load_dense(Checkpoint.open(llama / "source")).parameters())
    off = 2 * (0.5 * 3 * neurons * width - extra)
    assert record["active_parameters"] == pytest.approx((dense - off) / dense)


def test_bits_count_what_a_router_has_read_of_a_neuron_once(llama):
    class Planes(type(sparse_mlps(moefy.load(llama / "out"))[0].router)):
        """Reads 2 bits of gate and up of every neuron, which are the neurons' own."""

        def bits_read(self, mlp):
            return 2 * 2 * mlp.neurons * mlp.width

        def bits_reused(self, mlp):
            return self.bits_read(mlp)

    model = moefy.load(llama / "out")
    for module in sparse_mlps(model).values():
        module.router.__class__ = Planes
    record = evaluate(model, batches_of(llama))
    width, neurons, experts = 32, 64, sparse_mlps(model)[0].experts
    weights, planes, means = 3 * neurons * width, 4 * neurons * width, experts // 2 * width
    read = planes + 0.5 * (16 * weights - planes) + 16 * means
    assert record["bits_read"] == pytest.approx(read / weights)


def test_domains_and_single_source(llama):
    documents = load_corpus(corpus_for("llama")).documents
    record = evaluate(moefy.load(llama / "out"), batches_of(llama))
    assert record["total"]["bootstrap"] == "sources"
    assert record["total"]["sources"] == len(documents)
    corpus = load_corpus(corpus_for("llama")[:10])
    few = read_batches(Checkpoint.open(llama / "out"), "decoder", corpus, 32)
    assert "single-source" in evaluate(moefy.load(llama / "out"), few)["total"]["bootstrap"]


@pytest.mark.parametrize(("name", "metric"), [("bert", "cosine"), ("vit", "kl"), ("t5", "kl")])
def test_other_kinds(name, metric, tmp_path):
    record = convert_tiny(name, build(name, tmp_path / "s"), tmp_path / "o")["evaluation"]
    value = record["total"][metric]["mean"]
    if name == "bert":  # whose head has no hidden state to compare: still one pass a batch
        assert record["router_quality"]["tokens_per_layer"] == record["tokens"]
    if name == "vit":
        assert "positions" not in record
    assert math.isfinite(value)
    assert value < 1 if metric == "cosine" else value > 0


def per_token(model, dense, documents):
    """KL, cross-entropy increase and both cross-entropies of every predicted token, by document."""
    found = []
    for ids in documents:
        row = torch.tensor([ids])
        p = dense(row).logits[0, :-1].double().log_softmax(-1)
        q = model(row).logits[0, :-1].double().log_softmax(-1)
        target = row[0, 1:, None]
        ce_dense, ce = (-v.gather(1, target)[:, 0] for v in (p, q))
        kl = (p.exp() * (p - q)).sum(-1)
        found.append(torch.stack([kl, ce - ce_dense, ce_dense, ce], 1).tolist())
    return found


def check(record, chosen, everything):
    """A group of tokens against the rows `(kl, ce increase, ...)` of a plain loop."""
    assert record["tokens"] == len(chosen)
    assert record["share"]["mean"] == pytest.approx(len(chosen) / len(everything))
    for column, name in enumerate(("kl", "ce_increase", "ce_dense")):
        mean = sum(row[column] for row in chosen) / len(chosen)
        assert record[name]["mean"] == pytest.approx(mean, rel=1e-3, abs=1e-6)
        low, high = record[name]["ci95"]
        assert low <= record[name]["mean"] <= high
    kl = sum(row[0] for row in chosen) / sum(row[0] for row in everything)
    assert record["share_of_kl"]["mean"] == pytest.approx(kl, rel=1e-3, abs=1e-5)


@torch.no_grad()
def test_the_tail_of_kl(llama):
    sparse, dense = moefy.load(llama / "out"), load_dense(Checkpoint.open(llama / "source"))
    rows = per_token(sparse, dense, corpus_for("llama"))
    kl = sorted(row[0] for document in rows for row in document)
    record = evaluate(sparse, batches_of(llama), against=dense)["total"]["kl_tail"]
    for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)):
        at = q * (len(kl) - 1)
        low = math.floor(at)
        want = kl[low] + (at - low) * (kl[low + 1] - kl[low])
        assert record[name] == pytest.approx(want, rel=1e-3)
    assert record["max"] == pytest.approx(kl[-1], rel=1e-3)
    top = math.ceil(len(kl) / 100)
    assert top > 1
    assert record["top_1_percent_share"] == pytest.approx(sum(kl[-top:]) / sum(kl), rel=1e-3)


@torch.no_grad()
def test_strata_are_those_of_a_plain_bigram(llama):
    sparse, dense = moefy.load(llama / "out"), load_dense(Checkpoint.open(llama / "source"))
    documents, others = corpus_for("llama"), [ids[::-1] for ids in corpus_for("llama")[:30]]
    # Some pairs occur in both, so that no stratum is empty.
    others += [ids[:4] * 3 for ids in documents[::3]]
    bigram = Bigram(make_batches(load_corpus(others).samples(None, "decoder", 32)), 96)
    record = evaluate(sparse, batches_of(llama), against=dense, bigram=bigram)
    assert record["bigram"]["tokens"] == sum(len(ids) - 1 for ids in others)
    given = plain_bigram(others, 96, bigram.k, bigram.m)
    rows, strata, nats = [], {"rank_1": [], "rank_2_to_10": [], "rank_over_10": []}, 0.0
    for ids, document in zip(documents, per_token(sparse, dense, documents), strict=True):
        for row, (cost, rank) in zip(document, plain_score(given, ids), strict=True):
            name = "rank_1" if rank == 1 else "rank_2_to_10" if rank <= 10 else "rank_over_10"
            strata[name].append(row)
            rows.append(row)
            nats += cost
    assert sorted(record["strata"]) == sorted(strata)
    for name, chosen in strata.items():
        assert len(chosen) > 5
        check(record["strata"][name], chosen, rows)
    assert record["total"]["ce_bigram"]["mean"] == pytest.approx(nats / len(rows), rel=1e-6)
    assert record["total"]["kl"]["mean"] == pytest.approx(
        sum(row[0] for row in rows) / len(rows), rel=1e-3
    )


@contextmanager
def saying(model, dense_logits, sparse_logits):
    """Let a model answer with these functions of the token ids in place of its own logits."""

    own = model.forward

    def forward(**kwargs):
        dense, output = sparse_mlps(model)[0].all_on, own(**kwargs)
        output.logits = (dense_logits if dense else sparse_logits)(kwargs["input_ids"])
        return output

    model.forward = forward
    yield
    model.forward = own


def test_a_bigram_in_the_place_of_the_model_has_skill_zero_and_dense_skill_one(llama):
    documents, model = corpus_for("llama"), moefy.load(llama / "out")
    others = [ids[::-1] for ids in documents]
    bigram = Bigram(make_batches(load_corpus(others).samples(None, "decoder", 32)), 96)
    given = plain_bigram(others, 96, bigram.k, bigram.m)

    def guesses(ids_BT):
        return torch.tensor([[given(a) for a in row] for row in ids_BT.tolist()]).log()

    def knows(ids_BT):
        """Like the bigram, but surer of what comes next."""
        return guesses(ids_BT) + 2 * torch.nn.functional.one_hot(ids_BT.roll(-1, 1), 96)

    def halfway(ids_BT):
        return guesses(ids_BT) + torch.nn.functional.one_hot(ids_BT.roll(-1, 1), 96)

    skills = {}
    for name, sparse in (("bigram", guesses), ("dense", knows), ("halfway", halfway)):
        with saying(model, knows, sparse):
            total = evaluate(model, batches_of(llama), bigram=bigram)["total"]
        ce = {key: total[key]["mean"] for key in ("ce", "ce_dense", "ce_bigram")}
        skills[name] = total["bigram_skill"]["mean"]
        want = (ce["ce_bigram"] - ce["ce"]) / (ce["ce_bigram"] - ce["ce_dense"])
        assert skills[name] == pytest.approx(want)
        low, high = total["bigram_skill"]["ci95"]
        assert low <= skills[name] <= high
    assert skills["bigram"] == pytest.approx(0, abs=0.01)
    assert skills["dense"] == pytest.approx(1, abs=1e-6)
    assert 0.2 < skills["halfway"] < 0.8
    with saying(model, guesses, knows):
        worse = evaluate(model, batches_of(llama), bigram=bigram)["total"]
    with saying(model, lambda ids_BT: torch.zeros(*ids_BT.shape, 96), knows):
        hopeless = evaluate(model, batches_of(llama), bigram=bigram)["total"]
    assert worse["bigram_skill"] is None or abs(worse["bigram_skill"]["mean"]) > 10
    assert (hopeless["bigram_skill"] is None) == (
        hopeless["ce_dense"]["mean"] >= hopeless["ce_bigram"]["mean"]
    )


@torch.no_grad()
def test_positions_leave_out_the_first_token_and_planted_sinks(llama):
    documents, sparse = corpus_for("llama"), moefy.load(llama / "out")
    sink = 41
    assert any(sink in ids[1:-1] for ids in documents)
    # One embedding of large norm makes every such token a sink, and no other.
    sparse.get_input_embeddings().weight[sink] *= 60
    with all_experts(sparse):
        dense = [sparse(torch.tensor([ids])).logits[0, :-1].double() for ids in documents]
    answers = iter(logits for logits in dense)
    rows = per_token(sparse, lambda _: SimpleNamespace(logits=pad(next(answers))), documents)
    everything = [
        (position, token, row)
        for ids, document in zip(documents, rows, strict=True)
        for position, (token, row) in enumerate(zip(ids, document, strict=False))
    ]
    positions = evaluate(sparse, batches_of(llama))["positions"]
    rows = [row for _, _, row in everything]
    check(positions["all"], rows, rows)
    check(positions["without_first"], [r for p, _, r in everything if p], rows)
    check(
        positions["without_first_and_sinks"],
        [r for p, t, r in everything if p and t != sink],
        rows,
    )
    check(positions["sinks"], [r for _, t, r in everything if t == sink], rows)
    assert positions["sink_is_over_median_times"] == 10


def pad(logits):
    """One document's logits, with a last position that predicts nothing."""
    return torch.cat([logits, logits[-1:]])[None]


def test_a_sink_is_ten_times_the_median_of_its_own_document():
    keep = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    sinks = Sinks(keep)
    norms = torch.tensor([[1.0, 1.0, 1.0, 10.1, 9.9], [100.0, 5.0, 4.0, 900.0, 900.0]])
    sinks.see(norms[..., None] * torch.tensor([0.6, 0.8]))
    assert sinks.marked_BT.tolist() == [[False] * 3 + [True, False], [True] + [False] * 4]
    sinks.see(torch.tensor([[1.0, 20.0, 1.0, 1.0, 1.0], [1.0] * 5])[..., None].flatten(0, 1))
    assert sinks.marked_BT.tolist() == [[False, True, False, True, False], [True] + [False] * 4]


def test_intervals_draw_whole_sources():
    sources = [f"s{i // 3}" for i in range(66)]
    g = np.random.default_rng(1)
    top, bottom = g.random(66) * 5, g.random(66) + 1
    unit_Q = units_of(["d"] * 66, sources)
    ratio = ratios({"x": (top, bottom), "none": (top, np.zeros(66))}, unit_Q, seed=7)
    sums = np.stack([top, bottom]).reshape(2, 22, 3).sum(-1)

    def over(top_G, bottom_G, axis):
        return top_G.sum(axis) / bottom_G.sum(axis)

    plain = bootstrap(tuple(sums), over, paired=True, n_resamples=4000, rng=0).confidence_interval
    assert ratio["x"]["mean"] == pytest.approx(top.sum() / bottom.sum())
    assert ratio["x"]["ci95"] == pytest.approx(plain, rel=0.02)
    assert ratio["none"] is None


def test_a_domain_of_few_sources_is_drawn_by_document():
    domains, sources = ["many"] * 40 + ["few"] * 6, [i // 2 for i in range(40)] + [0] * 6
    unit_Q = units_of(domains, sources)
    assert unit_Q.tolist() == [i // 2 for i in range(40)] + list(range(20, 26))
    assert unit_words(domains[:40], sources[:40]) == "sources"
    assert unit_words(domains[40:], sources[40:]) == "documents (single-source)"
    assert "documents in domains of few" in unit_words(domains, sources)


def test_one_document_alone_has_no_interval():
    assert ratios({"x": ([3.0], [2.0])}, [0])["x"] == {"mean": 1.5, "ci95": None}


def test_what_the_documents_are_too_few_for_is_said(llama, tmp_path):
    rows = [
        {"input_ids": ids, "domain": "abc"[i % 3], "source_id": str(i)}
        for i, ids in enumerate(corpus_for("llama"))
    ]
    rows.append({"input_ids": [5], "domain": "short", "source_id": "s"})  # predicts nothing
    record = moefy.evaluate(llama / "out", corpus=rows, documents=2, quiet=True)
    assert record["domains_left_out"] == ["c", "short"]
    assert sample_lines(record) == [
        "no document of: c, short",
        "no interval over one document: a, b",
    ]
    for row in record["domains"].values():
        assert row["kl"]["ci95"] is None
    record = moefy.evaluate(llama / "out", corpus=rows, quiet=True)
    assert record["domains_left_out"] == ["short"]
    assert sample_lines(record) == ["no document of: short"]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    words = ["eval", str(llama / "out"), "--corpus", str(file), "--documents", "2", "-q"]
    said = CliRunner().invoke(app, words).stdout
    assert "no document of: c" in said and "no interval over one document: a, b" in said
    dense = moefy.evaluate(llama / "source", corpus=rows, documents=2, quiet=True)
    assert dense["domains_left_out"] == ["c", "short"]
