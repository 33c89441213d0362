"""Memory of a process: its own, and all of it."""

import subprocess
import sys
from pathlib import Path

import pytest

from moefy.run.memory import peak_memory

ROOT = Path(__file__).parents[2]
CODE = "from moefy.run.memory import peak_memory; {}; print(peak_memory())"


def peak_of(statement: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(statement)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_peak_memory_is_that_of_this_process_alone():
    held = bytearray(400_000_000)
    held[::4096] = b"x" * len(held[::4096])
    assert peak_memory() > len(held)
    assert peak_of("pass") < 200_000_000
    del held
    assert peak_memory() > 400_000_000


def test_peak_memory_counts_what_was_given_back():
    grown = peak_of("x = bytearray(b'x') * 300_000_000; del x") - peak_of("pass")
    assert 290_000_000 < grown < 330_000_000


@pytest.mark.slow
def test_the_estimate_of_a_conversion_is_near_its_peak(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    from memory_bars import build, measured

    model = build(tmp_path, ROOT / "moefy" / "demo" / "llama")
    few = {"recipe": "fast", "partition.tokens": 512, "router.tokens": 1024, "context": 64}
    run = measured(model, few)
    # So few tokens leave most to the part that is fixed; memory_bars holds whole conversions to 25 %.
    assert abs(run["ratio"] - 1) < 0.5, run
