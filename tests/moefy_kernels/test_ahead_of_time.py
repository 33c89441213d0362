"""Kernels compiled for GPUs that are not there: what is sound passes the gate, what is not does not.

The suite interprets Triton, so a child process compiles. Every target and shape: `experiments/compile_kernels.py`.
"""

import json
import os
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]

PROGRAM = """
import json
import torch
from compile_kernels import FP32, TF32, Shape, rows
from moefy_kernels import configs

usual = Shape(4096, 14336, 128)
found = {
    "every operation": rows([usual], ["sm_90"]),
    "decode": rows([usual, Shape(2560, 9728, 1)], ["sm_80", "gfx942"], ["decode"]),
    "an odd width": rows([Shape(4100, 256, 32)], ["sm_90"], ["decode"]),
    "fp32": rows([Shape(4096, 14336, 128, **n) for n in (FP32, TF32)], ["sm_90"], ["union"]),
}
large = {"BLOCK_R": 64, "BLOCK_D": 512, "num_warps": 4, "num_stages": 1}
small = {"BLOCK_R": 16, "BLOCK_D": 64, "num_warps": 4, "num_stages": 4}
larger = {**large, "BLOCK_R": 256}
deep = {"BLOCK_R": 64, "BLOCK_D": 256, "num_warps": 4, "num_stages": 4}
for name, kernel, config, target in (
    ("large blocks", "decode_hidden", large, "sm_80"),
    ("large blocks, AMD", "decode_hidden", larger, "gfx942"),
    ("small products", "union_hidden", small, "sm_90"),
    ("deep pipeline", "union_hidden", deep, "gfx942"),
):
    usual_config = configs.ANALYTIC[kernel]
    configs.ANALYTIC[kernel] = lambda *_, config=config: config
    configs.analytic.cache_clear()
    found[name] = rows([Shape(4096, 14336, 128)], [target], [kernel.split("_")[0]])
    configs.ANALYTIC[kernel] = usual_config
print(json.dumps({name: [vars(row) for row in some] for name, some in found.items()}))
"""


@pytest.fixture(scope="module")
def compiled():
    """Rows by what was asked for."""
    places = (ROOT / "experiments", ROOT / "kernels", ROOT)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, places)), "TRITON_DEFAULT_FP_FUSION": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {
        name: [SimpleNamespace(**row) for row in rows]
        for name, rows in json.loads(done.stdout.splitlines()[-1]).items()
    }


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        return runpy.run_path(str(ROOT / "experiments" / "compile_kernels.py"))
    finally:
        sys.path.remove(str(ROOT / "experiments"))


def wrong(script, rows, kernel=""):
    return [line for row in rows if kernel in row.kernel for line in script["complaints"](row)]


def test_what_a_user_gets_is_sound(script, compiled):
    assert wrong(script, compiled["every operation"] + compiled["decode"]) == []
    kernels = Counter(row.operation for row in compiled["every operation"])
    assert set(kernels) == set(script["OPERATIONS"]) and min(kernels.values()) >= 2


def test_weights_are_read_in_steps_of_16_bytes(compiled):
    """Two matrices of 8 x 512 bf16 values over 128 threads: four loads of 8 values each."""
    hidden = [row for row in compiled["decode"] if row.kernel == "decode_hidden"]
    assert {(row.target, row.weights) for row in hidden} == {("sm_80", 2), ("gfx942", 2)}
    assert all(row.wide_loads >= 4 for row in hidden)


def test_a_width_that_16_bytes_do_not_divide_is_found(script, compiled):
    lines = wrong(script, compiled["an odd width"])
    assert len(lines) >= 2
    assert all("0 loads of 128 bits" in line for line in lines)


@pytest.mark.parametrize("name", ["large blocks", "large blocks, AMD"])
def test_registers_that_do_not_suffice_are_found(script, compiled, name):
    assert any("spills" in line for line in wrong(script, compiled[name], "decode_hidden"))
    assert wrong(script, compiled[name], "decode_down") == []


def test_products_that_miss_the_matrix_units_are_found(script, compiled):
    lines = wrong(script, compiled["small products"], "union_hidden")
    assert lines and all("not wgmma.mma_async" in line for line in lines)


def test_fp32_is_multiplied_as_torch_is_told(script, compiled):
    products = [row for row in compiled["fp32"] if row.products]
    assert {(row.numbers, row.tf32 > 0) for row in products} == {("float32", False), ("TF32", True)}
    assert wrong(script, products) == []
    other = {"float32": "TF32", "TF32": "float32"}
    swapped = [SimpleNamespace(**vars(row) | {"numbers": other[row.numbers]}) for row in products]
    assert len(wrong(script, swapped)) == len(products)


def test_too_much_shared_memory_is_found(script, compiled):
    lines = wrong(script, compiled["deep pipeline"], "union_hidden")
    assert any("bytes of shared memory, more than 65536" in line for line in lines)


def test_how_many_programs_fit(script):
    def programs(target, registers, shared, warps):
        row = SimpleNamespace(target=target, registers=registers, shared=shared)
        return script["programs"](row, warps)

    # 255 registers: two warps in each quarter of an SM. 64: eight.
    assert programs("sm_90", 255, 0, 4) == 2
    assert programs("sm_80", 64, 0, 4) == 8
    assert programs("sm_80", 32, 0, 1) == 32
    assert programs("sm_90", 64, 113 << 10, 4) == 2
    assert programs("sm_80", 64, 163 << 10, 4) == 1
    assert programs("gfx942", 128, 0, 4) == 4
    assert programs("gfx942", 257, 0, 8) == 0
    assert programs("gfx942", 32, 40 << 10, 4) == 1


def test_the_page_shows_the_record(script):
    record = json.loads((ROOT / "benchmarks" / "records" / "ahead_of_time.json").read_text())
    assert record["complaints"] == []
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert script["table"](record["rows"]).strip() in page
