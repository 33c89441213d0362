"""The causal engine against stock models whose down projections are given other inputs, in fp64; and the
tables made of it against loops.

Shapes: B documents, T tokens, N neurons in expert order, S sets, C domains.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_conversion import convert_tiny
from tiny_models import build
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div

import moefy
from moefy.data.corpus import IGNORED, Batch
from moefy.data.documents import HELD_OUT, SELECT
from moefy.errors import MoefyError
from moefy.evaluation.outputs import outputs_of
from moefy.experts.interventions import MODES, statistics
from moefy.experts.loading import load_dense
from moefy.experts.passes import run
from moefy.experts.sparse_mlp import all_experts, sparse_mlps
from moefy.inspection.causal import causal
from moefy.inspection.causal.attribution import attribution
from moefy.inspection.causal.documents import draw
from moefy.inspection.causal.engine import (
    AFTER,
    DENSE,
    MOEFIED,
    WHOLE,
    WITHIN,
    AblationEngine,
    neurons_of,
    of_layer,
    of_sets,
)
from moefy.inspection.causal.nulls import energies, energy_matrices, matches, random_sets
from moefy.inspection.causal.sufficiency import interactions, sufficiency
from moefy.inspection.causal.token_losses import Reference, dense_against_moefied, token_losses
from moefy.inspection.record import rows
from moefy.inspection.texts import read
from moefy.models.checkpoint import Checkpoint
from moefy.models.locate import sites
from moefy.run.console import Reporter

PLAIN = {"partition.method": "random", "router.epochs": 1}
KINDS = {
    "llama": (AFTER, {"partition.shared": 2, "compensation.name": "conditional_mean"}),
    "opt": (AFTER, {"compensation.name": "none"}),
    "gpt2": (AFTER, {"compensation.name": "none"}),
    "bert": (WITHIN, {"compensation.name": "none"}),
    "gemma2": (WITHIN, {"compensation.name": "none"}),
}
QUIET = Reporter(quiet=True)


def documents(count: int = 60) -> list[dict]:
    """Ids of three domains: low, middle and high ones."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for number in range(count):
        domain = number % 3
        low = 3 + 29 * domain
        ids = torch.randint(low, low + 29, (18 + number % 5,), generator=generator)
        found.append({"domain": f"d{domain}", "source_id": str(number), "input_ids": ids.tolist()})
    return found


def corpus(folder: Path, docs: list[dict]) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("\n".join(map(json.dumps, docs)))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    done = {}

    def get(kind: str, dtype: torch.dtype = torch.float64):
        if kind not in done:
            folder = tmp_path_factory.mktemp(kind)
            settings = PLAIN | KINDS[kind][1]
            convert_tiny(kind, build(kind, folder / "source"), folder / "out", settings=settings)
            done[kind] = folder
        model = moefy.load(done[kind] / "out", dtype=dtype)
        return model, read(model, corpus(done[kind], documents())), done[kind] / "out"

    return get


def whole(model, batch):
    """What the model gives at the judged positions, in one piece: logits, or last hidden states."""
    heard = []
    handle = model.base_model.register_forward_hook(lambda _, __, given: heard.append(given[0]))
    result = run(model, batch)
    handle.remove()
    if batch.targets_BT is not None:
        return result.logits[batch.targets_BT != IGNORED]
    return heard[-1][batch.mask()]


def made_of(said):
    """The same of what was taken apart."""
    return said.logits(said.rows_JD)


def engine_of(model, texts, **options) -> AblationEngine:
    engine = AblationEngine(model, **options)
    with engine.running():
        engine.means = statistics(model, texts.batches)
    return engine


def gone_of(model, layer, numbers):
    gone_N = torch.zeros(sparse_mlps(model)[layer].weights.neurons, dtype=torch.bool)
    gone_N[numbers] = True
    return gone_N


@pytest.mark.parametrize("kind", KINDS)
def test_runs_are_taken_up_as_late_as_the_family_allows(made, kind):
    model, reading, _ = made(kind)
    texts = draw(reading, HELD_OUT, 200)
    assert AblationEngine(model).shortcut(texts.batches[0]) == KINDS[kind][0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", [DENSE, MOEFIED])
@pytest.mark.parametrize("kind", KINDS)
def test_a_shortcut_gives_what_the_whole_run_gives(made, kind, which, mode):
    model, reading, _ = made(kind)
    texts = draw(reading, HELD_OUT, 200)
    engine = engine_of(model, texts, which=which, mode=mode)
    base = engine.base(texts.batches[0])
    moved = 0.0
    for layer in (0, 1):
        numbers = torch.tensor([3, 8, 9, 10, 40])
        gone = {layer: gone_of(model, layer, numbers)}
        with torch.no_grad(), engine.running(), engine.replacing(gone):
            want = whole(model, texts.batches[0])
        got = made_of(base.output(gone))
        assert (got - want).abs().max() < 1e-9 * want.abs().max()
        moved = max(moved, float((want - made_of(base.out)).norm() / want.norm()))
        assert all("forward" not in vars(block) for block in engine.blocks)
    assert moved > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_effects_are_those_of_the_stock_model_with_other_inputs_of_its_down_projection(made, kind):
    model, reading, folder = made(kind)
    texts = draw(reading, HELD_OUT, 200)
    engine = engine_of(model, texts, mode="mean")
    stock = load_dense(Checkpoint.open(folder), dtype=torch.float64)
    batch = texts.batches[0]
    with torch.no_grad():
        plain = whole(stock, batch)
        base = engine.base(batch)
        for layer, site in enumerate(sites(stock)):
            numbers = torch.arange(8, 16)

            def edit(_, args, layer=layer, numbers=numbers):
                value = args[0].clone()
                value[..., numbers] = engine.means.mean_LN[layer][numbers].to(value)
                return (value,)

            handle = stock.get_submodule(site.path("down")).register_forward_pre_hook(edit)
            changed = whole(stock, batch)
            handle.remove()
            damage, kl = base.reference.compare(
                base.output({layer: gone_of(model, layer, numbers)})
            )
            rows_of = (plain, changed)
            if kind == "bert":
                want = 1 - cosine_similarity(*rows_of, dim=-1)
                assert kl is None
            else:
                target = batch.targets_BT[batch.targets_BT != IGNORED]
                ce = [cross_entropy(r, target, reduction="none") for r in rows_of]
                want = ce[1] - ce[0]
                log_p, log_q = (r.log_softmax(-1) for r in rows_of)
                want_kl = kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
                assert torch.allclose(kl, want_kl, rtol=1e-6, atol=1e-12)
                assert want_kl.max() > 1e-4
            assert torch.allclose(damage, want, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("kind", ["llama", "opt", "bert"])
def test_zero_ablation_of_all_experts_removes_the_mlp_and_keeps_its_bias(made, kind):
    model, reading, folder = made(kind)
    batch = draw(reading, HELD_OUT, 200).batches[0]
    engine = AblationEngine(model, mode="zero")
    every = {
        layer: torch.ones(m.weights.neurons, dtype=torch.bool)
        for layer, m in sparse_mlps(model).items()
    }
    stock = load_dense(Checkpoint.open(folder), dtype=torch.float64)
    with torch.no_grad():
        for site in sites(stock):
            stock.get_parameter(f"{site.path('down')}.weight").zero_()
        want = whole(stock, batch)
    got = made_of(engine.base(batch).output(every))
    assert (got - want).abs().max() < 1e-9
    assert (got - made_of(engine.base(batch).out)).norm() > 0.1 * want.norm()


def test_small_effects_are_not_lost_in_large_logits():
    generator = torch.Generator().manual_seed(0)
    base = 30 * torch.randn(1, 40, 500, generator=generator, dtype=torch.float64)
    other = base + 1e-4 * torch.randn(base.shape, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, 500, (1, 40), generator=generator)
    targets[0, 7] = IGNORED
    batch = Batch([], {}, targets)
    exact = Reference(outputs_of(batch, base)).compare(outputs_of(batch, other))
    near = base.float() + (other - base).float()
    found = Reference(outputs_of(batch, base.float())).compare(outputs_of(batch, near))
    log_p, log_q = base[0].log_softmax(-1), other[0].log_softmax(-1)
    keep = targets[0] != IGNORED
    want_kl = (log_p.exp() * (log_p - log_q)).sum(-1)[keep]
    want = (log_p - log_q).gather(1, targets.clamp_min(0).T)[:, 0][keep]
    assert torch.allclose(exact[0], want, rtol=1e-6, atol=1e-12)
    assert torch.allclose(exact[1], want_kl, rtol=1e-5, atol=1e-13)
    # Logits near 100 are told apart to 8e-6 in fp32.
    assert (found[0].double() - want).abs().max() < 3e-5
    assert (found[1].double() - want_kl).abs().max() < 1e-6


def test_states_that_did_not_change_are_no_increase_and_none_is_negative():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 400, 32, generator=generator)
    batch = Batch([], {"attention_mask": torch.ones(1, 400, dtype=torch.long)}, None)
    reference = Reference(outputs_of(batch, base))
    assert not reference.compare(outputs_of(batch, base.clone()))[0].any()
    other = base + 1e-4 * torch.randn(base.shape, generator=generator)
    want = 1 - cosine_similarity(base[0].double(), other[0].double(), dim=-1)
    # Differences of unit vectors of fp32: their rounding, squared, beside what is found.
    assert torch.allclose(
        reference.compare(outputs_of(batch, other))[0].double(), want, rtol=1e-2, atol=1e-13
    )
    assert want.min() > 0 and want.max() < torch.finfo(torch.float32).eps


def test_texts_are_drawn_evenly_from_one_shard(made):
    _, reading, _ = made("llama")
    texts, select = (draw(reading, shard, 300, seed=1) for shard in (HELD_OUT, SELECT))
    counts = np.bincount(texts.documents.domain_Q)
    assert counts.max() - counts.min() <= 1
    assert set(texts.documents.shards) == {HELD_OUT}
    hashes = [{d.sha256 for d in t.documents.documents} for t in (texts, select)]
    assert not hashes[0] & hashes[1]
    assert 250 <= texts.tokens_Q.sum() <= 330
    for batch in texts.batches:
        lengths = sorted(len(s.inputs["input_ids"]) for s in batch.samples)
        assert len(lengths) > 1 and lengths[-1] == lengths[-2] <= texts.length
    for number, doc in zip(texts.number_Q, texts.documents.documents, strict=True):
        assert reading.documents.documents[number] is doc


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_random_sets_have_the_size_and_energy_of_experts(made, kind):
    model, reading, _ = made(kind)
    texts = draw(reading, HELD_OUT, 400)
    engine = engine_of(model, texts, mode="zero")
    module = engine.modules[0]
    given = [np.arange(e * 8, e * 8 + 8) for e in range(module.experts)]
    energy_NN = energy_matrices(engine, texts.batches, [0])[0]
    x_TD = torch.cat([engine.base(b).x[0][b.mask().flatten()] for b in texts.batches])
    h_TN = module.weights.hidden(x_TD)
    for numbers, got in zip(given, energies(energy_NN, given), strict=True):
        own = torch.from_numpy(numbers)
        want = (h_TN[:, own] @ module.down_ND[own]).square().sum(1).mean().detach()
        assert got == pytest.approx(float(want), rel=1e-5)
    sets = random_sets(engine, energy_NN, 0, given, 6, seed=0)
    bin_E, model_S = matches(sets.energy_E, 6)
    assert len(sets.sets) == 6 * len(set(bin_E.tolist()))
    assert (sets.bin_E == bin_E).all() and (sets.bin_S == bin_E[model_S]).all()
    assert all(len(set(s.tolist())) == 8 for s in sets.sets)
    assert np.abs(sets.energy_S / sets.energy_E[model_S] - 1).max() < 0.051
    assert len({tuple(s) for s in sets.sets}) > 0.8 * len(sets.sets)
    # Another order of neurons, and another scale of each, draws the same neurons.
    order_N = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    scale_N = 2.0 ** torch.randint(-3, 4, (64,), generator=torch.Generator().manual_seed(4))
    where_N = order_N.argsort().numpy()
    with torch.no_grad():
        for name in ("up_ND", "down_ND", "gate_ND", "up_bias_N", "gate_bias_N"):
            value = getattr(module, name)
            if value is not None:
                factor = {"up_ND": scale_N, "up_bias_N": scale_N, "down_ND": 1 / scale_N}
                by_N = factor.get(name, torch.ones(64)).to(value)
                value.copy_((value * (by_N if value.ndim == 1 else by_N[:, None]))[order_N])
    moved = [where_N[numbers] for numbers in given]
    again = random_sets(engine, energy_matrices(engine, texts.batches, [0])[0], 0, moved, 6, seed=0)
    got = [sorted(order_N[torch.from_numpy(s)].tolist()) for s in again.sets]
    assert got == [s.tolist() for s in sets.sets]


def test_screen_is_exact_where_the_model_is_linear(made):
    model, reading, _ = made("opt")  # llama's norms compute in fp32
    texts = draw(reading, HELD_OUT, 200)
    with torch.no_grad():
        for module in sparse_mlps(model).values():
            module.down_ND.mul_(1e-5)  # so little that nothing behind it bends
    engine = engine_of(model, texts, mode="mean")
    guess = attribution(engine, texts, QUIET, "")
    sets = [
        of_layer(engine, layer, neurons_of(engine, layer, e)) for layer in (0, 1) for e in range(8)
    ]
    want = of_sets(engine, texts, sets, QUIET, "").ce_SQ
    assert np.abs(want).max() > 1e-7
    assert np.abs(guess - want).max() < 2e-3 * np.abs(want).max()


def test_pairs_and_kept_experts_are_those_of_whole_runs(made):
    model, reading, _ = made("opt")
    texts, select = draw(reading, HELD_OUT, 300), draw(reading, SELECT, 300)
    engine = engine_of(model, select, mode="mean")
    guess = attribution(engine, select, QUIET, "")
    table = sufficiency(engine, guess, select, texts, QUIET, draws=3)

    def damage(**options):
        found = []
        for batch in texts.batches:
            with torch.no_grad(), all_experts(model):
                plain = run(model, batch).logits
                with model.experts(mode="mean", means=engine.means, **options):
                    other = run(model, batch).logits
            targets = batch.targets_BT
            ce = [
                cross_entropy(o.mT, targets, reduction="none", ignore_index=IGNORED).sum(1)
                for o in (plain, other)
            ]
            found += ((ce[1] - ce[0]) / (targets != IGNORED).sum(1)).tolist()
        return np.array(found)

    domain_Q, experts = texts.documents.domain_Q, engine.experts
    mean_SC = np.stack([guess[:, select.documents.domain_Q == c].mean(1) for c in range(3)], 1)
    for row in rows(table):
        domain = int(row["domain"][1])
        keep = []
        for layer in (0, 1):
            score = mean_SC[8 * layer : 8 * layer + 8, domain]
            best = np.argsort(-score)[: math.ceil(row["share"] * 8)]
            keep += [(layer, int(e)) for e in best]
        want = damage(keep=keep)[domain_Q == domain].mean()
        assert row["ce"] == pytest.approx(want, rel=1e-4, abs=1e-6)
        assert row["experts"] == len(keep)
        assert row["ce_random_least"] <= row["ce_random"] <= row["ce_random_most"]
    best = [experts[i] for i in (0, 9, 3, 12)]
    sets = [of_layer(engine, layer, neurons_of(engine, layer, e)) for layer, e in best]
    together = of_sets(engine, texts, sets, QUIET, "")
    for row in rows(interactions(engine, texts, best, together, QUIET, count=4)):
        a, b = (row["layer_a"], row["expert_a"]), (row["layer_b"], row["expert_b"])
        both, one, two = damage(ablate=[a, b]), damage(ablate=[a]), damage(ablate=[b])
        assert row["ce_both"] == pytest.approx(both.mean(), rel=1e-4)
        assert row["excess"] == pytest.approx((both - one - two).mean(), rel=1e-3, abs=1e-6)
        assert row["excess_low"] <= row["excess"] <= row["excess_high"]


def test_hunt_finds_the_tokens_that_were_changed(made):
    model, reading, _ = made("llama")
    numbered = zip(reading.batches, reading.first_B, strict=True)
    planted = {(first + 1, 4) for batch, first in numbered if len(batch.samples) > 1}

    def base(batch):
        with torch.no_grad():
            return run(model, batch).logits

    def other(batch):
        logits = base(batch).clone()
        if batch.targets_BT.shape[0] > 1:
            logits[1, 4, batch.targets_BT[1, 4]] -= 3.0
        return logits

    same = token_losses(base, model, reading)
    assert same["hunt"]["delta"] == [] and same["hunt_summary"]["kl"] == [
        pytest.approx(0, abs=1e-9)
    ]
    found = token_losses(base, other, reading)
    tail = rows(found["hunt"])
    held_out = reading.documents.of_shard(HELD_OUT)
    assert {(r["document"], r["position"]) for r in tail} == {
        (d, p) for d, p in planted if held_out[d]
    }
    assert {r["tail"] for r in tail} == {"loses"}
    for row in tail:
        p = row["p_base"]
        assert row["p_other"] == pytest.approx(
            p * math.exp(-3) / (1 - p + p * math.exp(-3)), rel=1e-5
        )
        assert row["delta"] == pytest.approx(math.log(p / row["p_other"]), rel=1e-5)
        text = reading.documents.documents[row["document"]].ids
        assert (row["token"], row["next"]) == (text[4], text[5])
    summary = rows(found["hunt_summary"])[0]
    tokens = summary["tokens"]
    assert summary["delta"] == pytest.approx(sum(r["delta"] for r in tail) / tokens, rel=1e-5)
    assert summary["concentration"] == pytest.approx(1.0)
    assert sum(found["hunt_domains"]["share_of_losses"]) == pytest.approx(1.0)
    assert "hunt_classes" not in found
    with pytest.raises(MoefyError, match="tokenizer"):
        token_losses(base, lambda batch: base(batch)[..., :50], reading)


def test_a_run_that_was_broken_off_is_taken_up(made, tmp_path):
    model, reading, _ = made("llama", torch.float32)
    settings = {"tokens": 300, "nulls": 4}

    class Breaking(Reporter):
        def track(self, items, what):
            if what == "dense, mean, layer 1":
                raise KeyboardInterrupt
            return super().track(items, what)

    with pytest.raises(KeyboardInterrupt):
        causal(model, reading, report=Breaking(quiet=True), work=tmp_path, **settings)
    done = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert [file.name.rsplit("-", 1)[0] for file in done] == ["dense-mean-layer-0"]
    found = causal(model, reading, work=tmp_path, **settings)
    assert all(file.stat().st_mtime_ns == time for file, time in done.items())
    assert found == causal(model, reading, **settings)
    with torch.no_grad():
        sparse_mlps(model)[1].down_ND[0, 0] += 0.5
    with pytest.raises(KeyboardInterrupt):
        causal(model, reading, report=Breaking(quiet=True), work=tmp_path, **settings)
    names = [file.name.rsplit("-", 1)[0] for file in tmp_path.iterdir()]
    assert names.count("dense-mean-layer-0") == 2


def test_tables_of_a_decoder_are_whole(made):
    model, reading, _ = made("opt", torch.float32)
    found = causal(model, reading, tokens=300, nulls=20)
    table = rows(found["causal"])
    main = [r for r in table if (r["model"], r["mode"]) == ("dense", "mean")]
    assert len(main) == 2 * 8 * 3
    assert {(r["model"], r["mode"]) for r in table} == {
        ("dense", "mean"), ("dense", "zero"), ("dense", "resample"), ("dense", "peak"),
        ("moefied", "mean"),
    }  # fmt: skip
    assert {r["how"] for r in main} == {"exact"}
    for row in main:
        assert row["ce_low"] <= row["ce"] <= row["ce_high"]
        assert row["csi_low"] <= row["csi"] <= row["csi_high"]
        assert 0 < row["kl"] <= row["kl_p99"]
        assert 0 <= row["percentile"] <= 100 and 0 < row["p"] <= row["q"] <= 1
        assert row["null_sets"] == 20 and row["null_energy_low"] <= row["null_energy_high"]
        assert 0 <= row["null_slope"] <= 1
        # Too many sets of a tiny random model raise no loss for an error to be there.
        assert row["null_slope_error"] is None or 0 < row["null_slope_error"] < 10
        others = [r["ce"] for r in main if r["layer"] == row["layer"] and
                  r["expert"] == row["expert"] and r["domain"] != row["domain"]]  # fmt: skip
        assert row["csi"] == pytest.approx(row["ce"] - np.mean(others), rel=1e-3, abs=1e-6)
        assert row["few"] == (row["documents"] < 30)
    assert len(found["experts"]["layer"]) == 16
    guess = rows(found["screen"])
    assert all(r["measured"] and r["spearman_low"] <= r["spearman_high"] for r in guess)
    ce = {(r["layer"], r["expert"], r["domain"]): r["ce"] for r in main}
    assert all(r["ce"] == ce[r["layer"], r["expert"], r["domain"]] for r in guess)


def test_documents_come_from_the_source_and_their_numbers_are_those_of_the_reading(made, tmp_path):
    model, everything, _ = made("opt", torch.float32)
    few = read(model, corpus(tmp_path, documents()), tokens=300)
    assert len(few.documents) < 0.5 * len(everything.documents)
    alone, found = (causal(model, few, source=s, tokens=600, nulls=0) for s in (None, everything))
    behind = [min(t["causal"]["documents"]) for t in (alone, found)]
    assert behind[1] == np.bincount(draw(everything, HELD_OUT, 600).documents.domain_Q).min()
    assert behind[1] > behind[0]
    assert found["hunt"] == alone["hunt"]
    for row in rows(found["hunt"]):
        ids = few.documents.documents[row["document"]].ids
        assert (row["token"], row["next"]) == ids[row["position"] : row["position"] + 2]


def test_inspect_ablates_on_more_documents_than_it_describes(made, tmp_path):
    _, _, folder = made("opt", torch.float32)
    found = moefy.inspect(
        folder, corpora=corpus(tmp_path, documents(120)), tokens=300, causal_tokens=1000,
        skip=["controls"], quiet=True,
    )  # fmt: skip
    described = [r for r in rows(found.tables["documents"]) if r["shard"] == HELD_OUT]
    behind = {r["domain"]: r["documents"] for r in rows(found.tables["causal"])}
    for domain in ("d0", "d1", "d2"):
        assert behind[domain] > 2 * sum(r["domain"] == domain for r in described) > 0


def test_encoders_are_judged_by_their_last_hidden_states(made):
    model, reading, _ = made("bert", torch.float32)
    found = causal(model, reading, tokens=200, nulls=3)
    table = rows(found["causal"])
    assert {r["damage"] for r in table} == {"1 - cosine of the last hidden states"}
    assert all(r["kl"] is None for r in table)
    # Experts that no token ran are no loss to the moefied model, to the last bit.
    assert all(r["ce"] > 1e-4 if r["model"] == DENSE else r["ce"] >= 0 for r in table)
    assert set(found["screen"]["kind"]) == {"energy"} and "hunt" not in found


def test_a_model_that_looks_ahead_is_run_whole(tmp_path):
    settings = PLAIN | {
        "router.look_ahead": True,
        "router.name": "mlp",
        "compensation.name": "none",
    }
    convert_tiny("opt", build("opt", tmp_path / "s"), tmp_path / "o", settings=settings)
    model = moefy.load(tmp_path / "o")
    texts = draw(read(model, corpus(tmp_path, documents())), HELD_OUT, 200)
    engine = engine_of(model, texts, which=MOEFIED)
    base = engine.base(texts.batches[0])
    assert engine.start == WHOLE
    with torch.no_grad(), engine.replacing({1: gone_of(model, 1, [0, 1, 2])}):
        want = whole(model, texts.batches[0])
    got = made_of(base.output({1: gone_of(model, 1, [0, 1, 2])}))
    assert torch.allclose(got, want, rtol=1e-12, atol=0)


def test_unknown_modes_are_refused(made):
    model, reading, _ = made("opt")
    with pytest.raises(MoefyError, match="resample"):
        causal(model, reading, mode="resampel")


def test_dense_and_moefied_differ_where_experts_are_off(made):
    model, reading, _ = made("llama")
    found = dense_against_moefied(model, reading)
    assert found["hunt_summary"]["kl"][0] > 0
