"""What `moefy bench` says of times: noise, percentiles, wrong engines, bytes, break-even, pictures.

The figures are checked on made-up seconds and on naive loops; that something was timed at all, on
layers small enough to time in a moment.
"""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from moefy.benchmark.checks import exact
from moefy.benchmark.costs import (
    Run,
    active_parameters,
    layer_bytes,
    percentiles,
    read_bandwidth,
    side_by_side,
    speedup,
)
from moefy.benchmark.engines import choose
from moefy.benchmark.engines.base import Unavailable
from moefy.benchmark.layers import Case, Shape, drawn_masks, synthetic
from moefy.benchmark.levels import Sweep, bench_kernel, bench_layer
from moefy.benchmark.plot import draw_speed
from moefy.benchmark.record import Facts, break_even, cell, speed_lines, speed_rows
from moefy.errors import MoefyError
from moefy.experts.backends import BACKENDS
from moefy.experts.sparse_mlp import SparseMlp
from moefy.methods.tables import COMPENSATIONS, ROUTERS, SELECTIONS
from moefy.models.mlp import DenseMlp
from moefy_kernels import masked_mlp

TINY = Shape(width=32, neurons=64, experts=8, k=2)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr("moefy.benchmark.costs.BYTES", 4 << 20)


def tiny(tokens=4, dtype=torch.float32):
    return synthetic(TINY, dtype=dtype, tokens=tokens)


def sweep(engines=(), samples=5, **given):
    return Sweep(engines=choose(engines), samples=samples, **given)


def drawn(seed, median=1.0, spread=0.05, rounds=15):
    """Seconds `[R, 1]` as clocks give them: skewed to the right."""
    noise = np.random.default_rng(seed).gamma(2, spread / 2, size=(rounds, 1))
    return median * (1 + noise)


class TestTiming:
    def test_every_round_has_every_run_once_in_changing_order(self):
        seen = []
        runs = {
            name: Run([lambda n=name: seen.append(n)], before=lambda n=name: seen.append(f"-{n}"))
            for name in "abc"
        }
        seconds = side_by_side(runs, 8, warmup=1)
        assert seen[:6] == ["-a", "a", "-b", "b", "-c", "c"]
        rounds = [seen[6:][i : i + 6] for i in range(0, 48, 6)]
        for one in rounds:
            assert sorted(one[1::2]) == ["a", "b", "c"]
            assert one[::2] == [f"-{name}" for name in one[1::2]]
        assert len({tuple(one) for one in rounds}) > 2
        assert {name: s.shape for name, s in seconds.items()} == dict.fromkeys("abc", (8, 1))

    def test_calls_are_timed_one_by_one_and_what_brings_back_the_state_is_not(self):
        def busy(seconds):
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass

        run = Run([lambda: busy(0.002), lambda: busy(0.02)], before=lambda: busy(0.05))
        taken = np.median(side_by_side({"a": run}, 3, warmup=0)["a"], axis=0)
        assert 0.002 <= taken[0] < 0.02 <= taken[1] < 0.05

    def test_percentiles_of_known_numbers(self):
        seconds = np.random.default_rng(0).permutation(np.arange(1.0, 101.0)).reshape(25, 4)
        assert percentiles(seconds) == {"p50": 50.5, "p95": pytest.approx(95.05)}

    def test_a_run_against_itself_is_none(self):
        layers = tiny()
        case = Case(layers, layers.inputs(1), drawn_masks(layers.modules, 1), routed=False)
        (choice,) = choose(["eager"])
        run = Run(choice.prepare("kernel", case))
        none = 0
        for seed in range(5):
            seconds = side_by_side({"a": run, "b": run}, 21, seed=seed)
            none += speedup(seconds["a"], seconds["b"]).is_none
        assert none >= 4

    def test_equal_runs_are_rarely_called_different(self):
        ratios = [speedup(drawn(s), drawn(s + 1000)) for s in range(300)]
        assert sum(not ratio.is_none for ratio in ratios) <= 9
        assert all(ratio.low <= ratio.value <= ratio.high for ratio in ratios)

    def test_a_real_difference_is_found_with_its_size(self):
        ratios = [speedup(drawn(s), drawn(s + 1000, median=1.3)) for s in range(100)]
        assert sum(ratio.is_none for ratio in ratios) == 0
        assert np.mean([ratio.value for ratio in ratios]) == pytest.approx(1.3, rel=0.02)
        inverse = [speedup(drawn(s + 1000, median=1.3), drawn(s)) for s in range(100)]
        assert inverse[0].value == pytest.approx(1 / ratios[0].value)
        assert not any(ratio.is_none for ratio in inverse)
        assert inverse[0].record()["speedup"] == inverse[0].value < 1

    def test_a_drift_that_both_share_is_no_noise(self):
        drift = np.linspace(1, 3, 15)[:, None]
        ratio = speedup(drift * drawn(1, spread=0.01), drift * drawn(2, 1.1, spread=0.01))
        assert not ratio.is_none
        # Without pairs the same drift hides the difference.
        mixed = np.random.default_rng(0).permutation(15)
        assert speedup(drift[mixed], 1.1 * drift).is_none

    def test_less_than_the_floor_is_none_however_exact(self):
        exact = np.ones((15, 1))
        assert speedup(exact, 1.005 * exact).is_none
        assert not speedup(exact, 1.02 * exact).is_none


class TestEngines:
    def test_names_files_and_what_replaces_what(self, tmp_path):
        labels = [engine.label for engine in choose()]
        assert labels[0] == "eager"
        graphs = {"compiled", "auto+compiled", "eager+linears", "compiled+linears"}
        graphs |= {"auto+linears", "auto+compiled+linears"}
        assert {*graphs, "auto", "llama.cpp", "experts:grouped_mm", *BACKENDS} <= set(labels)
        assert len(set(labels)) == len(labels)
        assert [engine.label for engine in choose(["views"])] == ["eager", "views"]
        files = [tmp_path / "q8.gguf", tmp_path / "f16.gguf", tmp_path / "mix" / "config.json"]
        (tmp_path / "mix").mkdir()
        for file in files:
            file.touch()
        chosen = choose(["llama.cpp"], gguf=files[:2])
        assert [engine.label for engine in chosen] == ["eager", "q8.gguf", "f16.gguf"]
        everything = choose(["all"], experts={"all": tmp_path / "mix"})
        stock = {e.label: e.path for e in everything if e.label.startswith("experts:")}
        names = ("eager", "batched_mm", "grouped_mm", "moefy")
        assert stock == {f"experts:{name}": tmp_path / "mix" for name in names}
        one = choose(experts={"moefy": tmp_path / "mix"})
        assert [engine.label for engine in one] == ["eager", "experts:moefy"]

    def test_variants_stand_beside_the_engines_that_have_any(self):
        chosen = choose(["native", "experts:eager"], compiled=True, linears=True)
        assert [engine.label for engine in chosen] == [
            "eager", "compiled", "eager+linears", "compiled+linears",
            "native", "native+compiled", "native+linears", "native+compiled+linears", "experts:eager",
        ]  # fmt: skip
        assert {engine.backend for engine in chosen} == {"", "native"}
        compiled = [engine.label for engine in choose(["compiled", "auto"], linears=True)]
        assert compiled == [
            "eager", "eager+linears", "compiled", "compiled+linears", "auto", "auto+linears",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"named": ["vievs"]}, "did you mean 'views'"),
            ({"experts": {"egaer": "mix"}}, "did you mean 'eager'"),
            ({"experts": {"all": "absent"}}, "absent: not a model folder"),
            ({"gguf": ["absent.gguf"]}, "absent.gguf: no such file"),
        ],
    )
    def test_bad_names(self, settings, words):
        with pytest.raises(MoefyError, match=words):
            choose(**settings)

    def test_files_of_one_name_are_refused(self, tmp_path):
        files = [tmp_path / folder / "m.gguf" for folder in "ab"]
        for file in files:
            file.parent.mkdir()
            file.touch()
        with pytest.raises(MoefyError, match="same name"):
            choose(gguf=files)

    def test_a_backend_that_is_registered_later_is_timed(self, monkeypatch):
        monkeypatch.setitem(BACKENDS, "late", replace(BACKENDS["masked"], in_graph=False))
        record = bench_kernel(tiny(), sweep(["late"]))
        assert set(record["cells"][0]["engines"]) == {"eager", "late"}

    def test_every_engine_of_a_cpu_computes_the_reference(self):
        layers = tiny()
        masks = drawn_masks(layers.modules, 4)
        case = Case(layers, layers.inputs(4), masks, routed=False)
        timed = 0
        for choice in choose(["all"]):
            if choice.label == "compiled":
                continue
            why_not = choice.serves("kernel", torch.device("cpu"))
            if choice.devices == {"cuda"}:
                assert "GPU" in why_not
            elif choice.layers is None or choice.linears or choice.compiled:
                assert "whole models" in why_not
            if why_not is not None:
                with pytest.raises(Unavailable, match=why_not):
                    choice.prepare("kernel", case)
                continue
            timed += 1
            calls = choice.prepare("kernel", case)
            for call, module, x_TD, mask_TE in zip(
                calls, layers.modules, case.inputs, masks, strict=True
            ):
                ran_TE = torch.ones_like(mask_TE) if choice.dense else mask_TE
                want = naive(module, x_TD, ran_TE)
                assert float((call() - want).norm() / want.norm()) < 1e-5, choice
        assert timed >= 7

    @pytest.mark.parametrize("level", [bench_kernel, bench_layer])
    @pytest.mark.parametrize("wrong", ["zeros", "swapped", "dropped token"])
    def test_an_engine_that_computes_something_else_is_refused(self, monkeypatch, level, wrong):
        def backend(x_TD, weights, mask_TE):
            if wrong == "swapped":
                return masked_mlp(x_TD, weights, mask_TE.roll(1, 1))
            y_TD = masked_mlp(x_TD, weights, mask_TE).clone()
            y_TD[-1 if wrong == "dropped token" else slice(None)] = 0
            return y_TD

        monkeypatch.setitem(BACKENDS, "wrong", replace(BACKENDS["masked"], compute=backend))
        record = level(tiny(), sweep(["wrong", "masked"], batches=[4]))
        (found,) = record["cells"]
        assert set(found["engines"]) == {"eager", "masked"}
        assert "computes something else: relative error" in found["refused"]["wrong"]
        assert any("not timed: wrong: computes" in line for line in speed_lines(record))

    def test_what_stock_experts_lack_is_said(self):
        layers = tiny()
        masks = drawn_masks(layers.modules, 4)
        masks[1][0] = True  # one token runs all of them
        (_, choice) = choose(["experts:eager"])
        with pytest.raises(Unavailable, match="different numbers of experts"):
            choice.prepare("kernel", Case(layers, layers.inputs(4), masks, routed=False))
        layers.modules[0].gate_ND = None
        with pytest.raises(Unavailable, match="no gate"):
            choice.prepare("kernel", Case(layers, layers.inputs(4), masks, routed=False))

    def test_a_layer_routed_by_the_softmax_of_exports(self):
        layers = tiny(tokens=16)
        for module in layers.modules:
            module.selection = SELECTIONS["softmax_topk"](k=3, eps=2.0**-16)
        record = bench_layer(layers, sweep(["experts:eager", "experts:batched_mm"], batches=[16]))
        assert len(record["cells"][0]["engines"]) == 3
        assert record["cells"][0]["density"] == 3 / 8


def naive(module, x_TD, mask_TE):
    """Token by token, expert by expert, neuron by neuron."""
    size = module.expert_size
    y_TD = torch.zeros_like(x_TD)
    for t in range(len(x_TD)):
        for e in range(module.experts):
            if not mask_TE[t, e]:
                continue
            for n in range(e * size, (e + 1) * size):
                gate = module.gate_ND[n] @ x_TD[t]
                h = gate * torch.sigmoid(gate) * (module.up_ND[n] @ x_TD[t])
                y_TD[t] += h * module.down_ND[n]
    return y_TD


def test_the_reference_is_the_naive_loop():
    layers = tiny()
    module, x_TD, mask_TE = layers.first, layers.inputs(4)[0], drawn_masks(layers.modules, 4)[0]
    got, want = exact(module.weights, x_TD, mask_TE).y_TD, naive(module, x_TD, mask_TE)
    assert got.dtype == torch.float64
    assert float((got - want).norm() / want.norm()) < 1e-5


@pytest.mark.parametrize("gated", [True, False])
def test_bytes_and_parameters_against_a_naive_loop(gated):
    width, neurons, experts, tokens = 16, 48, 6, 5
    mlp = DenseMlp(
        up_ND=torch.randn(neurons, width).bfloat16(),
        down_ND=torch.randn(neurons, width).bfloat16(),
        gate_ND=torch.randn(neurons, width).bfloat16() if gated else None,
        up_bias_N=None if gated else torch.randn(neurons).bfloat16(),
        down_bias_D=None if gated else torch.randn(width).bfloat16(),
        activation="silu",
    )
    module = SparseMlp(
        mlp, experts=experts, shared=1, router=ROUTERS["mlp"](width, experts - 1, 7),
        selection=SELECTIONS["topk"](k=2), compensation=COMPENSATIONS["mean"](width, 5, 0),
    )  # fmt: skip
    mask_TE = torch.zeros(tokens, experts, dtype=torch.bool)
    mask_TE[:, 0] = True
    for token, chosen in enumerate([(1, 2), (2,), (2, 5), (), (1,)]):
        mask_TE[token, list(chosen)] = True

    def weights(rows):
        per_row = (3 if gated else 2) * width + (0 if gated else 1)
        return rows * per_row + (0 if gated else width)

    ran = {e for t in range(tokens) for e in range(experts) if mask_TE[t, e]}
    assert ran == {0, 1, 2, 5}
    union = weights(sum(8 for _ in ran))
    moved = 2 * (union + 2 * tokens * width)
    assert layer_bytes(module, mask_TE, whole=False, routed=False) == pytest.approx(moved)
    whole = 2 * (weights(neurons) + 2 * tokens * width)
    assert layer_bytes(module, mask_TE, whole=True, routed=False) == pytest.approx(whole)
    router = sum(value.numel() for value in module.router.parameters())
    mean = float(mask_TE.sum()) / tokens
    extra = module.compensation.weights_read(mean - 1)
    assert extra > 0
    assert layer_bytes(module, mask_TE, whole=False, routed=True) == pytest.approx(
        moved + 4 * router + 4 * extra
    )
    active = sum(weights(8 * int(mask_TE[t].sum())) for t in range(tokens)) / tokens
    assert active_parameters(module, mask_TE, routed=False) == pytest.approx(active)
    assert active_parameters(module, mask_TE, routed=True) == pytest.approx(active + router + extra)


def test_a_router_that_computes_the_gates_reads_all_of_them():
    layers = tiny()
    module = layers.first
    module.router = ROUTERS["self_gating"](32, 8)
    mask_TE = torch.zeros(1, 8, dtype=torch.bool)
    mask_TE[0, 3] = True
    # One expert of 8 neurons of up and down, all 64 rows of the gate, x and y.
    assert layer_bytes(module, mask_TE, whole=False, routed=True) == 4 * (
        2 * 8 * 32 + 64 * 32 + 2 * 32
    )
    # Masked: all rows of all three, each once. Alone, the expert computes its own gate.
    assert layer_bytes(module, mask_TE, whole=True, routed=True) == 4 * (3 * 64 * 32 + 2 * 32)
    assert layer_bytes(module, mask_TE, whole=False, routed=False) == 4 * (3 * 8 * 32 + 2 * 32)


def made_up(times, dense=("eager",), **place):
    """A cell whose engines took these seconds."""
    seconds = {name: np.full((7, 2), value) for name, value in times.items()}
    facts = {n: Facts(n in dense, 0.0, 4e6 if n in dense else 1e6, 1e6) for n in times}
    where = {"phase": "layer", "batch": 1, "density": 0.25, "union": 0.25, "router": None} | place
    where |= {"tokens": where["batch"], "asked_density": where["density"], "least_bytes": 1e6}
    return cell(where, seconds, facts, {}, bandwidth=1e9)


def test_speedups_are_over_the_best_dense_engine():
    found = made_up({"eager": 4e-3, "compiled": 2e-3, "views": 1e-3}, dense=("eager", "compiled"))
    assert found["baseline"] == "compiled"
    assert found["ideal"] == 4
    rows = found["engines"]
    assert rows["views"]["speedup"] == pytest.approx(2)
    assert rows["eager"]["speedup"] == pytest.approx(0.5)
    assert rows["compiled"]["speedup"] is None
    assert rows["views"]["tokens_per_second"] == pytest.approx(1000)
    assert rows["views"]["of_bandwidth"] == pytest.approx(1e6 / 1e-3 / 1e9)
    header, table = speed_rows({"cells": [found]})
    assert {len(row) for row in table} == {len(header)}
    assert [row[3] for row in table] == ["views", "compiled", "eager"]
    assert [row[7] for row in table] == ["2.00x [1.98, 2.02]", "best dense", "0.50x [0.50, 0.51]"]


def test_without_a_dense_engine_times_stand_alone(tmp_path):
    found = made_up({"views": 1e-3}, dense=())
    assert (found["baseline"], found["ideal"]) == (None, None)
    assert found["engines"]["views"]["speedup"] is found["engines"]["views"]["ratio"] is None
    (row,) = speed_rows({"cells": [found]})[1]
    assert row[3:8] == ["views", "1.000", "1.000", "1000", "no dense"]
    record = bench_kernel(tiny(), sweep(["views"]))
    record["cells"] = [{**found, "refused": {"eager": "failed: made up"}}]
    record["break_even"] = break_even(record["cells"])
    assert record["break_even"][0]["batch"] is None
    lines = speed_lines(record)
    assert any(line.startswith("no dense engine could be timed") for line in lines)
    assert "not timed: eager: failed: made up" in lines
    draw_speed(record, tmp_path / "picture.png")
    record["cells"] = [{**found, "engines": {}}]
    draw_speed(record, tmp_path / "empty.png")


def test_an_engine_that_raises_is_a_row_with_its_reason(monkeypatch):
    def fails(*_):
        raise KeyError("auto")

    monkeypatch.setitem(BACKENDS, "wrong", replace(BACKENDS["masked"], compute=fails))
    (found,) = bench_kernel(tiny(), sweep(["wrong"]))["cells"]
    assert found["refused"] == {"wrong": "failed: KeyError: 'auto'"}


def test_a_difference_within_the_noise_is_printed_as_none():
    _, table = speed_rows({"cells": [made_up({"eager": 1.001e-3, "views": 1e-3})]})
    assert table[0][7].startswith("none [0.99, 1.01]")


def test_break_even_is_the_largest_batch_up_to_which_an_engine_wins():
    cells = [
        made_up({"eager": 1.0, "a": 0.5, "b": 1.5, "c": 0.5}, batch=1),
        made_up({"eager": 1.0, "a": 0.8, "b": 0.5, "c": 0.5}, batch=4),
        made_up({"eager": 1.0, "a": 1.0, "b": 0.5, "c": 0.5}, batch=2),
        made_up({"eager": 1.0, "a": 0.5, "b": 0.5, "c": 0.5}, batch=8),
    ]
    found = {row["engine"]: (row["batch"], row["open"]) for row in break_even(cells)}
    assert found == {"a": (1, False), "b": (None, False), "c": (8, True)}


KEYS = {"kind", "level", "what", "dtype", "device", "threads", "samples", "warmup", "bandwidth"}
ROW = {
    "dense", "p50", "p95", "tokens_per_second", "speedup", "ratio", "interval", "bytes",
    "of_bandwidth", "active_parameters", "relative_error", "computed_by", "seconds",
    "kl",
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_record_of_a_sweep(tmp_path, dtype):
    engines = ["masked", "views", "auto", "decode", "llama.cpp"]
    record = bench_layer(tiny(dtype=dtype), sweep(engines, batches=[1, 4], densities=[0.25, 0.5]))
    record = json.loads(json.dumps(record))
    assert set(record) == KEYS | {"cells", "break_even", "machine"}
    assert record["threads"] == torch.get_num_threads()
    assert [(c["density"], c["batch"]) for c in record["cells"]] == [
        (0.25, 1), (0.25, 4), (0.5, 1), (0.5, 4)
    ]  # fmt: skip
    for found in record["cells"]:
        assert set(found["engines"]) == {"eager", "masked", "views", "auto"}
        assert set(found["refused"]) == {"decode", "llama.cpp"}
        assert 0 < found["router"]["p50"] <= found["router"]["p95"]
        for row in found["engines"].values():
            assert set(row) == ROW
            assert np.shape(row["seconds"]) == (5, 1)
            assert row["p50"] == pytest.approx(np.median(row["seconds"]))
        assert found["engines"]["auto"]["computed_by"] in ("masked", "views", "native")
        assert found["engines"]["views"]["bytes"] < found["engines"]["masked"]["bytes"] * 0.95
    assert len(record["break_even"]) == 6
    lines = speed_lines(record)
    assert "not timed: decode: its Triton kernels need a GPU" in lines
    assert sum(line.startswith("faster than dense up to batch") for line in lines) == 2
    draw_speed(record, tmp_path / "deep" / "picture.png")
    assert (tmp_path / "deep" / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "deep" / "picture.png").stat().st_size > 20_000


def test_the_compiled_dense_engine():
    record = bench_kernel(tiny(), sweep(["compiled"], batches=[1, 2]))
    for found in record["cells"]:
        assert found["refused"] == {}
        assert found["engines"]["compiled"]["relative_error"] < 1e-5


def test_experts_that_run_are_read_and_others_are_not():
    """1 of 16 experts of 25 MB layers beats all of them by far, and by no more than bytes allow."""
    layers = synthetic(Shape(512, 4096, 16, 1), dtype=torch.float32, tokens=1)
    (found,) = bench_kernel(layers, sweep(["views", "masked"], samples=7))["cells"]
    assert found["ideal"] == pytest.approx(16, rel=0.01)
    rows = found["engines"]
    assert rows["views"]["speedup"] > 2
    assert rows["views"]["p50"] < rows["masked"]["p50"] / 2
    assert rows["views"]["bytes"] < rows["masked"]["bytes"] / 15


def test_bandwidth_is_that_of_reading(monkeypatch):
    monkeypatch.setattr("moefy.benchmark.costs.BYTES", 64 << 20)
    found = read_bandwidth(torch.device("cpu"))
    data = np.ones(64 << 20, dtype=np.uint8).view(np.int64)
    naive_seconds = min(_seconds(data.sum) for _ in range(3))
    assert found["bytes_per_second"] > 0.3 * data.nbytes / naive_seconds
    assert found["bytes_per_second"] < 2e12


def _seconds(call):
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batches": [0]}, "--batches 0"),
        ({"batches": [2, 2]}, "different numbers"),
        ({"densities": [1.5]}, "--densities 1.5"),
        ({"samples": 4}, "fewer than 5"),
    ],
)
def test_sweeps_that_cannot_be_timed(settings, words):
    with pytest.raises(MoefyError, match=words):
        Sweep(**settings)


def test_a_layer_that_needs_its_model_is_refused():
    layers = tiny()
    layers.modules[-1].look_ahead = True
    with pytest.raises(MoefyError, match="--level model"):
        bench_layer(layers, sweep())
    assert bench_kernel(layers, sweep(["masked"]))["cells"]
