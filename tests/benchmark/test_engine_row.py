"""An engine from a module of one's own: one function and one row, and `moefy bench` checks, times and lists it."""

import sys
import types

import pytest
import torch

from moefy.benchmark.bench import bench
from moefy.benchmark.engines import ENGINES, choose
from moefy.errors import MoefyError

SOURCE = '''
from functools import partial

from moefy.benchmark.engines.base import Engine
from moefy_kernels import masked_mlp


def layers(engine, case):
    """One call for each layer: here every expert in turn, by itself."""
    return [
        partial(masked_mlp, x_TD, module.weights, mask_TE)
        for module, x_TD, mask_TE in zip(case.layers.modules, case.inputs, case.masks, strict=True)
    ]


ROW = Engine(name="one by one", layers=layers)
'''


@pytest.fixture
def row(monkeypatch):
    """The row of a module that nothing in moefy names."""
    module = types.ModuleType("my_engine")
    exec(compile(SOURCE, "my_engine.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "my_engine", module)
    monkeypatch.setitem(ENGINES, "one by one", module.ROW)
    monkeypatch.setattr("moefy.benchmark.costs.BYTES", 4 << 20)
    return module.ROW


def timed(level, *engines):
    record = bench(
        layer="32,64,8,2", level=level, engines=engines, batches=[2], samples=5, calibrated=False,
        quiet=True,
    )  # fmt: skip
    return record["cells"][0]


@pytest.mark.parametrize("level", ["kernel", "layer"])
def test_a_row_is_checked_and_timed_by_its_name(row, level):
    cell = timed(level, "one by one")
    assert set(cell["engines"]) == {"eager", "one by one"}
    assert cell["engines"]["one by one"]["relative_error"] < 1e-5
    assert not cell["engines"]["one by one"]["dense"]


def test_a_row_is_among_all_and_has_no_variants(row):
    assert [engine.label for engine in choose(["one by one"], compiled=True)] == [
        "eager", "compiled", "one by one",
    ]  # fmt: skip
    assert "one by one" in {engine.label for engine in choose()}
    assert row.serves("model", torch.device("cpu")) == ("computes single layers: --level layer")


def test_without_the_row_the_name_is_unknown():
    with pytest.raises(MoefyError, match="unknown engine 'one by one'"):
        choose(["one by one"])
