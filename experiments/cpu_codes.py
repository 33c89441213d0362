"""What the native kernels of weights in codes reach: `benchmarks/records/cpu_codes.json` and a table of docs/cpu.md.

    python experiments/cpu_codes.py measure     # SmolLM2's layer and a 7B-shaped one, one token
    python experiments/cpu_codes.py table       # docs/cpu.md from the record

Every job is timed in turn, round after round, on copies of the layer that caches do not hold: wall time with all
threads, and the CPU time of one thread, which other processes disturb less. `--tiny` rehearses and writes nothing.

Shapes: N neurons, D width.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pages import fill
from torch.nn.functional import linear, silu

from moefy.models.quantised import GROUP, Quantised
from moefy.run.computing import machine
from moefy_kernels.cpu.experts import native_experts
from moefy_kernels.cpu.library import flags, instruction_set
from moefy_kernels.cpu.quantised import Judge, PackedMlp, pack_map, pack_mlp

RECORD = Path("benchmarks/records/cpu_codes.json")
PAGE = Path("docs/cpu.md")
SHAPES = {"SmolLM2-135M": (576, 1536), "7B": (4096, 11008)}
DENSITIES = (0.25, 0.5, 1.0)
DENSE = 2**26
"""Bytes of a bf16 layer in all its copies, at least: more than caches hold."""
Job = tuple[list[Callable[[], object]], float]
"""What is called in turn, and the bytes that one call reads."""


def matrix(neurons: int, width: int, bits: int, along: int = 1) -> Quantised:
    """Codes and scales at random."""
    shape = (neurons, width // GROUP) if along else (neurons // GROUP, width)
    scale, offset = (torch.randint(100, 255, shape, dtype=torch.uint8) for _ in range(2))
    codes_ND = torch.randint(0, 2**bits, (neurons, width), dtype=torch.uint8)
    most_O = torch.full((2, neurons if along else width), 1e-2).half()
    return Quantised(codes_ND, scale, offset, bits, along, most_O)


def layer(width: int, neurons: int, bits: int, planes: int) -> PackedMlp:
    """An MLP in codes, judged by its first bits."""
    gate, up = matrix(neurons, width, bits), matrix(neurons, width, bits)
    judge = None
    if planes:
        errors = torch.zeros(neurons), torch.ones(neurons)
        judge = Judge(
            planes=planes, gate=gate, up=up, size_N=torch.rand(neurons),
            gate_error_N=errors, up_error_N=errors,
        )  # fmt: skip
    return pack_mlp(gate, up, matrix(neurons, width, bits, 0), activation="silu", judge=judge)


def bytes_of(packed: PackedMlp, density: float) -> float:
    """What a token reads: all tiles, the records of the neurons that run, and the scales of down, of which nearly
    every group has one that runs; at density 0 the tiles alone."""
    held = {name: value.nbytes for name, value in packed.parts.items()}
    shared = held["down"] if density else 0
    return held.get("gate", 0) + held.get("up", 0) + shared + density * held["records"]


def jobs(width: int, neurons: int) -> dict[str, Job]:
    """All of a shape: the dense layers, the rough scores, the neurons that run."""
    copies = max(2, -(-DENSE // (6 * width * neurons)))
    x, made = torch.randn(1, width), {}
    sixteen = [[torch.randn(neurons, width).bfloat16() for _ in range(3)] for _ in range(copies)]
    x_bf16, all_on, whole = x.bfloat16(), torch.ones(1, 1), 6.0 * width * neurons
    made["torch, bf16"] = [
        lambda w=w: linear(silu(linear(x_bf16, w[0])) * linear(x_bf16, w[1]), w[2].T) for w in sixteen
    ], whole  # fmt: skip
    made["moefy, bf16"] = [
        lambda w=w: native_experts(x_bf16, all_on, w[2], "silu", w[0], w[1]) for w in sixteen
    ], whole  # fmt: skip
    for bits, planes in ((8, 0), (4, 0), (4, 2), (4, 3)):
        many = [layer(width, neurons, bits, planes) for _ in range(copies)]
        name = f"{bits} bits" + (f", {planes} planes" if planes else "")
        for density in DENSITIES:
            level = [p.scores(x).quantile(1 - density, dim=1) for p in many] if planes else []
            mask_1N = torch.rand(1, neurons, generator=torch.Generator().manual_seed(0)) < density
            if density == 1:
                calls = [lambda p=p: p(x) for p in many]
            elif planes:
                calls = [lambda p=p, t=t: p(x, t) for p, t in zip(many, level, strict=True)]
            else:
                calls = [lambda p=p, m=mask_1N: p(x, mask_TN=m) for p in many]
            made[f"{name}, density {density:g}"] = calls, bytes_of(many[0], density)
        if planes:
            made[f"{name}, scores"] = [lambda p=p: p.scores(x) for p in many], bytes_of(many[0], 0)
    for bits in (8, 4):
        maps = [pack_map(matrix(neurons, width, bits)) for _ in range(copies)]
        made[f"linear map, {bits} bits"] = (
            [lambda m=m: m(x) for m in maps],
            maps[0].parts[0].nbytes,
        )
    buffer = torch.ones(DENSE)
    made["read in fp32 (torch's sum)"] = [buffer.sum], buffer.nbytes
    return made


def timed(made: dict[str, Job], rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Medians and quartiles of a call, all jobs in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, (calls, _) in made.items():
            began = clock()
            for call in calls:
                call()
            seconds[name].append((clock() - began) / len(calls))
    return {name: statistics.quantiles(values, n=4) for name, values in seconds.items()}


def measure(rounds: int, shapes: dict[str, tuple[int, int]], tiny: bool) -> None:
    """Time every shape, and write the record."""
    rows: list[dict[str, Any]] = []
    threads = torch.get_num_threads()
    for shape, (width, neurons) in shapes.items():
        made = jobs(width, neurons)
        for count, clock in ((threads, time.perf_counter), (1, time.thread_time)):
            torch.set_num_threads(count)
            quartiles = timed(made, rounds, clock)
            for name, (low, middle, high) in quartiles.items():
                rows.append({
                    "shape": shape, "job": name, "threads": count, "clock": clock.__name__,
                    "seconds": middle, "quartiles": [low, high], "bytes": made[name][1],
                    "of_torch": quartiles["torch, bf16"][1] / middle,
                    "of_dense_4_bits": quartiles["4 bits, density 1"][1] / middle,
                })  # fmt: skip
        torch.set_num_threads(threads)
    name = instruction_set()
    record = {
        "kind": "cpu_codes", "rounds": rounds, "load": os.getloadavg(), "flags": flags(name), "rows": rows,
        "machine": machine(),
    }  # fmt: skip
    if not tiny:
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(shown(record))


def shown(record: dict[str, Any]) -> str:
    """The table of the page."""
    lines = [
        "| layer | what | threads | microseconds | quartiles | times torch's bf16 | times the dense 4-bit layer "
        "| GB/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    threads = max(row["threads"] for row in record["rows"])
    busy = record["load"][0] > threads
    for row in (row for row in record["rows"] if row["threads"] == 1 or not busy):
        low, high = (f"{1e6 * value:,.0f}" for value in row["quartiles"])
        lines.append(
            f"| {row['shape']} | {row['job']} | {row['threads']} | {1e6 * row['seconds']:,.0f} | {low} to {high} | "
            f"{row['of_torch']:.2f} | {row['of_dense_4_bits']:.2f} | {row['bytes'] / row['seconds'] / 1e9:.1f} |"
        )
    load = ", ".join(f"{value:.1f}" for value in record["load"])
    note = f"\nLoad of the machine when this was over: {load} (means of 1, 5 and 15 minutes)."
    if busy:
        note += f" Other processes ran: wall times of {threads} threads, which then wait for each other, are not shown."
    lines.append(note)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["measure", "table"])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if arguments.what == "measure":
        shapes = {name: SHAPES[name] for name in arguments.shapes}
        measure(arguments.rounds, {"tiny": (64, 96)} if arguments.tiny else shapes, arguments.tiny)
    else:
        fill(PAGE, "codes", shown(json.loads(RECORD.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
