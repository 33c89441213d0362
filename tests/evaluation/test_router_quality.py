"""The router beside the oracle, and FFN density by domain, against loops over single tokens."""

import pytest
import torch
from tiny_conversion import convert_tiny, corpus_for
from tiny_models import build

import moefy
from moefy.data.corpus import Corpus, Document
from moefy.data.inputs import read_batches
from moefy.evaluation.evaluate import evaluate
from moefy.evaluation.routing import RouterQuality
from moefy.experts.loading import load_dense
from moefy.experts.passes import observing
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.models.checkpoint import Checkpoint

SETTINGS = {
    "varying": {
        "partition.shared": 2,
        "selection.name": "threshold",
        "compensation.name": "conditional_mean",
    },
    "topk": {"partition.shared": 0, "selection.name": "topk", "compensation.name": "none"},
}


@pytest.fixture(scope="module", params=SETTINGS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    convert_tiny(
        "llama", build("llama", folder / "s"), folder / "o", settings=SETTINGS[request.param]
    )
    return folder


def corpus():
    """Documents of two domains, of unlike length and vocabulary, so that batches are padded."""
    documents = [
        Document("low" if max(ids) % 2 else "high", str(i), ids=tuple(ids[: 4 + i % 9]))
        for i, ids in enumerate(corpus_for("llama")[:20])
    ]
    return Corpus("two domains", documents)


def batches_of(folder):
    return read_batches(Checkpoint.open(folder / "o"), "decoder", corpus(), 32)


def measured(model, batches, **options):
    quality = RouterQuality(model, batches, **options)
    for batch in batches:
        with torch.no_grad(), observing(model, batch, quality):
            model(**batch.inputs)
    return quality.record()


@torch.no_grad()
def heard(model, document):
    """Input and output of every SparseMlp for one document alone, without padding."""
    found = []
    handles = [
        module.register_forward_hook(lambda _, args, y: found.append((args[0][0], y[0])))
        for module in sparse_mlps(model).values()
    ]
    model(torch.tensor([document.ids]))
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def plain(model, dense):
    """Every figure of every layer by a loop over tokens and experts."""
    rows = []
    for index, module in sparse_mlps(model).items():
        size, shared = module.expert_size, module.shared
        sums = dict.fromkeys(("hits", "ran", "energy", "model", "oracle", "bare", "best"), 0.0)
        for document in corpus().documents:
            x_TD, got_TD = heard(model, document)[index]
            # The dense output comes from the stock layer of the source, not from the experts.
            y_TD = dense.model.layers[index].mlp(x_TD)
            ran_TE = module.mask(x_TD)[:, shared:]
            for x, y, got, ran in zip(x_TD, y_TD, got_TD, ran_TE, strict=True):
                h = module.weights.hidden(x[None])[0]
                parts = [
                    h[e * size : (e + 1) * size] @ module.weights.down_ND[e * size : (e + 1) * size]
                    for e in range(shared, module.experts)
                ]
                norms = [float(part.norm()) for part in parts]
                count = int(ran.sum())
                best = set(sorted(range(len(parts)), key=lambda e: -norms[e])[:count])
                chosen = set(ran.nonzero().flatten().tolist())
                sums["hits"] += len(best & chosen)
                sums["ran"] += count
                sums["energy"] += float(y @ y)
                sums["model"] += float((y - got) @ (y - got))
                zero = torch.zeros_like(y)
                missing = {
                    name: sum((p for e, p in enumerate(parts) if e not in on), zero)
                    for name, on in (("bare", chosen), ("oracle", best))
                }
                sums["bare"] += float(missing["bare"] @ missing["bare"])
                sums["best"] += float(missing["oracle"] @ missing["oracle"])
                on = torch.tensor([[e in best for e in range(len(parts))]])
                extra = module.compensation(x[None], on)
                left = missing["oracle"] - (0 if extra is None else extra[0])
                sums["oracle"] += float(left @ left)
        rows.append(sums)
    return rows


def test_figures_are_those_of_a_loop_over_tokens_and_experts(folder):
    model, dense = moefy.load(folder / "o"), load_dense(Checkpoint.open(folder / "s"))
    record = measured(model, batches_of(folder))
    tokens = sum(len(doc.ids) for doc in corpus().documents)
    for row, want in zip(record["layers"], plain(model, dense), strict=True):
        assert row["tokens"] == tokens
        assert row["recall"] == pytest.approx(want["hits"] / want["ran"], rel=1e-6)
        assert 0 < row["recall"] < 1
        for name, key in (
            ("missed_energy", "model"),
            ("unavoidable", "oracle"),
            ("uncompensated_missed_energy", "bare"),
            ("uncompensated_unavoidable", "best"),
        ):
            assert row[name] == pytest.approx(want[key] / want["energy"], rel=1e-4)
        assert row["router_added"] == pytest.approx(
            (want["model"] - want["oracle"]) / want["energy"], rel=1e-3, abs=1e-6
        )
        assert row["uncompensated_router_added"] > 0
    for name in ("recall", "missed_energy", "router_added"):
        mean = sum(row[name] for row in record["layers"]) / len(record["layers"])
        assert record["mean"][name] == pytest.approx(mean)


def test_the_oracle_recalls_everything_and_adds_nothing(folder):
    model = moefy.load(folder / "o")
    for module in sparse_mlps(model).values():
        module.router = Truth(module)
        if hasattr(module.selection, "threshold"):
            module.selection.threshold = 1.0
    for row in measured(model, batches_of(folder))["layers"]:
        assert row["recall"] == 1
        assert row["router_added"] == pytest.approx(0, abs=1e-9)
        assert row["missed_energy"] > 0


class Truth(torch.nn.Module):
    """Scores by the true norms over their mean, of which some are above any threshold near 1."""

    computes_gate = False

    def __init__(self, module):
        super().__init__()
        self.size = module.expert_size

    def forward(self, x_TD, mlp):
        parts_TED = torch.einsum(
            "tef,efd->ted",
            mlp.hidden(x_TD).view(len(x_TD), -1, self.size),
            mlp.down_ND.view(-1, self.size, mlp.width),
        )
        norm_TE = parts_TED.norm(dim=-1)
        return norm_TE / norm_TE.mean(1, keepdim=True)


def test_a_sample_of_the_tokens_is_drawn_from_all_batches(folder):
    model, batches = moefy.load(folder / "o"), batches_of(folder)
    whole = measured(model, batches)
    some = measured(model, batches, tokens=60)
    assert [row["tokens"] for row in some["layers"]] == [60, 60]
    assert some["mean"]["recall"] == pytest.approx(whole["mean"]["recall"], abs=0.1)
    assert some["mean"]["recall"] != whole["mean"]["recall"]
    assert measured(model, batches, tokens=60) == some
    assert measured(model, batches, tokens=60, seed=1) != some


@torch.no_grad()
def test_density_by_layer_and_domain_is_that_of_single_documents(folder):
    model = moefy.load(folder / "o")
    record = evaluate(model, batches_of(folder))
    table = record["ffn_density_by_layer"]
    assert table["layers"] == ["model.layers.0", "model.layers.1"]
    for index, module in sparse_mlps(model).items():
        ran = {"low": [], "high": []}
        for document in corpus().documents:
            mask_TE = module.mask(heard(model, document)[index][0])
            ran[document.domain] += mask_TE.float().mean(1).tolist()
        everything = ran["low"] + ran["high"]
        assert table["all"][index] == pytest.approx(sum(everything) / len(everything))
        for domain, values in ran.items():
            assert table["domains"][domain][index] == pytest.approx(sum(values) / len(values))
    assert record["ffn_density"] == pytest.approx(sum(table["all"]) / 2)
