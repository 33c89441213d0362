"""What a layer costs on this CPU: calibrated, interpolated, or expected; and what is chosen by it."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from moefy.benchmark.bench import Grid, calibrate, calibrate_unknown
from moefy.benchmark.layers import Shape, synthetic
from moefy.cli.verbs import app
from moefy.errors import MoefyError
from moefy.experts.backends import fastest
from moefy.experts.backends.base import Workload
from moefy.run.console import Reporter
from moefy_kernels.cpu import times
from moefy_kernels.roofline import Layer, union_share

SMALL = Layer(64, 256, 32, 3, 4)
SEVEN_B = Layer(4096, 11008, 32, 3, 2)


@pytest.fixture(autouse=True)
def nothing_known(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    times.calibration.cache_clear()
    fastest.cache_clear()
    yield
    times.calibration.cache_clear()
    fastest.cache_clear()


def entry(layer, seconds, threads=2):
    return {
        "layer": list(layer), "threads": threads, "tokens": [1, 16, 64],
        "densities": [0.1, 0.5, 1.0], "seconds": seconds, "when": "",
    }  # fmt: skip


def flat(value):
    return [[value] * 3] * 3


def choose(layer, tokens, density, **rest):
    return fastest(times.PATHS, Workload("cpu", layer, tokens, density, threads=2, **rest))


def test_without_a_calibration_bytes_and_arithmetic_decide():
    assert choose(SEVEN_B, 1, 0.25) == "native"
    assert choose(SEVEN_B, 16, 0.1) == "native"
    assert choose(SEVEN_B, 4096, 1.0) == "masked"
    assert choose(SEVEN_B, 512, 0.25) in ("native", "views")


@given(
    tokens=st.integers(1, 5000),
    density=st.floats(0.01, 1.0),
    share=st.one_of(st.none(), st.floats(0.01, 1.0)),
    size=st.sampled_from([1, 32, 172]),
)
def test_what_is_chosen_is_expected_to_be_the_fastest(tokens, density, share, size):
    layer = SEVEN_B._replace(size=size)
    expected = {p: times.seconds(p, layer, tokens, density, share, 2) for p in times.PATHS}
    assert all(0 < value < 1e6 for value in expected.values())
    taken = choose(layer, tokens, density, share=share)
    assert expected[taken] == min(expected.values())


def test_what_was_measured_decides_for_the_shape_and_threads_it_was_measured_on():
    assert choose(SMALL, 16, 0.5) != "views"
    times.keep([entry(SMALL, {"masked": flat(3.0), "views": flat(1.0), "native": flat(2.0)})])
    fastest.cache_clear()
    assert choose(SMALL, 16, 0.5) == "views"
    # A similar layer takes the same times, by its weights; other threads and dtypes do not.
    double = SMALL._replace(neurons=512)
    assert times.seconds("views", double, 16, 0.5, None, 2) == pytest.approx(2.0)
    assert times.seconds("views", SMALL, 16, 0.5, None, 1) < 0.1
    assert times.seconds("views", SMALL._replace(itemsize=2), 16, 0.5, None, 2) < 0.1
    # A path that was not measured is not taken.
    times.keep([entry(SMALL, {"masked": flat(3.0)})])
    fastest.cache_clear()
    assert choose(SMALL, 16, 0.5) == "masked"


def test_times_are_those_of_the_grid_and_lie_between_them():
    grid = [[1.0, 2.0, 4.0], [2.0, 4.0, 8.0], [8.0, 16.0, 32.0]]
    times.keep([entry(SMALL, {"native": grid})])

    def at(tokens, density):
        return times.seconds("native", SMALL, tokens, density, None, 2)

    for i, tokens in enumerate((1, 16, 64)):
        for j, density in enumerate((0.1, 0.5, 1.0)):
            assert at(tokens, density) == pytest.approx(grid[i][j])
    assert at(4, 0.5) == pytest.approx(8**0.5)  # half of the way in the logarithm
    assert at(1, 0.01) == pytest.approx(1.0)
    assert at(640, 1.0) == pytest.approx(320.0)  # ten times the most tokens


def test_few_tokens_that_agree_cost_what_fewer_experts_would():
    times.keep([entry(SMALL, {"native": [[1.0, 5.0, 10.0]] * 3})])
    together = times.seconds("native", SMALL, 8, 0.1, 0.1, 2)
    apart = times.seconds("native", SMALL, 8, 0.1, union_share(0.1, 8), 2)
    assert together <= apart == pytest.approx(times.seconds("native", SMALL, 8, 0.1, None, 2))


def test_what_is_kept_takes_the_place_of_the_same_shape_alone():
    other = SMALL._replace(width=128)
    times.keep([entry(SMALL, {"native": flat(1.0)}), entry(other, {"native": flat(2.0)})])
    file = times.keep([entry(SMALL, {"native": flat(3.0)})])
    kept = json.loads(file.read_text())["entries"]
    assert sorted(e["seconds"]["native"][0][0] for e in kept) == [2.0, 3.0]
    assert file == times.calibration_file() and len(list(file.parent.iterdir())) == 1


def test_calibrating_measures_every_path_and_auto_follows_it():
    layers = synthetic(Shape(16, 64, 4, 1), dtype=torch.float32, tokens=4)
    record = calibrate(layers, Grid(tokens=(1, 4), densities=(0.25, 1.0)))
    found = record["entry"]["seconds"]
    assert set(found) == {"masked", "views", "native"}
    for grid in found.values():
        assert len(grid) == 2 and all(len(row) == 2 for row in grid)
        assert all(value > 0 for row in grid for value in row)
    module = layers.first
    assert record["entry"]["layer"] == [16, 64, 16, 3, 4]
    times.keep([{**record["entry"], "seconds": {**found, "views": [[1e-9] * 2] * 2}}])
    fastest.cache_clear()
    with torch.no_grad():
        module.backend = "auto"
        module(layers.inputs_TD[0])
    assert module.chosen == "views"


def test_what_cannot_be_calibrated_is_said():
    layers = synthetic(Shape(16, 64, 4, 1), dtype=torch.float16, tokens=4)
    with pytest.raises(MoefyError, match="float32 or bfloat16"):
        calibrate(layers)


def test_the_first_bench_calibrates_coarsely_and_the_next_does_not(capsys):
    report = Reporter(quiet=False)
    layers = synthetic(Shape(16, 64, 4, 1), dtype=torch.bfloat16, tokens=4)
    record = calibrate_unknown(layers.modules, report)
    assert "first run with such layers in bfloat16" in capsys.readouterr().err
    assert record["entry"]["tokens"] == [1, 8, 64]
    assert calibrate_unknown(layers.modules, report) is None
    # Neither a layer that is much larger, nor another dtype, is known by that.
    threads = torch.get_num_threads()
    known = Layer(*record["entry"]["layer"])
    assert times.knows(known, threads) and times.knows(known._replace(neurons=96), threads)
    assert not times.knows(known._replace(neurons=6400), threads)
    assert not times.knows(known._replace(itemsize=4), threads)
    assert not times.knows(known, threads + 1)


def test_after_its_budget_a_calibration_follows_from_fewer_tokens():
    layers = synthetic(Shape(16, 64, 4, 1), dtype=torch.float32, tokens=4)
    grid = Grid(tokens=(1, 8), densities=(0.25, 1.0), budget=0.0)
    found = calibrate(layers, grid)["entry"]["seconds"]
    for one, many in found.values():
        assert many == pytest.approx([8 * value for value in one])


@pytest.mark.parametrize(("options", "kept"), [([], True), (["--no-calibrate"], False)])
def test_no_calibrate_leaves_the_machine_unknown(monkeypatch, options, kept):
    monkeypatch.setattr("moefy.benchmark.costs.BYTES", 4 << 20)
    shown = [
        "bench",
        "--layer",
        "32,64,8,2",
        "--batches",
        "1",
        "--engine",
        "auto",
        "--samples",
        "5",
    ]
    result = CliRunner().invoke(app, [*shown, *options])
    assert result.exit_code == 0, (result.output, result.exception)
    assert times.calibration_file().exists() == kept
