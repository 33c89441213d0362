import math

import numpy as np
import pytest
import torch
from tiny_conversion import convert_tiny, corpus_for
from tiny_models import build

import moefy
from moefy.checkpoint import Checkpoint
from moefy.data import load_corpus
from moefy.evaluate import evaluate
from moefy.inputs import read_batches
from moefy.modeling import load_dense, sparse_mlps
from moefy.routing import ROUTERS


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
        module.router = ROUTERS["oracle"](0, module.experts, 0)
    assert evaluate(model, batches)["total"]["kl"]["mean"] < fitted


def test_active_budget_counts_router_and_compensation(llama):
    model = moefy.load(llama / "out")
    record = evaluate(model, batches_of(llama))
    module = sparse_mlps(model)[0]
    width, neurons, experts = 32, 64, module.experts
    read = 0.5 * 3 * neurons * width + 2 * experts * width
    assert record["active_budget"] == pytest.approx(read / (3 * neurons * width))
    dense = sum(p.numel() for p in load_dense(Checkpoint.open(llama / "source")).parameters())
    off = 2 * (0.5 * 3 * neurons * width - 2 * experts * width)
    assert record["active_parameters"] == pytest.approx((dense - off) / dense)


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
    assert math.isfinite(value)
    assert value < 1 if metric == "cosine" else value > 0
