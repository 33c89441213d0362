"""The code of CONTRIBUTING.md does what the page says: one definition and one row each, used end to end."""

import re
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny_conversion import convert_tiny
from tiny_models import build, example_inputs

import moefy
from moefy.benchmark.bench import bench
from moefy.benchmark.engines import ENGINES
from moefy.experts.backends import BACKENDS, fastest
from moefy.experts.moefied import of
from moefy.experts.sparse_mlp import use_backend
from moefy.inspection.inspect import PARTS
from moefy.methods.partition import METHODS
from moefy.methods.partition.canonical import canonical_gauge
from moefy.methods.tables import COMPENSATIONS, ROUTERS, SELECTIONS

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.fixture
def page(monkeypatch):
    """A module of all that the page shows."""
    module = types.ModuleType("shown")
    monkeypatch.setitem(sys.modules, "shown", module)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S))
    exec(compile(code, str(PAGE), "exec"), vars(module))
    fastest.cache_clear()
    yield module
    fastest.cache_clear()


@pytest.fixture
def moefied(page, monkeypatch, tmp_path):
    """A conversion by the page's partition, router, selection and compensation, as rows."""
    monkeypatch.setitem(METHODS, "by_norm", page.METHOD)
    monkeypatch.setitem(ROUTERS, "sketch", page.Sketch)
    monkeypatch.setitem(SELECTIONS, "above_mean", page.AboveMean)
    monkeypatch.setitem(COMPENSATIONS, "one_vector", page.OneVector)
    monkeypatch.setitem(BACKENDS, "half_at_a_time", page.BACKEND)
    settings = {
        "partition.method": "by_norm", "router.name": "sketch", "router.settings.power": "2",
        "selection.name": "above_mean", "compensation.name": "one_vector",
    }  # fmt: skip
    convert_tiny("llama", build("llama", tmp_path / "in"), tmp_path / "out", settings=settings)
    return moefy.load(tmp_path / "out")


def test_a_conversion_uses_them(page, moefied):
    module = of(moefied).mlps[0]
    assert isinstance(module.router, page.Sketch) and module.router.power == 2
    assert isinstance(module.selection, page.AboveMean)
    assert module.compensation.vector_D.norm() > 0
    norm_EF = (
        canonical_gauge(module.weights, torch.arange(64)).up_ND.norm(dim=1).view(module.experts, -1)
    )
    assert (norm_EF[1:].amin(1) >= norm_EF[:-1].amax(1)).all()


def test_the_backend_computes_it(page, moefied):
    inputs = example_inputs("llama")
    with torch.no_grad():
        use_backend(moefied, "masked")
        want = moefied(**inputs).logits
        use_backend(moefied, "half_at_a_time")
        assert torch.allclose(moefied(**inputs).logits, want, atol=1e-5)
    assert of(moefied).mlps[0].chosen == "half_at_a_time"


def test_the_part_adds_a_column(page, moefied, monkeypatch):
    monkeypatch.setitem(PARTS, "runs", page.Runs)
    g = torch.Generator().manual_seed(0)
    corpus = [torch.randint(3, 90, (24,), generator=g).tolist() for _ in range(12)]
    found = moefy.inspect(moefied, corpora=corpus, skip=("controls", "causal"), quiet=True)
    experts = found.tables["experts"]
    assert sum(experts["runs"]) > 0
    assert experts["runs"] == [round(load * found.meta["tokens"]) for load in experts["load"]]


def test_the_engine_is_timed(page, monkeypatch):
    monkeypatch.setitem(ENGINES, "one by one", page.ENGINE)
    record = bench(
        layer="16,64,8,2",
        engines=["one by one"],
        batches=[2],
        samples=5,
        dtype="float32",
        quiet=True,
    )
    assert record["cells"][0]["engines"]["one by one"]["seconds"][0][0] > 0
