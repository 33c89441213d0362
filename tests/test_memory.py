"""Memory of a process: its own, and all of it."""

import subprocess
import sys

from moefy.memory import peak_memory

CODE = "from moefy.memory import peak_memory; {}; print(peak_memory())"


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
