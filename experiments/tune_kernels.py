"""Find the fastest configuration of every kernel on this GPU, and what share of its limit every path reaches.

    python experiments/tune_kernels.py OUT            # writes OUT/<device>.json
    python experiments/tune_kernels.py OUT --tiny     # one shape and few candidates, also on a CPU: a rehearsal

The file goes to `kernels/moefy_kernels/tables/`, where it is found by the name of the device. Kernels are
tuned one after the other, each with the best configuration so far of the others, at one number of tokens
that stands for their regime; a candidate that does not compile or launch is passed over.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import DEVICE, SHAPES, SIZES, device_limits, random_weights, seconds

from moefy.run.computing import machine
from moefy_kernels import roofline
from moefy_kernels.configs import Config, analytic, shape_class
from moefy_kernels.decode import decode
from moefy_kernels.expert_mlp import ExpertMlp
from moefy_kernels.grouped import grouped
from moefy_kernels.measured import device_name, table
from moefy_kernels.roofline import Layer
from moefy_kernels.union import union

DENSITY = 0.25
PATHS: dict[str, tuple[int, tuple[str, ...]]] = {
    "decode": (1, ("decode_hidden", "decode_down")),
    "union": (8, ("union_hidden", "union_down")),
    "grouped": (4096, ("grouped_hidden", "grouped_scatter")),
}
"""Tokens that stand for the regime of a path, and the kernels that make it up."""
TRIED: dict[str, dict[str, tuple[int, ...]]] = {
    "decode_hidden": {"BLOCK_R": (4, 8, 16), "BLOCK_D": (256, 512, 1024), "num_warps": (2, 4, 8)},
    "decode_down": {"BLOCK_R": (32, 64, 128), "BLOCK_D": (32, 64, 128), "num_warps": (2, 4, 8)},
    "union_hidden": {"BLOCK_D": (64, 128), "num_stages": (2, 3, 4)},
    "union_down": {"BLOCK_R": (32, 64), "BLOCK_D": (64, 128), "num_stages": (2, 3, 4)},
    "grouped_hidden": {"BLOCK_F": (32, 64, 128), "num_stages": (2, 3, 4), "num_warps": (4, 8)},
    "grouped_scatter": {"BLOCK_D": (64, 128), "num_stages": (1, 2, 3), "num_warps": (4, 8)},
}
"""Values tried for what the analytic configuration sets; all combinations."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    name = device_name(DEVICE)
    limits = device_limits(1 << 20 if args.tiny else 1 << 30, 64 if args.tiny else 8192)
    found = table(name)  # what is written here is what the kernels look up
    reached: dict[str, list[float]] = {path: [] for path in PATHS}
    shapes = {"tiny": (64, 256)} if args.tiny else SHAPES
    for width, neurons in shapes.values():
        weights = [random_weights(width, neurons) for _ in range(1 if args.tiny else 2)]
        for size in (32,) if args.tiny else SIZES:
            if neurons % size:
                continue
            for path, (tokens, kernels) in PATHS.items():
                layer, tokens = Layer(width, neurons, size), 3 if args.tiny else tokens
                run = call(path, weights, layer, tokens)
                for kernel in kernels:
                    best, taken = tuned(kernel, layer, run, len(weights), args.tiny)
                    print(f"{kernel} {width}x{size}: {best} {taken * 1e6:.1f} us", flush=True)
                work = work_of(path, layer, tokens)
                reached[path].append(roofline.fraction_of_limit(taken, work, limits))
    found["reached"] = {path: round(statistics.median(v), 3) for path, v in reached.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"{name.replace(' ', '_')}.json"
    file.write_text(json.dumps({**found, "machine": machine()}, indent=1) + "\n")


def tuned(
    kernel: str, layer: Layer, run: Callable[[int], object], copies: int, tiny: bool
) -> tuple[Config, float]:
    """The fastest configuration of one kernel for a class of shapes, which stays in the table."""
    key = shape_class(layer.width, layer.size, torch.bfloat16)
    rows = table(device_name(DEVICE))["kernels"].setdefault(kernel, {})
    start = analytic(kernel, layer.width, layer.size, torch.bfloat16)
    best, least = start, float("inf")
    for config in itertools.islice(candidates(kernel, start), 2 if tiny else None):
        rows[key] = config
        try:
            taken = seconds({kernel: run}, copies, samples=1 if tiny else 5)[kernel]
        except Exception as error:
            print(f"  {kernel} {config}: {type(error).__name__}", flush=True)
            continue
        if taken < least:
            best, least = config, taken
    rows[key] = best
    return best, least


def candidates(kernel: str, start: Config) -> Iterator[Config]:
    """The analytic configuration, then every combination of the values tried."""
    yield start
    tried = TRIED[kernel]
    for values in itertools.product(*tried.values()):
        config = {**start, **dict(zip(tried, values, strict=True))}
        if config != start:
            yield config


def call(path: str, weights: list[Any], layer: Layer, tokens: int) -> Callable[[int], object]:
    """One path with random routing, on one copy of the weights."""
    k = max(1, round(DENSITY * layer.experts))
    x_TD = torch.randn(tokens, layer.width, device=DEVICE).bfloat16()
    expert_TK = torch.rand(tokens, layer.experts, device=DEVICE).argsort(1)[:, :k]
    mask_TE = torch.zeros(tokens, layer.experts, dtype=torch.bool, device=DEVICE)
    mask_TE.scatter_(1, expert_TK, True)
    mlps = [ExpertMlp.of(layer.experts, "silu", up, down, gate) for gate, up, down in weights]
    if path == "decode":
        return lambda copy: decode(x_TD, mlps[copy], expert_TK)
    if path == "union":
        return lambda copy: union(x_TD, mlps[copy], mask_TE)
    return lambda copy: grouped(x_TD, mlps[copy], mask_TE, most=k)


def work_of(path: str, layer: Layer, tokens: int) -> roofline.Work:
    if path == "decode":
        share = roofline.union_share(DENSITY, tokens)
        return roofline.Work(layer.reads(share, tokens), 2 * tokens * DENSITY * layer.parameters, 2)
    of = {"union": roofline.union, "grouped": roofline.grouped}[path]
    return of(layer, tokens, DENSITY)


if __name__ == "__main__":
    main()
