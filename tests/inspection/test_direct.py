"""Singular directions and direct logit effects against autograd and outputs formed one by one."""

import numpy as np
import pytest
import torch
from naive_experts import column, heard_by, naive
from tiny_conversion import convert_tiny
from tiny_models import build

import moefy
from moefy.errors import MoefyError
from moefy.inspection.account import find_unembedding
from moefy.inspection.account.prompt import ledger_of_prompt
from moefy.inspection.experts.direct import DirectEffects, Spectrum
from moefy.inspection.record import rows
from moefy.inspection.texts import read

SETTINGS = {
    "llama": {"selection.name": "topk", "compensation.name": "conditional_mean"},
    "opt": {"selection.name": "topk", "compensation.name": "none"},
}


@pytest.fixture(scope="module", params=SETTINGS)
def folder(request, tmp_path_factory):
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    convert_tiny(name, build(name, folder / "s"), folder / "o", settings=SETTINGS[name])
    return folder


@pytest.fixture(scope="module")
def case(folder):
    model = moefy.load(folder / "o")
    generator = torch.Generator().manual_seed(5)
    docs = [torch.randint(3, 90, (6 + i % 17,), generator=generator).tolist() for i in range(30)]
    reading = read(model, docs)
    unembedding = find_unembedding(model, reading.batches[0].inputs["input_ids"][0])
    assert unembedding is not None
    spectrum, direct = heard_by(model, reading, Spectrum, DirectEffects)
    return model, reading, naive(model, reading), spectrum, direct


def gradient_effects(model, ids, vector_TD):
    """Change of the mean-free logits when a vector is added to what the final norm reads, by
    differentiation of the stock norm and output embedding, the norm's scale held."""
    head = model.get_output_embeddings()
    norm = find_unembedding(model, ids).norm
    read = []
    handle = norm.register_forward_pre_hook(lambda _, args: read.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=ids[None])
    handle.remove()
    r_TD = read[0][0].double()
    centred = type(norm).__name__ == "LayerNorm"
    weight, bias = norm.weight.detach().double(), getattr(norm, "bias", None)
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    centre_TD = r_TD - r_TD.mean(1, keepdim=True) if centred else r_TD
    sigma_T1 = (centre_TD.square().mean(1, keepdim=True) + eps).sqrt()

    def logits(x_TD):
        x_TD = x_TD - x_TD.mean(1, keepdim=True) if centred else x_TD
        x_TD = x_TD / sigma_T1 * weight + (0 if bias is None else bias.detach().double())
        found = torch.nn.functional.linear(x_TD, head.weight.detach().double())
        return found - found.mean(1, keepdim=True)

    _, change = torch.autograd.functional.jvp(logits, r_TD, vector_TD)
    return change


def effects_by_document(case, layer):
    """Effect `[T, E, V]` of every expert's own output at every token, by autograd."""
    model, reading, want, _, _ = case
    w, found = want[layer], []
    samples = [sample for batch in reading.batches for sample in batch.samples]
    for document, sample in enumerate(samples):
        y_TED = w.y_TED[w.document_T == document]
        ids = sample.inputs["input_ids"]
        found.append(
            torch.stack([gradient_effects(model, ids, y_TED[:, e]) for e in range(8)], dim=1)
        )
    return torch.cat(found)


def test_mean_effects_and_those_on_the_next_token_are_gradients(case):
    _, reading, want, _, direct = case
    tables, layer = direct.tables(), 1
    effect_TEV, w = effects_by_document(case, layer), want[layer]
    later, ran = w.position_T > 0, w.ran_TE
    targets = [
        torch.cat([s.inputs["input_ids"][1:], torch.tensor([-1])])
        for b in reading.batches
        for s in b.samples
    ]
    target_T = torch.cat(targets)
    for expert in range(8):
        on = later & ran[:, expert]
        mean_V = effect_TEV[on, expert].mean(0) - effect_TEV[later, expert].mean(0)
        got = [
            r
            for r in rows(tables["logits"])
            if (r["layer"], r["expert"], r["kind"]) == (layer, expert, "mean")
        ]
        order = mean_V.argsort(descending=True).tolist()
        for row in got:
            assert row["value"] == pytest.approx(float(mean_V[row["token"]]), rel=1e-3, abs=1e-4)
        assert {r["token"] for r in got if r["rank"] > 0} == set(order[:15])
        assert {r["token"] for r in got if r["rank"] < 0} == set(order[-15:])
        known = target_T >= 0
        next_T = effect_TEV[torch.arange(len(target_T)), expert, target_T.clamp_min(0)]
        for name, keep in (("dla_target", on & known), ("dla_target_all", later & known)):
            value = column(tables["experts"], name, len(want), -1)[layer, expert]
            assert float(value) == pytest.approx(float(next_T[keep].mean()), rel=1e-3, abs=1e-4)
        tokens = column(tables["experts"], "dla_tokens", len(want), -1)[layer, expert]
        assert int(tokens) == int((on & known).sum())


def test_early_layers_are_marked(case):
    tables = case[4].tables()
    assert tables["layers"]["direct_only"] == [True, False]


def test_directions_are_the_singular_vectors_of_the_contributions(case):
    _, _, want, spectrum, direct = case
    tables = spectrum.tables()["experts"]
    for layer, w in want.items():
        found = spectrum.directions(layer)
        for expert in range(8):
            on = (w.position_T > 0) & w.ran_TE[:, expert]
            y_TD = w.y_TED[on, expert].numpy()
            _, values, vectors = np.linalg.svd(y_TD, full_matrices=False)
            shares = values**2 / (values**2).sum()
            known = min(3, len(shares))
            assert np.allclose(found.share_EK[expert][:known], shares[:3], rtol=1e-3, atol=1e-6)
            size_K = values[:3] / len(y_TD) ** 0.5
            assert np.allclose(found.size_EK[expert][:known], size_K, rtol=1e-3, atol=1e-5)
            axes = found.axis_EKD[expert][:known].double().numpy()
            assert np.allclose(np.abs((axes * vectors[:3]).sum(1)), 1, atol=1e-3)
            assert (axes @ y_TD.mean(0) > -1e-6).all()
            got = column(tables, "dimension", len(want), -1)[layer, expert]
            assert float(got) == pytest.approx(1 / (shares**2).sum(), rel=1e-3)
            first = column(tables, "direction_1_share", len(want), -1)[layer, expert]
            assert float(first) == pytest.approx(shares[0], rel=1e-3)
    logits = [r for r in rows(direct.tables()["logits"]) if r["kind"] == "direction_1"]
    shares = column(tables, "direction_1_share", len(want), -1)
    for row in logits:
        assert row["share"] == pytest.approx(float(shares[row["layer"], row["expert"]]), rel=1e-3)


def test_nothing_of_a_rescale_of_neurons_is_seen(case):
    """Scales that cancel (powers of two, so exactly), of ReLU neurons or of up against down."""
    model, reading, _, spectrum, direct = case
    from moefy.experts.sparse_mlp import sparse_mlps

    modules = sparse_mlps(model)
    random = torch.Generator().manual_seed(0)
    scales = {n: 2.0 ** torch.randint(-3, 4, (64, 1), generator=random) for n in modules}

    def rescale(power):
        with torch.no_grad():
            for layer, module in modules.items():
                factor = scales[layer] ** power
                module.up_ND *= factor
                module.down_ND /= factor
                if module.up_bias_N is not None:
                    module.up_bias_N *= factor[:, 0]

    before = direct.tables()
    rescale(1)
    again_spectrum, again = heard_by(model, reading, Spectrum, DirectEffects)
    after, shares = again.tables(), again_spectrum.tables()
    rescale(-1)
    for name in ("logits", "experts"):
        for key, values in before[name].items():
            if any(isinstance(value, float) for value in values):
                assert [v is None for v in after[name][key]] == [v is None for v in values]
                pairs = zip(after[name][key], values, strict=True)
                known = [pair for pair in pairs if pair[0] is not None]
                assert np.allclose(*zip(*known, strict=True), rtol=1e-3, atol=1e-4)
            else:
                assert (
                    sum(a != b for a, b in zip(after[name][key], values, strict=True))
                    < 0.01 * len(values) + 1
                )
    dimension = spectrum.tables()["experts"]["dimension"]
    assert shares["experts"]["dimension"] == pytest.approx(dimension, rel=1e-3)


@torch.no_grad()
def test_the_account_of_a_prompt_is_the_logit(folder):
    model = moefy.load(folder / "o")
    ids = torch.randint(3, 90, (14,), generator=torch.Generator().manual_seed(2)).tolist()
    found = ledger_of_prompt(model, ids)
    account = rows(found["prompt_account"])[0]
    assert account["accounted"] and account["largest_gap"] < 1e-5, account
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    prompt = rows(found["prompt"])
    targets = [*ids[1:], int(logits[-1].argmax())]
    assert [row["target"] for row in prompt] == targets
    layers = rows(found["prompt_layers"])
    for at, row in enumerate(prompt):
        want = float(logits[at, targets[at]] - logits[at].mean())
        assert row["logit"] == pytest.approx(want, rel=1e-4, abs=1e-5)
        here = [r for r in layers if r["position"] == at]
        terms = [row["embedding"], row["constant"]]
        terms += [r["attention"] + r["bias"] + r["error"] + sum(r["effect"]) for r in here]
        assert sum(terms) == pytest.approx(want, rel=1e-4, abs=1e-4)
        for r in here:
            assert sum(r["share"]) == pytest.approx(1, abs=1e-4)
            assert any(r["ran"]) and not all(r["ran"]) and min(r["norm"]) >= 0
    # What is missing is what did not run: without a compensation its share is that of those experts.
    if "opt" in type(model).__name__.lower():
        for r in layers:
            off = sum(s for s, ran in zip(r["share"], r["ran"], strict=True) if not ran)
            assert r["error_share"] == pytest.approx(off, abs=1e-4)
    assert any(abs(r["error"]) > 1e-3 for r in layers)


@torch.no_grad()
def test_expert_effects_of_a_prompt_are_gradients(folder):
    model = moefy.load(folder / "o")
    ids = torch.randint(3, 90, (9,), generator=torch.Generator().manual_seed(3))
    found = ledger_of_prompt(model, ids.tolist())
    reading = read(model, [ids.tolist()] * 1 + [[3 + i, 4, 5 + i] for i in range(20)])
    w = naive(model, reading)
    samples = [s for b in reading.batches for s in b.samples]
    document = next(
        i for i, s in enumerate(samples) if s.inputs["input_ids"].tolist() == ids.tolist()
    )
    targets = found["prompt"]["target"]
    for row in rows(found["prompt_layers"]):
        y_TED = w[row["layer"]].y_TED[w[row["layer"]].document_T == document]
        for expert in (0, 5):
            effect_TV = gradient_effects(model, ids, y_TED[:, expert])
            at = row["position"]
            assert row["effect"][expert] == pytest.approx(
                float(effect_TV[at, targets[at]]), rel=1e-3, abs=1e-4
            )


@pytest.mark.parametrize("name", ["gemma2", "bert"])
def test_other_models_keep_their_shares_and_say_why_there_is_no_account(name, tmp_path):
    convert_tiny(name, build(name, tmp_path / "s"), tmp_path / "o")
    model = moefy.load(tmp_path / "o")
    found = ledger_of_prompt(model, [5, 9, 30, 8])
    account = rows(found["prompt_account"])[0]
    assert not account["accounted"] and len(account["reason"]) > 20
    assert found["prompt"]["logit"] == [None] * 4
    for row in rows(found["prompt_layers"]):
        assert sum(row["share"]) == pytest.approx(1, abs=1e-4) and row["effect"] is None
    with pytest.raises(MoefyError, match="two or more"):
        ledger_of_prompt(model, [5])
    with pytest.raises(MoefyError, match="from 0 to 95"):
        ledger_of_prompt(model, [5, 96])


@pytest.mark.parametrize("name", ["bert_base", "bert"])
def test_encoders_have_no_direct_effects(name, tmp_path):
    convert_tiny(name, build(name, tmp_path / "s"), tmp_path / "o")
    model = moefy.load(tmp_path / "o")
    reading = read(model, [[3 + i, 40 + i, 7, 9 + i] for i in range(24)])
    _, direct = heard_by(model, reading, Spectrum, DirectEffects)
    assert direct.tables() == {}
