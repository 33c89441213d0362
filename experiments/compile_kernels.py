"""Every kernel compiled as a GPU user would launch it, for GPUs that are not there, and judged.

python experiments/compile_kernels.py          # record and table of docs/kernels.md; fails if a kernel is bad
python experiments/compile_kernels.py table    # the table alone, from the record

The public operations are called with tensors of real shapes whose memory is never touched. A driver that
only names a GPU stands where Triton looks for one, and every launch becomes a compilation: what is judged
is the machine code that Triton's own specialisation (on divisibility by 16, on ones) gives a user with
the analytic configurations. What only a measurement shows, time, is not here.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from pages import fill
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from moefy.run.computing import machine
from moefy.run.tables import markdown
from moefy_kernels import launching
from moefy_kernels.decode import decode
from moefy_kernels.expert_mlp import ACTIVATIONS, ExpertMlp
from moefy_kernels.grouped import grouped
from moefy_kernels.routing import listed, route, select
from moefy_kernels.union import union

RECORD = Path("benchmarks/records/ahead_of_time.json")
PAGE = Path("docs/kernels.md")


@dataclass(frozen=True)
class Target:
    """A GPU: what Triton calls it, and what one of its processors (SM, compute unit) has."""

    gpu: GPUTarget
    processors: int
    registers: int
    """Most that a thread may have; above 256 on a gfx942 a SIMD has room for one wave alone."""
    shared: int
    """Bytes that one program may have."""
    shared_in_all: int
    """Bytes of a processor."""
    matrix: str
    """The instruction that its matrix units are fed with in 16 bits."""


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 108, 255, 163 << 10, 164 << 10, "mma.sync"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 132, 255, 227 << 10, 228 << 10, "wgmma.mma_async"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 304, 256, 64 << 10, 64 << 10, "v_mfma"),
}
MATRIX = [target.matrix for target in TARGETS.values()]
HALVES = {"bfloat16": "16 bits", "float16": "16 bits"}


@dataclass(frozen=True)
class Shape:
    """One MLP in experts of `size` neurons, of which a quarter runs."""

    width: int
    neurons: int
    size: int
    dtype: torch.dtype = torch.bfloat16
    activation: str = "silu"
    gated: bool = True
    vectors: bool = False
    """Whether there are biases and a centre, which take registers."""
    tf32: bool = False
    """Whether torch is told to multiply fp32 matrices in TF32."""

    @property
    def experts(self) -> int:
        return self.neurons // self.size

    @property
    def k(self) -> int:
        return max(1, self.experts // 4)

    @property
    def numbers(self) -> str:
        """What is multiplied: a dtype, or `TF32`."""
        return "TF32" if self.tf32 else str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        more = " gated" * self.gated + " biased centred" * self.vectors
        sides = f"{self.width}x{self.neurons}/{self.size}"
        return f"{self.numbers} {sides} {self.activation}{more}"

    def empty(self, *shape: int) -> Tensor:
        """Address space: no page of it is ever touched."""
        return torch.empty(shape, dtype=self.dtype)

    def mlp(self) -> ExpertMlp:
        up_ND, down_ND, gate_ND = (self.empty(self.neurons, self.width) for _ in range(3))
        gate = gate_ND if self.gated else None
        up_bias, gate_bias, centre = (self.vector(self.neurons) for _ in range(3))
        return ExpertMlp.of(
            self.experts, self.activation, up_ND, down_ND, gate,
            up_bias, gate_bias if self.gated else None, centre,
        )  # fmt: skip

    def vector(self, length: int) -> Tensor | None:
        """A bias or a centre."""
        return self.empty(length) if self.vectors else None

    def lists(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and weights `[T, K]` and counts `[T]`, as routing gives them."""
        ids_TK = torch.empty((tokens, self.k), dtype=torch.int32)
        return ids_TK, torch.empty(tokens, self.k), torch.empty(tokens, dtype=torch.int32)


Weights = list[Tensor]
"""What an operation was given that is worth reading in steps of 16 bytes."""


def weights_of(mlp: ExpertMlp) -> Weights:
    return [value for value in (mlp.up_EFD, mlp.down_EFD, mlp.gate_EFD) if value is not None]


def decode_once(shape: Shape) -> Weights:
    """One token, whose sum is split, and sixteen, whose sums are not."""
    mlp = shape.mlp()
    for tokens in (1, 16):
        x_TD, bias_D = shape.empty(tokens, shape.width), shape.vector(shape.width)
        decode(x_TD, mlp, *shape.lists(tokens), bias_D)
    return weights_of(mlp)


def union_once(shape: Shape) -> Weights:
    """Few tokens with a mask, and as many as it is made for with weights."""
    mlp = shape.mlp()
    for tokens, dtype in ((8, torch.bool), (64, torch.float32)):
        weight_TE = torch.empty(tokens, shape.experts, dtype=dtype)
        union(shape.empty(tokens, shape.width), mlp, weight_TE, shape.vector(shape.width))
    return weights_of(mlp)


def grouped_once(shape: Shape) -> Weights:
    """A pass and the gradients of everything."""
    mlp, x_TD = shape.mlp(), shape.empty(512, shape.width)
    weight_TE = torch.empty(512, shape.experts)
    inputs = [x_TD, *(value for value in mlp if isinstance(value, Tensor)), weight_TE]
    for value in inputs:
        value.requires_grad_()
    y_TD = grouped(x_TD, mlp, weight_TE, most=shape.k)
    torch.autograd.grad(y_TD, inputs, torch.empty_like(y_TD))
    return weights_of(mlp)


def route_once(shape: Shape) -> Weights:
    """A linear router that takes what is near its best, scores above a threshold, and a mask."""
    router_ED, x_TD = shape.empty(shape.experts, shape.width), shape.empty(8, shape.width)
    route(x_TD, router_ED, shape.vector(shape.experts), tau=0.5)
    select(shape.empty(8, shape.experts), threshold=0.0)
    listed(torch.empty(8, shape.experts, dtype=torch.bool), together=True)
    return [router_ED]


class Operation(NamedTuple):
    """How an operation is called, and for which sizes of experts."""

    call: Callable[[Shape], Weights]
    sizes: tuple[int, ...]


OPERATIONS = {
    "decode": Operation(decode_once, (1, 16, 32, 128, 512)),
    "union": Operation(union_once, (1, 16, 128, 512)),
    # Larger experts are computed in blocks of the same size as the largest of these.
    "grouped": Operation(grouped_once, (1, 16, 32, 128)),
    # It sees the number of experts alone.
    "routing": Operation(route_once, (1, 128)),
}

SIZES = (1, 16, 32, 128, 512)
"""A configuration follows from width, size and bytes of a number: every one that sizes have."""
FP32, TF32 = {"dtype": torch.float32}, {"dtype": torch.float32, "tf32": True}
NUMBERS: tuple[dict[str, Any], ...] = ({}, {"dtype": torch.float16}, FP32, TF32)
FULL = Shape(4096, 14336, 128, activation="gelu", vectors=True)
"""What takes most registers: a gate, biases, a centre and an error function."""
SHAPES = [
    *(Shape(4096, 14336, size, **numbers) for size in SIZES for numbers in NUMBERS),
    *(replace(FULL, size=size) for size in SIZES),
    *(replace(FULL, size=size, **numbers) for size in (16, 128) for numbers in NUMBERS[1:]),
    *(
        replace(FULL, activation=activation, gated=gated)
        for activation in ACTIVATIONS
        for gated in (True, False)
        if (activation, gated) != (FULL.activation, True)
    ),
    # Gates that a router has computed: neurons weighed by them.
    replace(FULL, size=1, activation="linear", gated=False),
    # The number of neurons alone changes little: how many experts there are, and what 16 divides.
    Shape(4096, 11008, 32),
    *(Shape(2560, 9728, size) for size in (1, 128)),
    Shape(2560, 9728, 16, activation="relu", gated=False),
]


class NoGpu(DriverBase):
    """Names a target to Triton, as a device of its own, so that compilations of targets never mix."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise AssertionError("nothing is launched")

    def get_benchmarker(self) -> Any:
        raise AssertionError("nothing is launched")

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.target].gpu

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0


class Launch(NamedTuple):
    """What would have been launched: the kernel, its constants, its arguments, what was compiled."""

    kernel: str
    config: dict[str, Any]
    arguments: tuple[Any, ...]
    compiled: Any


@contextmanager
def on(target: str) -> Iterator[list[Launch]]:
    """Operations on CPU tensors believe in a GPU; the list is of what they launch."""
    seen: list[Launch] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        constants = {p.name for p in self.params if p.is_constexpr} | {"num_warps", "num_stages"}
        config = {name: value for name, value in kwargs.items() if name in constants}
        seen.append(Launch(self.fn.__name__, config, (*args, *kwargs.values()), compiled))
        return compiled

    stand_ins = {"launches": lambda x: True, "processors": lambda d: TARGETS[target].processors}
    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", compile_only))
        for name, stand_in in stand_ins.items():
            real = getattr(launching, name)
            for module in [m for n, m in sys.modules.items() if n.startswith("moefy_kernels.")]:
                if getattr(module, name, None) is real:
                    stack.enter_context(patch.object(module, name, stand_in))
        before = driver._active
        driver.set_active(NoGpu(target))
        try:
            yield seen
        finally:
            driver._active = before


@dataclass
class Row:
    """One kernel in machine code: what it was compiled from, what it takes and what it holds."""

    operation: str
    kernel: str
    target: str
    numbers: str
    """What is multiplied: a dtype, or TF32."""
    config: dict[str, Any]
    weights: int
    """Weight matrices among its arguments."""
    products: bool
    """Whether it multiplies matrices (`tl.dot`)."""
    registers: int
    """Of every thread."""
    stack: int
    """Bytes of every thread that lie in memory."""
    spills: int
    """Registers of vectors that are spilled; on NVIDIA the stack says it all."""
    scalar_spills: int
    """Registers of scalars and masks that are (gfx942): to lanes of others, in memory only with a stack."""
    shared: int
    """Bytes of every program."""
    wide_loads: int
    """Loads of 16 bytes and more from global memory, those to shared memory included."""
    asynchronous: int
    """Loads of any width that go to shared memory while the program computes."""
    loads: int
    """All loads from global memory."""
    matrix: dict[str, int]
    """Instructions of the matrix units."""
    tf32: int
    """Those of them that multiply in TF32."""
    programs: int = 0
    """Programs that a processor has registers and shared memory for at a time."""
    shapes: list[str] = field(default_factory=list)
    """Every shape that runs this very code."""


def rows(
    shapes: list[Shape],
    targets: Iterable[str] = tuple(TARGETS),
    operations: Iterable[str] = tuple(OPERATIONS),
) -> list[Row]:
    """What `shapes` are compiled to; the same machine code is one row, whoever runs it."""
    if os.environ.get("TRITON_INTERPRET"):
        raise SystemExit("TRITON_INTERPRET is set: what is interpreted is not compiled")
    found: dict[tuple[str, str], Row] = {}
    for target in targets:
        for name in operations:
            for shape in shapes:
                if shape.size in OPERATIONS[name].sizes:
                    _add(found, target, name, shape)
    return list(found.values())


def _add(found: dict[tuple[str, str], Row], target: str, name: str, shape: Shape) -> None:
    torch.set_float32_matmul_precision("high" if shape.tf32 else "highest")
    with on(target) as launched:
        weights = OPERATIONS[name].call(shape)
    if not launched:
        raise SystemExit(f"{name} launched nothing for {shape}")
    for launch in launched:
        key = target, launch.compiled.hash
        if key not in found:
            found[key] = _row(name, launch, target, shape, weights)
        if str(shape) not in found[key].shapes:
            found[key].shapes.append(str(shape))


def _row(operation: str, launch: Launch, target: str, shape: Shape, weights: Weights) -> Row:
    places = {weight.untyped_storage().data_ptr() for weight in weights}
    read = {
        value.untyped_storage().data_ptr()
        for argument in launch.arguments
        # A tensor descriptor has its tensor in `base`.
        if isinstance(value := getattr(argument, "base", argument), Tensor)
    }
    compiled = launch.compiled
    resources = _nvidia(compiled) if TARGETS[target].gpu.backend == "cuda" else _amd(compiled)
    row = Row(
        operation=operation,
        kernel=launch.kernel,
        target=target,
        numbers=shape.numbers,
        config=launch.config,
        weights=len(places & read),
        products="tt.dot" in compiled.asm["ttir"],
        shared=compiled.metadata.shared,
        **resources,
    )
    row.programs = programs(row, compiled.metadata.num_warps)
    return row


def _nvidia(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
    # Registers are known of machine code alone. Instructions are those of PTX, which become machine
    # instructions one by one: to disassemble takes as long as to compile.
    code = compiled.asm["ptx"]
    loads = re.findall(r"\b(ld\.global\S*|cp\.async\.c[ag]\S* .*?;|cp\.async\.bulk\S*)", code)
    wide = r"ld\S*\.(v4\.[bufs]32|v2\.[bufs]64|v8\S*|b128)|cp\.async\.cg.*\b(0x10|16)\b|cp\.async\.bulk"
    copies = [load for load in loads if load.startswith("cp.async")]
    matrix = {name: len(re.findall(rf"\b{re.escape(name)}\b", code)) for name in MATRIX}

    def number(name: str) -> int:
        return int(re.search(rf"{name}:(\d+)", usage)[1])  # type: ignore[index]

    return {
        "registers": number("REG"),
        # Where ptxas puts what it spills; LOCAL stays 0.
        "stack": number("STACK"),
        "spills": 0,
        "scalar_spills": 0,
        "wide_loads": sum(re.match(wide, load) is not None for load in loads),
        "asynchronous": len(copies),
        "loads": len(loads),
        "matrix": {name: count for name, count in matrix.items() if count},
        "tf32": len(re.findall(r"mma\S+\.tf32", code)),
    }


def _amd(compiled: Any) -> dict[str, Any]:
    code = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", code)[1])  # type: ignore[index]

    loads = re.findall(r"\b(?:global|buffer|flat)_load_.*", code)
    products = len(re.findall(r"\bv_mfma_\w+", code))
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),
        "scalar_spills": number("sgpr_spill_count"),
        "wide_loads": sum("_dwordx4 " in load for load in loads),
        "asynchronous": sum(re.search(r"\blds\b", load) is not None for load in loads),
        "loads": len(loads),
        "matrix": {"v_mfma": products} if products else {},
        "tf32": len(re.findall(r"\bv_mfma_\w*xf32", code)),
    }


def programs(row: Row, warps: int) -> int:
    """How many programs of so many warps (waves) one processor holds at a time.

    An SM has 64 Ki registers, handed out to warps in 256s, and room for 64 warps and 32 programs; every
    program takes 1 KiB of shared memory for itself. Each of the four SIMDs of a gfx942's compute unit has
    512 registers a lane, handed out in eights, and room for 8 waves.
    """
    target = TARGETS[row.target]
    if target.gpu.backend == "cuda":
        of_warp = -(-row.registers * 32 // 256) * 256
        # Each of the four parts of an SM has its own quarter of the registers.
        by_warps = min(64, 4 * (2**14 // of_warp)) // warps
        by_shared = target.shared_in_all // (row.shared + 1024)
        return min(32, by_warps, by_shared)
    by_waves = 4 * min(8, 512 // (-(-row.registers // 8) * 8)) // warps
    by_shared = target.shared_in_all // row.shared if row.shared else by_waves
    return min(by_waves, by_shared)


def complaints(row: Row) -> list[str]:
    """What is wrong with a kernel, in words; nothing of this shows in its results."""
    target, wrong = TARGETS[row.target], []
    if row.stack or row.spills:  # scalars alone go to lanes of vector registers, not to memory
        spills = f"{row.spills} vector and {row.scalar_spills} scalar spills"
        wrong.append(f"{row.stack} bytes of stack a thread, {spills}")
    if row.registers > target.registers:
        wrong.append(f"{row.registers} registers, more than {target.registers}")
    if row.shared > target.shared:
        wrong.append(f"{row.shared} bytes of shared memory, more than {target.shared}")
    if row.programs < 1:
        wrong.append("a processor has no room for a program")
    if row.wide_loads < max(row.weights, row.products):
        wrong.append(f"{row.wide_loads} loads of 128 bits, weight matrices: {row.weights}")
    held = ", ".join(row.matrix) or "nothing of the kind"
    if row.products and row.numbers in HALVES and not row.matrix.get(target.matrix):
        wrong.append(f"multiplies matrices with {held}, not {target.matrix}")
    if row.products and (row.tf32 > 0) != (row.numbers == "TF32"):
        wrong.append(f"multiplies {row.numbers} with {held}, {row.tf32} of them in TF32")
    where = f"{row.kernel} on {row.target} for {row.shapes[0] if row.shapes else row.numbers}"
    return [f"{where} {row.config}: {what}" for what in wrong]


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: every kernel by what it multiplies, from the least to the most of all that was compiled."""
    lines = []
    kernels = dict.fromkeys(row["kernel"] for row in found)
    for name, numbers, target in product(kernels, ("16 bits", "float32", "TF32"), TARGETS):
        same = [
            row for row in found
            if (row["kernel"], row["target"]) == (name, target)
            and HALVES.get(row["numbers"], row["numbers"]) == numbers
        ]  # fmt: skip
        if same:
            lines.append([f"`{name}`", numbers, target, *_cells(same)])
    header = [
        "kernel", "numbers", "target", "compiled", "registers", "programs per processor",
        "shared memory, KB", "128-bit loads of all", "matrix instructions", "that spill to memory",
    ]  # fmt: skip
    return markdown(header, lines)


def _cells(same: list[dict[str, Any]]) -> list[str]:
    def span(values: list[float], digits: int = 0) -> str:
        low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    products = sorted({name for row in same for name in row["matrix"]})
    wide, loads = (span([row[name] for row in same]) for name in ("wide_loads", "loads"))
    return [
        str(len(same)),
        span([row["registers"] for row in same]),
        span([row["programs"] for row in same]),
        span([row["shared"] / 1024 for row in same], 1),
        f"{wide} of {loads}" if loads != "0" else "none",
        ", ".join(f"{n} {span([row['matrix'].get(n, 0) for row in same])}" for n in products)
        or "none",
        str(sum(any(row[n] for n in ("stack", "spills")) for row in same)),
    ]


def write(record: dict[str, Any]) -> None:
    """The record, every row on a line of its own."""
    rows = ",\n".join(json.dumps(row) for row in record["rows"])
    rest = json.dumps(record | {"rows": []}, indent=1)
    RECORD.write_text(rest.replace('"rows": []', f'"rows": [\n{rows}\n]') + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["table"])
    wrong = []
    if parser.parse_args().what is None:
        # The default of Triton, said aloud so that it does not warn.
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
        found = rows(SHAPES)
        wrong = [line for row in found for line in complaints(row)]
        record = {
            "machine": machine() | {"triton": triton.__version__},
            "complaints": wrong,
            "rows": [vars(row) for row in found],
        }
        write(record)
        print(f"{len(found)} kernels compiled in {sum(os.times()[:4]):.0f} s of one core")
    fill(PAGE, "ahead-of-time", table(json.loads(RECORD.read_text())["rows"]))
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
