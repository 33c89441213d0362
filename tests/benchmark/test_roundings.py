"""The dense model in fewer bits: values and bits of every row, against loops written out.

Shapes: T tokens, N neurons, D width, I inputs and O outputs of one matrix.
"""

from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moefy.benchmark.compare import Comparison
from moefy.benchmark.roundings import LLAMA_CPP, ROUNDINGS, Dense, file_bits, gptq
from moefy.models.checkpoint import Checkpoint
from moefy.models.mlp import DenseMlp
from moefy.recipe import Recipe

DEMO = Path(str(resources.files("moefy"))) / "demo" / "llama"
BUILD = "a build of minutes: pip install moefy[llama-cpp]"


def dense(mlp: DenseMlp, x_TD: torch.Tensor, folder: Path) -> Dense:
    """A model of one MLP."""
    site: Any = None
    return Dense(
        checkpoint=Checkpoint.open(DEMO), sites=[site], mlp=lambda _: mlp, inputs=lambda _: x_TD,
        folder=folder,
    )  # fmt: skip


def make_mlp(neurons: int = 96, width: int = 64) -> DenseMlp:
    g = torch.Generator().manual_seed(0)
    gate_ND, up_ND, down_ND = (torch.randn(neurons, width, generator=g) for _ in range(3))
    return DenseMlp(gate_ND=gate_ND, up_ND=up_ND, down_ND=down_ND, activation="silu")


def inputs(tokens: int = 400, width: int = 64) -> torch.Tensor:
    """Inputs that go together, so that one column can make up for another."""
    g = torch.Generator().manual_seed(1)
    mix = torch.randn(width, width, generator=g) * torch.logspace(0, -2, width)[:, None]
    return torch.randn(tokens, width, generator=g) @ mix


def grid(group: np.ndarray, bits: int) -> tuple[float, float]:
    """Scale and offset in fp16 from the smallest to the largest weight, zero among them."""
    low, high = min(group.min(), 0.0), max(group.max(), 0.0)
    scale = np.float32(high - low) / np.float32(2**bits - 1)
    return float(np.float16(max(scale, 6e-8))), float(np.float16(-low))


def naive_nearest(weight_OI: np.ndarray, bits: int) -> np.ndarray:
    out = np.empty_like(weight_OI)
    for o in range(weight_OI.shape[0]):
        for first in range(0, weight_OI.shape[1], 32):
            group = weight_OI[o, first : first + 32]
            scale, offset = grid(group, bits)
            codes = np.clip(np.round((group + offset) / scale), 0, 2**bits - 1)
            out[o, first : first + 32] = codes * scale - offset
    return out


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_nearest_rounds_in_groups_along_the_inputs_of_every_matrix(bits: int, tmp_path: Path):
    mlp = make_mlp()
    ((rounded, size),) = ROUNDINGS[f"rtn-{bits}"].make(dense(mlp, inputs(), tmp_path))
    assert size == bits + 1
    for name, transposed in (("gate_ND", False), ("up_ND", False), ("down_ND", True)):
        weight = getattr(mlp, name).double().numpy()
        want = naive_nearest(weight.T, bits).T if transposed else naive_nearest(weight, bits)
        # A code may fall to the other side of a tie in fp32; half a step is far below any other fault.
        off = np.abs(getattr(rounded, name).double().numpy() - want) > 1e-5
        assert off.mean() < 1e-3, name


def naive_gptq(weight_OI: np.ndarray, x_TI: np.ndarray, bits: int) -> np.ndarray:
    """Optimal brain quantisation in fp64 with the inverse of what remains, column by column."""
    w, values = weight_OI.copy(), np.empty_like(weight_OI)
    hessian = x_TI.T @ x_TI
    hessian += np.eye(len(hessian)) * (0.01 * np.diag(hessian).mean() + 1e-8)
    inverse = np.linalg.inv(hessian)
    for column in range(w.shape[1]):
        if column % 32 == 0:
            grids = [grid(row[column : column + 32], bits) for row in w]
        for o, (scale, offset) in enumerate(grids):
            code = np.clip(np.round((w[o, column] + offset) / scale), 0, 2**bits - 1)
            values[o, column] = code * scale - offset
        error_O = (w[:, column] - values[:, column]) / inverse[column, column]
        w[:, column:] -= np.outer(error_O, inverse[column, column:])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return values


@pytest.mark.parametrize("bits", [4, 3])
def test_gptq_is_optimal_brain_quantisation_and_beats_nearest_on_its_inputs(bits: int) -> None:
    weight_OI, x_TI = make_mlp().up_ND, inputs()
    got, size = gptq(bits, weight_OI, x_TI)
    want = naive_gptq(weight_OI.double().numpy(), x_TI.double().numpy(), bits)
    assert size == bits + 1
    x, w = x_TI.double().numpy(), weight_OI.double().numpy()

    def error(values: np.ndarray) -> float:
        return float(np.square(x @ (values - w).T).sum())

    # One code that falls to the other side of a tie moves those after it: errors agree, not all values.
    assert error(got.double().numpy()) == pytest.approx(error(want), rel=0.05)
    assert np.mean(np.abs(got.double().numpy() - want) < 1e-3) > 0.95
    assert error(want) < 0.6 * error(naive_nearest(w, bits))


def test_calibrated_rows_round_down_on_what_gate_and_up_make(tmp_path: Path) -> None:
    mlp, x_TD = make_mlp(), inputs()
    ((rounded, _),) = ROUNDINGS["gptq-3"].make(dense(mlp, x_TD, tmp_path))
    half = DenseMlp(
        gate_ND=rounded.gate_ND, up_ND=rounded.up_ND, down_ND=mlp.down_ND, activation="silu"
    )
    want, _ = gptq(3, mlp.down_ND.T, half.hidden(x_TD))
    assert torch.equal(rounded.down_ND, want.T)


@pytest.mark.parametrize("bits", [4, 2])
def test_hqq_is_closer_than_nearest_for_most_weights(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("hqq", reason="a library to compare with: pip install moefy[hqq]")
    mlp = make_mlp()
    ((rounded, size),) = ROUNDINGS[f"hqq-{bits}"].make(dense(mlp, inputs(), tmp_path))
    ((nearest, _),) = ROUNDINGS[f"rtn-{bits}"].make(dense(mlp, inputs(), tmp_path))
    assert size == bits + 1
    for name in ("gate_ND", "up_ND", "down_ND"):
        ours, theirs = getattr(rounded, name), getattr(nearest, name)
        weight_ND = getattr(mlp, name)
        groups = (ours.T if name == "down_ND" else ours).reshape(-1, 32)
        assert max(len(group.unique()) for group in groups) <= 2**bits
        assert 0 < (ours - weight_ND).abs().mean() < (theirs - weight_ND).abs().mean()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return Comparison(DEMO, tmp_path_factory.mktemp("demo"), documents=2)


# Blocks of 32 where rows are no multiple of 256, as the 192 inputs of this model's gate and up.
@pytest.mark.parametrize(
    ("kind", "fallback"),
    [("q8_0", 8.5), ("q6_k", 8.5), ("q4_k_m", 5.5), ("q4_0", 4.5), ("q3_k_m", 4.5), ("q2_k", 4.5)],
)
def test_llama_cpp_rounds_and_bits_are_those_of_its_file(
    kind: str, fallback: float, bench: Comparison
) -> None:
    pytest.importorskip("llama_cpp", reason=BUILD)
    source = bench._source(bench._task(Recipe()))
    assert kind in LLAMA_CPP
    for site, (mlp, bits) in zip(source.sites, ROUNDINGS[kind].make(source), strict=True):
        own = source.mlp(site)
        assert 2.5 < bits <= fallback + 1
        for name in ("gate_ND", "up_ND", "down_ND"):
            rounded, weight_ND = getattr(mlp, name), getattr(own, name)
            off = (rounded - weight_ND).norm() / weight_ND.norm()
            assert 1e-4 < off < 2.0 ** (4 - bits), (name, bits)
    whole = file_bits(bench.folder / f"{kind}.gguf")
    assert 4 < whole < 9
    row = bench.rounded(kind)
    assert row["whole_bits"] == whole
    assert 0 < row["kl"] < 1


def test_a_library_that_is_not_there_is_named(
    bench: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moefy.benchmark.roundings.find_spec", lambda _: None)
    assert "moefy[hqq]" in bench.rounded("hqq-4")["n/a"]
    assert "moefy[llama-cpp]" in bench.rounded("q8_0")["n/a"]
