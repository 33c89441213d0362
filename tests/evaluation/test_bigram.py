import numpy as np
import pytest
import torch
from plain_bigram import plain_bigram, plain_score

from moefy.data.corpus import load_corpus, make_batches
from moefy.evaluation.bigram import Bigram, K, M

VOCABULARY = 24


def zipf(documents, seed):
    """Documents of token ids in which one token depends on the last, common ones occur often."""
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, VOCABULARY + 1)
    found = []
    for _ in range(documents):
        ids = [int(rng.integers(VOCABULARY))]
        for _ in range(int(rng.integers(3, 30))):
            usual = rng.random() < 0.6
            ids.append(
                (3 * ids[-1] + 1) % VOCABULARY
                if usual
                else int(rng.choice(VOCABULARY, p=p / p.sum()))
            )
        found.append(ids)
    return found


def batches_of(documents, kind="decoder"):
    return make_batches(load_corpus(documents).samples(None, kind, 64), tokens=128)


def test_nats_and_ranks_are_those_of_the_formula():
    fitted, scored = zipf(12, 0), zipf(9, 1)
    bigram = Bigram(batches_of(fitted), VOCABULARY)
    assert bigram.tokens == sum(len(ids) - 1 for ids in fitted)
    assert bigram.documents == len(fitted)
    given = plain_bigram(fitted, VOCABULARY, bigram.k, bigram.m)
    seen, ranks = 0, set()
    for batch in batches_of(scored):
        nats_BT, rank_BT = bigram.score(batch)
        for row, sample in enumerate(batch.samples):
            want = plain_score(given, list(sample.document.ids))
            got = list(zip(nats_BT[row].tolist(), rank_BT[row].tolist(), strict=True))
            assert [rank for _, rank in got[: len(want)]] == [rank for _, rank in want]
            assert [nats for nats, _ in got[: len(want)]] == pytest.approx([n for n, _ in want])
            assert all(pair == (0, 0) for pair in got[len(want) :])
            seen += len(want)
            ranks |= {rank for _, rank in want}
    assert seen == sum(len(ids) - 1 for ids in scored)
    assert min(ranks) == 1
    assert max(ranks) > 10


def test_probabilities_of_a_context_sum_to_one_also_where_it_never_occurred():
    fitted = [[i % 9, (i + 1) % 9, i % 5] for i in range(20)]
    bigram = Bigram(batches_of(fitted), VOCABULARY)
    for context in (0, 8, VOCABULARY - 1):
        pairs = batches_of([[context, b] for b in range(VOCABULARY)])
        nats = torch.cat([bigram.score(batch)[0][:, 0] for batch in pairs])
        assert len(nats) == VOCABULARY
        assert float((-nats).exp().sum()) == pytest.approx(1)


def test_the_strengths_are_those_of_the_grid_that_predict_the_other_half_best():
    fitted = zipf(16, 3)
    (batch,) = make_batches(load_corpus(fitted).samples(None, "decoder", 64), tokens=4096)
    ordered = [list(sample.document.ids) for sample in batch.samples]
    cost = {}
    for k in K:
        for m in M:
            halves = ordered[::2], ordered[1::2]
            given = [plain_bigram(half, VOCABULARY, k, m) for half in halves]
            cost[k, m] = sum(
                nats
                for model, half in zip(given, reversed(halves), strict=True)
                for ids in half
                for nats, _ in plain_score(model, ids)
            )
    bigram = Bigram([batch], VOCABULARY)
    assert (bigram.k, bigram.m) == min(cost, key=cost.get)
    assert bigram.record() == {
        "documents": 16, "tokens": bigram.tokens, "k": bigram.k, "m": bigram.m,
    }  # fmt: skip


def test_an_encoder_decoder_is_judged_by_what_its_decoder_reads():
    bigram = Bigram(batches_of([[5, 6, 7, 8, 9, 10]] * 4, "encoder-decoder"), VOCABULARY)
    (batch,) = batches_of([[8, 9, 10, 8, 9, 11]], "encoder-decoder")
    assert bigram.tokens == 4 * 3
    given = plain_bigram([[0, 8, 9, 10]] * 4, VOCABULARY, bigram.k, bigram.m)
    want = plain_score(given, [0, 8, 9, 11])
    nats_BT, rank_BT = bigram.score(batch)
    assert nats_BT[0].tolist() == pytest.approx([nats for nats, _ in want])
    assert rank_BT[0].tolist() == [rank for _, rank in want] == [1, 1, 4]
