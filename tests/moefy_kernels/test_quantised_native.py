"""Native kernels of weights in codes, against fp64 of the values that the codes stand for.

The reference rounds inputs, and the activations that meet down, to 8 bits by itself: what is left is rounding in
fp32, and now and then an activation that lies between two of its 8-bit numbers and falls to the other side.
"""

import copy
import itertools
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import pad

from moefy.models.mlp import activation_function
from moefy.models.quantised import quantise
from moefy_kernels.cpu import library
from moefy_kernels.cpu.quantised import Biases, Judge, pack_map, pack_mlp

pytestmark = pytest.mark.skipif(library.library() is None, reason="no C++ compiler")
EXACT = 3e-6
"""Relative Frobenius error of sums in fp32 of up to some thousand numbers."""
TIE = 1.5e-2
"""An activation on the other side: one step of 127 of the largest of its 32, which may be the only one."""
ACTS = {"silu": "silu", "relu": "relu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def in_8_bits(x_TD):
    """Every 32 numbers in whole 127ths of the largest, in fp64."""
    groups = pad(x_TD.float(), (0, -x_TD.shape[1] % 32)).unflatten(1, (-1, 32))
    most = groups.abs().amax(-1, keepdim=True)
    codes = (groups * torch.where(most > 0, 127 / most, 0)).round()
    return (codes.double() * (most / 127).double()).flatten(1)[:, : x_TD.shape[1]]


class Layer:
    """An MLP in codes, its judge, and what a naive computation gives."""

    def __init__(
        self, *, width=96, neurons=72, bits=4, scales=8, planes=2, tokens=1, gated=True, own=False,
        act="silu", dtype=torch.float32, seed=0,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)

        def draw(*shape, by=1.0):
            return torch.randn(*shape, generator=g) * by

        rows = [draw(neurons, width, by=width**-0.5) for _ in range(3)]
        grid = {"bits": bits, "scale_bits": scales}
        self.gate, self.up = (quantise(w, **grid) for w in rows[:2])
        self.down = quantise(rows[2], along=0, **grid)
        self.biases = Biases(
            draw(neurons, by=0.1) if gated else None, draw(neurons, by=0.1), draw(width, by=0.1)
        )
        self.judge = None
        if planes:
            judged = [quantise(w, 4) for w in rows[:2]] if own else [self.gate, self.up]
            errors = [(draw(neurons, by=0.1), draw(neurons).square() * 0.05) for _ in range(2)]
            self.judge = Judge(
                planes=planes, up=judged[1], size_N=draw(neurons).abs(), up_error_N=errors[1],
                gate=judged[0] if gated else None, gate_error_N=errors[0] if gated else None,
            )  # fmt: skip
        self.gated, self.act, self.planes = gated, act, planes
        self.x = draw(tokens, width, by=3).to(dtype)

    def pack(self, **change):
        parts = {
            "gate": self.gate if self.gated else None, "up": self.up, "down": self.down,
            "judge": self.judge,
        } | change  # fmt: skip
        return pack_mlp(**parts, activation=ACTS[self.act], biases=self.biases)

    def output(self, mask_TN=True):
        x, act = in_8_bits(self.x), activation_function(self.act)
        h = x @ self.up.values().double().T + self.biases.up_N.double()
        if self.gated:
            h = h * act(x @ self.gate.values().double().T + self.biases.gate_N.double())
        else:
            h = act(h)
        h = in_8_bits(torch.where(torch.as_tensor(mask_TN), h, 0))
        return h @ self.down.values().double() + self.biases.down_D.double()

    def scores(self):
        x, act, judge = in_8_bits(self.x), activation_function(self.act), self.judge

        def rough(matrix, bias_N, errors):
            return x @ matrix.rough(self.planes).double().T + bias_N.double() + errors[0].double()

        def squared(value, errors):
            step = errors[1].clamp_min(1e-12).sqrt() if self.act == "relu" else 0.01
            slope = (act(value + step) - act(value - step)) / (2 * step)
            return act(value).square() + slope.square() * errors[1]

        up = rough(judge.up, self.biases.up_N, judge.up_error_N)
        if not self.gated:
            return squared(up, judge.up_error_N).sqrt() * judge.size_N
        gate = rough(judge.gate, self.biases.gate_N, judge.gate_error_N)
        square = squared(gate, judge.gate_error_N) * (up.square() + judge.up_error_N[1])
        return square.sqrt() * judge.size_N


def error(got, want):
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def score_error(packed, layer, want):
    """Relative, but for what an activation in fp32 cannot say of a neuron that is nearly off."""
    got = packed.scores(layer.x).double()
    return float((got - want).norm() / (want.norm() + 0.1 * layer.judge.size_N.norm()))


LAYERS = {
    "width": st.sampled_from([32, 64, 96, 100, 576]),
    "neurons": st.sampled_from([1, 31, 32, 40, 77, 300]),
    "bits": st.sampled_from([2, 3, 4, 8]),
    "scales": st.sampled_from([8, 16]),
    "tokens": st.sampled_from([1, 2, 3, 5, 16, 19]),
    "gated": st.booleans(),
    "act": st.sampled_from(sorted(ACTS)),
    "seed": st.integers(0, 10**6),
}


@settings(max_examples=40, deadline=None)
@given(density=st.sampled_from([0.0, 0.1, 0.5, 1.0]), **LAYERS)
def test_neurons_that_someone_chose(density, **shape):
    layer = Layer(planes=0, **shape)
    g = torch.Generator().manual_seed(1)
    mask_TN = torch.rand(len(layer.x), layer.up.codes_ND.shape[0], generator=g) < density
    packed = layer.pack()
    assert error(packed(layer.x, mask_TN=mask_TN), layer.output(mask_TN)) < TIE
    assert error(packed(layer.x), layer.output()) < TIE


@settings(max_examples=40, deadline=None)
@given(
    planes=st.integers(1, 4), own=st.booleans(), share=st.sampled_from([0.0, 0.2, 0.9]), **LAYERS
)
def test_neurons_that_their_top_bits_choose(planes, own, share, bits, **shape):
    layer = Layer(planes=min(planes, 4 if own else bits), own=own, bits=bits, **shape)
    packed, x = layer.pack(), layer.x
    scores_TN = packed.scores(x)
    assert (
        score_error(packed, layer, layer.scores()) < 1e-3
    )  # a difference over .02, of activations in fp32
    threshold_T = scores_TN.quantile(1 - share, dim=1)
    y_TD, mask_TN = packed.routed(x, threshold_T)
    assert torch.equal(mask_TN, scores_TN > threshold_T[:, None])
    assert error(y_TD, layer.output(mask_TN)) < TIE
    assert torch.equal(packed(x, threshold_T), y_TD)
    assert error(packed(x, mask_TN=mask_TN), layer.output(mask_TN)) < TIE
    assert error(packed(x), layer.output()) < TIE


@pytest.mark.parametrize("planes", [0, 2, 3])
@pytest.mark.parametrize("scales", [8, 16])
def test_without_ties_only_fp32_is_left_and_mutations_are_seen(planes, scales):
    layer = Layer(width=576, neurons=300, planes=planes, scales=scales, tokens=2)
    packed, x = layer.pack(), layer.x
    mask_TN = torch.rand(2, 300, generator=torch.Generator().manual_seed(5)) < 0.4
    want = layer.output(mask_TN)
    assert error(packed(x, mask_TN=mask_TN), want) < EXACT
    chosen, other = (int(mask_TN[0].eq(value).nonzero()[0]) for value in (True, False))
    swapped = mask_TN.clone()
    swapped[0, chosen], swapped[0, other] = False, True
    dropped = mask_TN.clone()
    dropped[:, 32:64] = False
    up, gate = layer.up, layer.gate
    plane = replace(gate, codes_ND=gate.codes_ND ^ 1)
    scale = replace(layer.down, scale=layer.down.scale.roll(1, 0))
    offset = replace(up, offset=torch.zeros_like(up.offset))
    wrong = [
        packed(x, mask_TN=swapped), packed(x, mask_TN=dropped), packed(x.flip(0), mask_TN=mask_TN),
        torch.zeros_like(x), layer.pack(down=scale)(x, mask_TN=mask_TN),
        layer.pack(up=offset)(x, mask_TN=mask_TN), layer.pack(gate=plane)(x, mask_TN=mask_TN),
        layer.pack(gate=up, up=gate)(x, mask_TN=mask_TN),
    ]  # fmt: skip
    assert min(error(y, want) for y in wrong) > 30 * EXACT


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_scores_read_their_own_planes(planes):
    layer = Layer(width=576, planes=planes, tokens=3)
    want, judge = layer.scores(), layer.judge
    assert score_error(layer.pack(), layer, want) < 2e-5
    low = replace(judge.up, codes_ND=judge.up.codes_ND ^ (1 << (3 - planes)))
    layer.judge = replace(judge, up=low)
    assert score_error(layer.pack(), layer, want) < 2e-5  # a bit that is not read
    top = replace(judge.up, codes_ND=judge.up.codes_ND ^ (1 << (4 - planes)))
    for other in (replace(judge, up=top), replace(judge, size_N=judge.size_N.roll(1)),
                  replace(judge, gate_error_N=judge.up_error_N)):  # fmt: skip
        layer.judge = other
        assert score_error(layer.pack(), layer, want) > 1e-3


def test_planes_of_the_weights_are_laid_out_once():
    nested, apart = Layer(neurons=320).pack(), Layer(neurons=320, scales=16, own=True).pack()
    records = [packed.parts["records"].numel() / 320 for packed in (nested, apart)]
    # Of 96 inputs in 4 bits, gate, up and down: 2 * 2 * 96 bits less, and the offsets.
    assert records[1] - records[0] >= 2 * 96 * 2 / 8


def test_the_number_of_threads_changes_no_bit():
    threads = torch.get_num_threads()
    try:
        for tokens, planes in itertools.product((1, 5, 18), (0, 2)):
            layer = Layer(width=304, neurons=700, tokens=tokens, planes=planes)
            packed, results = layer.pack(), []
            mask_TN = torch.rand(tokens, 700, generator=torch.Generator().manual_seed(2)) < 0.3
            for count in (1, 2, 3, 7):
                torch.set_num_threads(count)
                results.append([packed(layer.x, mask_TN=mask_TN), packed(layer.x)])
                results[-1] += [packed.scores(layer.x)] if planes else []
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_tokens_of_a_batch_are_what_they_are_alone():
    layer = Layer(width=304, neurons=200, tokens=7)
    packed = layer.pack()
    threshold_T = packed.scores(layer.x).quantile(0.7, dim=1)
    alone = [packed(layer.x[t : t + 1], threshold_T[t : t + 1]) for t in range(7)]
    assert error(packed(layer.x, threshold_T), torch.cat(alone).double()) < EXACT


def test_16_bits_are_rounded_once():
    layer = Layer(width=304, neurons=200, tokens=2, dtype=torch.bfloat16)
    packed = layer.pack()
    assert torch.equal(packed(layer.x), packed(layer.x.float()).bfloat16())


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("planes", [0, 2])
def test_what_is_no_number_stays_none(planes, wrong):
    layer = Layer(planes=planes, tokens=2)
    packed, want = layer.pack(), layer.pack()(layer.x)
    layer.x[1, 40] = wrong
    y = packed(layer.x)
    assert y[1].isnan().all() and torch.equal(y[0], want[0])
    linear = pack_map(layer.up)(layer.x)
    assert linear[1].isnan().all() and linear[0].isfinite().all()


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 20), width=st.sampled_from([1, 7, 64, 1100]), rows=st.integers(1, 70),
    bits=st.sampled_from([2, 3, 4, 8]), scales=st.sampled_from([8, 16]), biased=st.booleans(),
)  # fmt: skip
def test_a_linear_map_is_what_fp64_gives(tokens, width, rows, bits, scales, biased):
    g = torch.Generator().manual_seed(0)
    w = quantise(torch.randn(rows, width, generator=g), bits, scale_bits=scales)
    x, bias = (
        torch.randn(tokens, width, generator=g),
        torch.randn(rows, generator=g) if biased else None,
    )
    parts = in_8_bits(x)[:, None] * w.values().double()
    want = parts.sum(-1) + (0 if bias is None else bias.double())
    got = pack_map(w, bias)(x)
    # An input that lies between two steps may be rounded to either: one step of one input of a token.
    step = x.abs().max() / 127 * w.values().abs().max() * rows**0.5
    assert (got.double() - want).norm() < EXACT * (parts.norm() + want.norm()) + step
    assert torch.equal(pack_map(w, bias)(x[None])[0], got)
    wrong = replace(w, codes_ND=w.codes_ND ^ 1)
    assert (pack_map(wrong, bias)(x).double() - want).norm() > 100 * EXACT * want.norm()


def test_copies_read_their_own_weights():
    layer = Layer()
    packed = layer.pack()
    want = packed(layer.x)
    other = copy.deepcopy(packed)
    other.parts["records"].zero_()
    assert torch.equal(packed(layer.x), want) and not torch.equal(other(layer.x), want)


def test_what_no_kernel_reads_is_refused():
    layer = Layer(planes=0)
    packed = layer.pack()
    with pytest.raises(ValueError, match="codes of"):
        layer.pack(up=quantise(torch.randn(72, 96), 5))
    with pytest.raises(ValueError, match="one kind"):
        layer.pack(down=quantise(torch.randn(72, 96), 4, along=0, scale_bits=16))
    with pytest.raises(ValueError, match="without gradients"):
        packed(nn.Parameter(layer.x))
    with pytest.raises(ValueError, match="float64"):
        packed(layer.x.double())
    with pytest.raises(ValueError, match="without a judge"):
        packed(layer.x, torch.zeros(1))
    with pytest.raises(ValueError, match="planes: 0"):
        Layer(planes=2, bits=2).pack(judge=replace(Layer().judge, planes=0))


@pytest.mark.parametrize(
    ("who", "message"),
    [
        ({"mask_TN": torch.ones(1, 72)}, "a mask .3, 72."),
        ({"mask_TN": torch.ones(3, 64)}, "a mask .3, 72."),
        ({"mask_TN": torch.ones(3, 72), "threshold_T": torch.ones(3)}, "no threshold beside"),
        ({"mask_TN": torch.ones(3, 72, device="meta")}, "on a CPU"),
        ({"threshold_T": torch.ones(1)}, "a threshold .3."),
        ({"threshold_T": torch.tensor(1.0)}, "a threshold .3."),
    ],
)
def test_masks_and_thresholds_of_other_shapes_are_refused(who, message):
    layer = Layer(tokens=3)
    with pytest.raises(ValueError, match=message):
        layer.pack()(layer.x, **who)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names instruction sets of x86")
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_smaller_instruction_sets_and_the_plain_product_compute_the_same(capability, monkeypatch):
    code = (
        f"import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}]; import test_quantised_native as t\n"
        "for planes in (0, 1, 2, 3):\n"
        "  for bits in (3, 4, 8):\n"
        "    layer = t.Layer(width=160, planes=planes, bits=bits, tokens=3); packed = layer.pack()\n"
        "    assert t.error(packed(layer.x), layer.output()) < t.TIE\n"
        "    assert not planes or t.score_error(packed, layer, layer.scores()) < 2e-5\n"
    )
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(library.instruction_set() != "avx512", reason="no AVX-512 here")
def test_avx512_without_vnni_gives_the_same_bits(monkeypatch, tmp_path):
    layer = Layer(width=304, neurons=100, tokens=2, bits=8, planes=3)
    packed = layer.pack()
    want = packed(layer.x)
    monkeypatch.setattr(library, "DOT_PRODUCTS", {})
    plain = library.load(library.build("avx512", tmp_path))
    monkeypatch.setattr(library, "library", lambda: plain)
    assert torch.equal(packed(layer.x), want)
