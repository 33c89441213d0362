"""The first command ends with its table, whatever fails on the way."""

from dataclasses import replace

import pytest
from tiny_conversion import convert_tiny
from tiny_models import build
from typer.testing import CliRunner

from moefy.cli import quickstart
from moefy.cli.verbs import app
from moefy.errors import MoefyError
from moefy.experts.backends import BACKENDS
from moefy.experts.sparse_mlp import SparseMlp
from moefy_kernels import masked_mlp

MEAN = {"mean": 1.25}
QUALITY = {
    "ffn_density": 0.5, "bits_read": 8.0, "active_parameters": 0.75,
    "total": {"ce": MEAN, "ce_dense": MEAN, "kl": MEAN},
}  # fmt: skip


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """One tiny model and one tiny layer in place of what is bundled."""
    source = build("llama", tmp_path / "tiny")

    def convert(model, target, **_):
        convert_tiny("llama", model, target)
        return {"evaluation": QUALITY}

    monkeypatch.setattr("moefy.benchmark.costs.BYTES", 4 << 20)
    monkeypatch.setattr("moefy.cli.quickstart.convert", convert)
    monkeypatch.setattr("moefy.cli.quickstart.demo_models", lambda: {"tiny": source})
    monkeypatch.setattr("moefy.cli.quickstart.PROMPT", 12)
    monkeypatch.setattr("moefy.cli.quickstart.LAYER", "32,64,8,2")


def say(tmp_path, *options):
    arguments = ["quickstart", str(tmp_path / "out"), "-q", "--no-calibrate", *options]
    return CliRunner().invoke(app, arguments)


def rows(result):
    """What the table says of the model, dense and moefied."""
    found = [line.split() for line in result.stdout.splitlines()]
    return [row for row in found if "dense" in row[:2] or row[:1] == ["moefied"]]


def failing(error):
    def step(*_, **__):
        raise error

    return step


def test_all_goes_well(tmp_path):
    result = say(tmp_path)
    assert result.exit_code == 0, (result.output, result.exception)
    dense, moefied = rows(result)
    assert dense[:2] == ["tiny", "dense"]
    assert float(dense[-1]) > 0 and float(moefied[-1]) > 0
    assert "7B-shaped layer" in result.stdout
    assert "not timed" not in result.stdout and "failed" not in result.output


def test_a_backend_that_is_refused_is_named(tmp_path, monkeypatch):
    row = replace(BACKENDS["masked"], compute=lambda x, w, mask: masked_mlp(x, w, mask.roll(1, 1)))
    monkeypatch.setitem(BACKENDS, "wrong", row)
    timed = quickstart.bench

    def wrongly(*args, **options):
        """After the conversion, which would refuse it."""
        monkeypatch.setattr("moefy.experts.sparse_mlp.choose", lambda *_: "wrong")
        monkeypatch.setattr(SparseMlp, "_held", lambda *_: None)
        return timed(*args, **options)

    monkeypatch.setattr("moefy.cli.quickstart.bench", wrongly)
    result = say(tmp_path)
    assert result.exit_code == 0, (result.output, result.exception)
    dense, moefied = rows(result)
    assert float(dense[-1]) > 0
    assert moefied[-2:] == ["not", "timed"]
    assert "not timed: tiny, auto: layer 0 computes something else" in result.stdout
    assert "not timed: the layer, auto: computes something else" in result.stdout


@pytest.mark.parametrize("error", [KeyError("auto"), MoefyError("no room; make some")])
def test_a_bench_that_raises_leaves_the_rest(tmp_path, monkeypatch, error):
    monkeypatch.setattr("moefy.cli.quickstart.bench", failing(error))
    result = say(tmp_path)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert [row[-2:] for row in rows(result)] == [["not", "timed"]] * 2
    assert "failed: time tiny: " in result.stdout
    known = isinstance(error, MoefyError)
    assert ("no room; make some" if known else "KeyError: 'auto'; --debug shows") in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("moefy: ")]
    assert "--debug" in line


def test_a_conversion_that_raises_leaves_the_layer(tmp_path, monkeypatch):
    monkeypatch.setattr("moefy.cli.quickstart.convert", failing(ValueError("two\nlines")))
    result = say(tmp_path)
    assert result.exit_code == 1
    assert rows(result) == []
    assert "failed: convert tiny: ValueError: two; --debug shows" in result.stdout
    assert "7B-shaped layer" in result.stdout
    debugged = say(tmp_path, "--debug")
    assert isinstance(debugged.exception.__cause__, ValueError)
