"""Run the tests of what the CPU computes under every instruction set that it has: see `scripts/test_isa`.

A set is asked for by the switches of the libraries: ATEN_CPU_CAPABILITY for torch's own loops and moefy's
native library, which follows it; ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS for the products of matrices. A
probe in a process of its own tells what they made of it, and a set that is not what runs fails.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from rich.console import Console

from moefy.run.computing import machine
from moefy.run.tables import terminal

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "records" / "isa.json"
TESTS = (
    "test_native.py",
    "test_one_token.py",
    "test_compiled_decoding.py",
    "test_cpu_times.py",
    "test_dispatch.py",
    "test_kernel*.py",
    "test_bench*.py",
    "test_quickstart*.py",
)
PROBE = """
import torch
from moefy_kernels.cpu.library import instruction_set
print("native", instruction_set())
torch.conv2d(torch.randn(4, 16, 32, 32), torch.randn(16, 16, 3, 3))
"""


@dataclass(frozen=True, kw_only=True)
class InstructionSet:
    """One way to run: on which CPUs it can be, and what asks for it."""

    name: str
    native: str
    """What moefy's library is compiled for."""
    architecture: tuple[str, ...] = ("x86_64", "amd64")
    needs: tuple[str, ...] = ()
    """Flags that Linux tells of the CPU."""
    switches: dict[str, str]


def x86(name: str, native: str, aten: str, onednn: str, mkl: str, *needs: str) -> InstructionSet:
    switches = {
        "ATEN_CPU_CAPABILITY": aten,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
    }
    return InstructionSet(name=name, native=native, needs=needs, switches=switches)


AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
SETS = (
    x86("portable", "portable", "default", "SSE41", "SSE4_2"),
    x86("AVX2", "avx2", "avx2", "AVX2", "AVX2", "avx2", "fma"),
    x86("AVX-512", "avx512", "avx512", "AVX512_CORE", "AVX512", *AVX512),
    x86("AVX512-BF16", "avx512", "avx512", "AVX512_CORE_BF16", "AVX512", *AVX512, "avx512_bf16"),
    x86("AMX", "avx512", "avx512", "AVX512_CORE_AMX", "AVX512", *AVX512, "amx_tile", "amx_bf16"),
    InstructionSet(name="NEON", native="neon", architecture=("aarch64", "arm64"), switches={}),
)


def main() -> None:
    rows = [row_of(chosen, sys.argv[1:]) for chosen in SETS]
    record = {
        "kind": "instruction_sets",
        "what": "the tests of kernels, bench and quickstart under every instruction set of this CPU",
        "model": cpu_model(),
        "rows": rows,
        "machine": machine(),
    }
    if not sys.argv[1:]:
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    header = ["instruction set", "oneDNN", "passed", "failed", "skipped", "seconds"]
    Console().print(terminal(header, [shown(row) for row in rows]))
    sys.exit(any(row.get("failed") for row in rows))


def row_of(chosen: InstructionSet, arguments: list[str]) -> dict[str, Any]:
    """What came of the tests under one set."""
    row: dict[str, Any] = {"name": chosen.name, "switches": chosen.switches}
    if missing := lacking(chosen):
        return {**row, "not_here": f"this CPU has no {missing}"}
    print(f"== {chosen.name}", flush=True)
    env = {**os.environ, **chosen.switches}
    row |= probe(env)
    if row["native"] != chosen.native:
        raise SystemExit(f"isa: {chosen.name}: the native library is for {row['native']}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "--junitxml", str(report)]
        subprocess.run([*command, *(arguments or files())], cwd=ROOT, env=env)
        return {**row, **counted(report), "seconds": round(time.monotonic() - began)}


def lacking(chosen: InstructionSet) -> str:
    """The first thing that this CPU would need and does not have; nothing where it has all."""
    if platform.machine().lower() not in chosen.architecture:
        return chosen.architecture[0]
    told = Path("/proc/cpuinfo")
    flags = told.read_text(encoding="utf-8").split() if told.exists() else []
    return next((flag for flag in chosen.needs if flag not in flags), "")


def probe(env: dict[str, str]) -> dict[str, str]:
    """What moefy's library is compiled for, and what oneDNN says that it uses."""
    command = [sys.executable, "-c", PROBE]
    done = subprocess.run(
        command, cwd=ROOT, env={**env, "ONEDNN_VERBOSE": "1"}, capture_output=True, text=True, check=True
    )  # fmt: skip
    lines = done.stdout.splitlines()
    native = next(line.split()[1] for line in lines if line.startswith("native"))
    said = [line.split("cpu,isa:")[1] for line in lines if "cpu,isa:" in line]
    return {"native": native, "onednn": said[0] if said else "not used"}


def files() -> list[str]:
    return sorted(
        str(path.relative_to(ROOT)) for name in TESTS for path in ROOT.glob(f"tests/{name}")
    )


def counted(report: Path) -> dict[str, Any]:
    """Numbers of tests and the names of those that failed."""
    suite = next(ElementTree.parse(report).iter("testsuite"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = int(suite.get("skipped", 0))
    passed = int(suite.get("tests", 0)) - skipped - len(failed)
    return {"passed": passed, "failed": len(failed), "skipped": skipped, "failures": failed}


def shown(row: dict[str, Any]) -> list[str]:
    if "not_here" in row:
        return [row["name"], f"not on this machine: {row['not_here']}", "", "", "", ""]
    return [
        row["name"],
        row["onednn"],
        *(str(row[k]) for k in ("passed", "failed", "skipped", "seconds")),
    ]


def cpu_model() -> str:
    told = Path("/proc/cpuinfo")
    lines = told.read_text(encoding="utf-8").splitlines() if told.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    main()
