"""The roofline model against numbers worked out by hand."""

import runpy
from pathlib import Path

import pytest

from moefy_kernels import roofline
from moefy_kernels.roofline import MEASURED, PEAK, Layer, Work, least_seconds, union_share

LLAMA = Layer(width=4096, neurons=14336, size=128)
H200 = PEAK["H200"]._replace(launch=0)
ROOT = Path(__file__).parents[2]


def test_the_layer_of_llama_3_8b():
    # 3 * 4096 * 14336 weights of 2 bytes are 352 MB; at 4.8 TB/s these take 73 us.
    assert LLAMA.itemsize * LLAMA.parameters == pytest.approx(352.3e6, rel=1e-3)
    assert least_seconds(roofline.dense(LLAMA, 1), H200) == pytest.approx(73.4e-6, rel=1e-3)
    quarter = roofline.decode(LLAMA, [list(range(28))])
    assert least_seconds(quarter, H200) == pytest.approx(18.4e-6, rel=5e-3)
    a100 = PEAK["A100-80GB"]._replace(launch=0)
    assert least_seconds(roofline.dense(LLAMA, 1), a100) == pytest.approx(173e-6, rel=3e-3)


def test_shares_of_a_union():
    shares = [union_share(0.25, tokens) for tokens in (1, 2, 4, 8, 16)]
    assert shares == pytest.approx([0.25, 0.4375, 0.6836, 0.8999, 0.9900], abs=1e-4)
    assert union_share(1.0, 3) == 1


def test_experts_of_several_tokens_are_read_once_and_computed_for_each():
    apart = roofline.decode(LLAMA, [[0, 1], [2, 3]])
    same = roofline.decode(LLAMA, [[0, 1], [1, 0]])
    of_expert = 3 * 4096 * 128
    assert apart.bytes - same.bytes == 2 * 2 * of_expert
    assert apart.flops == same.flops == 2 * 4 * of_expert
    assert roofline.decode(LLAMA, [[112, -1, 0], []]).flops == 2 * of_expert
    assert roofline.union(LLAMA, 2, 0.1, share=2 / 112).flops == 2 * 2 * 2 * of_expert


def test_every_path_with_all_experts_is_dense():
    dense = roofline.dense(LLAMA, 7)
    lists = [list(range(LLAMA.experts))] * 7
    for work in (
        roofline.decode(LLAMA, lists), roofline.union(LLAMA, 7, 1.0), roofline.grouped(LLAMA, 7, 1.0)
    ):  # fmt: skip
        assert work[:2] == pytest.approx(dense[:2])
    assert roofline.masked_dense(LLAMA, 7).bytes == dense.bytes + 7 * 112


def test_what_limits():
    # An H200 does 206 operations while it reads a byte, a bf16 weight is two: 103 tokens per byte.
    assert roofline.limited_by(roofline.dense(LLAMA, 150), H200) == "bandwidth"
    assert roofline.limited_by(roofline.dense(LLAMA, 300), H200) == "arithmetic"
    assert roofline.limited_by(Work(1e3, 1e3, 2), PEAK["H200"]) == "launches"
    # fp32 has 15 times less arithmetic.
    wide = LLAMA._replace(itemsize=4)
    assert least_seconds(roofline.dense(wide, 512), H200, 4) == pytest.approx(
        2 * 512 * 3 * 4096 * 14336 / 67e12
    )


def test_routing_and_sequence():
    linear = roofline.routing(LLAMA, 1)
    assert linear.bytes == 2 * (4096 * 112 + 4096) + 4 * 112
    assert roofline.routing(LLAMA, 1, hidden=64).flops == 2 * 64 * (4096 + 112)
    both = linear.then(roofline.dense(LLAMA, 1))
    assert both.launches == 1 + 4
    assert both.bytes == linear.bytes + roofline.dense(LLAMA, 1).bytes


def test_launches_and_fraction():
    work = Work(4.3e9, 0, 3)
    assert least_seconds(work, MEASURED["H200"]) == pytest.approx(1e-3 + 6e-6)
    assert roofline.fraction_of_limit(2e-3, work, MEASURED["H200"]) == pytest.approx(0.503)


def test_the_page_shows_what_the_model_says(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    table = runpy.run_path(str(ROOT / "experiments" / "roofline.py"))["table"]()
    assert "nothing measured" in table
    assert table.strip() in (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
