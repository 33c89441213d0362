"""Kernels against dense and against transformers on a GPU: one layer, every regime, as ratios.

    python experiments/gpu_kernels.py OUT            # writes OUT/gpu_kernels.json
    python experiments/gpu_kernels.py OUT --tiny     # a few shapes, also on a CPU (interpreted): a rehearsal

Routing is random and uniform, and for batches at one density also that of real text (`real_routing`); the
share of experts that the batch runs together is printed beside what random routing is expected to run.
Every path of a cell is timed in one CUDA graph over several copies of the weights, which together are
larger than L2, so that every layer comes from memory; paths take turns, medians are kept. The limit beside
a time is that of the roofline with the copy bandwidth and the matrix rate measured in the same run.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from real_routing import text_lists, text_scores
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers.integrations.moe import batched_mm_experts_forward, grouped_mm_experts_forward

from moefy.experts.backends import fastest
from moefy.experts.backends.base import Workload
from moefy.run.computing import machine
from moefy_kernels import roofline
from moefy_kernels.decode import decode
from moefy_kernels.expert_mlp import ExpertMlp
from moefy_kernels.grouped import grouped
from moefy_kernels.measured import device_name
from moefy_kernels.roofline import Device, Layer
from moefy_kernels.routing import listed
from moefy_kernels.union import union

PATHS = ("masked", "decode", "union", "grouped")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = {"Llama-3-8B": (4096, 14336), "Llama-2-7B": (4096, 11008), "Qwen3-4B": (2560, 9728)}
SIZES, DENSITIES = (16, 32, 128, 512), (0.1, 0.25, 0.5)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096)
SOME_BATCHES = (1, 8, 64, 4096)
"""Of all shapes but the first, which has the whole grid."""
TEXT_DENSITY = 0.25
"""Where batches are routed like real text too; one token at a time does not tell."""
COLD = 300e6
"""Bytes of weights that a graph walks through at least: several times any L2."""
Run = Callable[[int], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    limits = device_limits(1 << 20 if args.tiny else 1 << 30, 64 if args.tiny else 8192)
    record: dict[str, Any] = {
        "kind": "GPU kernels", "limits": limits._asdict(), "cells": [], "machine": machine(),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    score_TM = text_scores(3, 88) if args.tiny else text_scores(max(BATCHES), 352)
    for cell in cells(args.tiny, limits, score_TM):
        record["cells"].append(cell)
        print(line(cell), flush=True)
        (args.out / "gpu_kernels.json").write_text(json.dumps(record, indent=1))


def device_limits(size: int, side: int) -> Device:
    """Copy bandwidth (read and written bytes) and bf16 rate of this device, measured."""
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target, square = torch.empty_like(source), torch.randn(side, side, device=DEVICE).bfloat16()
    copied = seconds({"copy": lambda _: target.copy_(source)}, 1)["copy"]
    multiplied = seconds({"product": lambda _: square @ square}, 1)["product"]
    known = roofline.PEAK["H100 SXM"]
    return Device(
        device_name(DEVICE), 2 * size / copied, 2 * side**3 / multiplied, known.fp32_flops
    )


def seconds(runs: dict[str, Run], copies: int, samples: int = 7) -> dict[str, float]:
    """Median seconds of one layer; each run walks through `copies` layers, in a graph where there are any."""
    replays = {name: captured(run, copies) for name, run in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(samples):
        for name, replay in replays.items():
            taken[name].append(timed(replay) / copies)
    return {name: statistics.median(values) for name, values in taken.items()}


def captured(run: Run, copies: int) -> Callable[[], object]:
    """All copies one after the other, as one CUDA graph."""

    def walk() -> None:
        for copy in range(copies):
            run(copy)

    if DEVICE.type != "cuda":
        return walk
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        walk()  # compiles, and allocates what is kept
        walk()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            walk()
    except RuntimeError:  # what waits for the host cannot be held by a graph, and is timed as it is
        torch.cuda.synchronize()
        return walk
    graph.replay()
    return graph.replay


def timed(call: Callable[[], object]) -> float:
    if DEVICE.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def cells(tiny: bool, limits: Device, score_TM: Tensor) -> Iterator[dict[str, Any]]:
    shapes = {"tiny": (64, 256)} if tiny else SHAPES
    for name, (width, neurons) in shapes.items():
        bytes_ = 3 * width * neurons * 2
        copies = 1 if tiny else max(2, round(COLD / bytes_ + 1))
        weights = [random_weights(width, neurons) for _ in range(copies)]
        whole = name == next(iter(SHAPES))
        for batch in (1, 3) if tiny else BATCHES if whole else SOME_BATCHES:
            dense = seconds(dense_runs(weights, batch, width), copies)
            for size in (32,) if tiny else SIZES:
                if neurons % size:
                    continue
                layer = Layer(width, neurons, size)
                for density in DENSITIES if whole else (TEXT_DENSITY,):
                    for routing, expert_TK in lists(layer, batch, density, score_TM):
                        found = cell(layer, weights, expert_TK.to(DEVICE), density, dense, limits)
                        yield {"shape": name, "routing": routing, **found}


def lists(
    layer: Layer, batch: int, density: float, score_TM: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Experts `[T, K]` by kind of routing: `random`, and `text` where that differs."""
    k = max(1, round(density * layer.experts))
    yield "random", torch.rand(batch, layer.experts).argsort(1)[:, :k].sort(1).values
    if batch > 1 and density == TEXT_DENSITY:
        yield "text", text_lists(score_TM[:batch], layer.experts, k)


def random_weights(width: int, neurons: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down rows `[N, D]` in bf16; gate and up are halves of one tensor, as experts have them."""
    gate, up, down = (torch.randn(neurons, width, device=DEVICE) for _ in range(3))
    return tuple((w / width**0.5).bfloat16() for w in (gate, up, down))  # type: ignore[return-value]


def dense_runs(weights: list[Any], batch: int, width: int) -> dict[str, Run]:
    """The dense layer, as it is and compiled."""
    x_TD = torch.randn(batch, width, device=DEVICE).bfloat16()
    stock = [(gate, up, down.T.contiguous()) for gate, up, down in weights]

    def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return linear(silu(linear(x, gate)) * linear(x, up), down)

    runs: dict[str, Run] = {"dense": lambda copy: mlp(x_TD, *stock[copy])}
    if DEVICE.type == "cuda":
        compiled = torch.compile(mlp, dynamic=False)
        runs["dense compiled"] = lambda copy: compiled(x_TD, *stock[copy])
    return runs


def cell(
    layer: Layer, weights: list[Any], expert_TK: Tensor, density: float, dense: dict[str, float],
    limits: Device,
) -> dict[str, Any]:  # fmt: skip
    """All paths for one layer and the experts of a batch."""
    batch = len(expert_TK)
    x_TD = torch.randn(batch, layer.width, device=DEVICE).bfloat16()
    mask_TE = torch.zeros(batch, layer.experts, dtype=torch.bool, device=DEVICE)
    mask_TE.scatter_(1, expert_TK, True)
    mlps = [ExpertMlp.of(layer.experts, "silu", up, down, gate) for gate, up, down in weights]
    times = {**dense, **seconds(runs_of(x_TD, mlps, expert_TK, mask_TE), len(weights))}
    best_dense = min(dense.values())
    share = float(mask_TE.any(0).float().mean())
    works = {
        "decode": roofline.decode(layer, expert_TK.tolist()),
        "union": roofline.union(layer, batch, density, share),
        "grouped": roofline.grouped(layer, batch, density, share),
        "dense": roofline.dense(layer, batch),
    }
    paths = tuple(path for path in PATHS if path in times) or PATHS
    return {
        "width": layer.width, "neurons": layer.neurons, "size": layer.size, "density": density,
        "batch": batch, "union": share, "union_at_random": roofline.union_share(density, batch),
        "seconds": times,
        "speedup": {path: best_dense / times[path] for path in times},
        "of_limit": {
            path: roofline.fraction_of_limit(times[path], work, limits)
            for path, work in works.items() if path in times
        },
        "bandwidth_share": {
            path: work.bytes / limits.bandwidth / times[path]
            for path, work in works.items() if path in times
        },
        "chosen": fastest(paths, Workload(limits.name, layer, batch, density, share)),
    }  # fmt: skip


def runs_of(
    x_TD: Tensor, mlps: list[ExpertMlp], expert_TK: Tensor, mask_TE: Tensor
) -> dict[str, Run]:
    """moefy's paths that serve this batch, and those of transformers."""
    batch, k = expert_TK.shape
    weight_TK = torch.ones(batch, k, device=DEVICE, dtype=x_TD.dtype)
    runs: dict[str, Run] = {
        "masked": lambda copy: masked(x_TD, mlps[copy], mask_TE),
    }
    if batch <= 16:
        runs["decode"] = lambda copy: decode(x_TD, mlps[copy], expert_TK)
        runs["decode from a mask"] = lambda copy: decode(x_TD, mlps[copy], listed(mask_TE)[0])
    if 1 < batch <= 64:
        runs["union"] = lambda copy: union(x_TD, mlps[copy], mask_TE)
    if batch >= 64:
        runs["grouped"] = lambda copy: grouped(x_TD, mlps[copy], mask_TE, most=k)
    stock = [stock_experts(mlp) for mlp in mlps]
    calls = {"batched_mm": batched_mm_experts_forward, "grouped_mm": grouped_mm_experts_forward}
    for name, call in calls.items():
        # They write a copy of every weight, or of every row, of all slots; beyond this none fits.
        slots = batch * k * mlps[0].size * mlps[0].width
        if DEVICE.type == "cuda" and slots <= 2**31 // (8 if name == "batched_mm" else 1):
            runs[name] = partial(stock_run, call, stock, x_TD, expert_TK, weight_TK)
    return runs


def masked(x_TD: Tensor, mlp: ExpertMlp, mask_TE: Tensor) -> Tensor:
    """All neurons, those of experts that are off set to zero."""
    assert mlp.gate_EFD is not None
    h_TN = silu(linear(x_TD, mlp.gate_EFD.flatten(0, 1))) * linear(x_TD, mlp.up_EFD.flatten(0, 1))
    h_TEF = h_TN.view(len(x_TD), mlp.experts, mlp.size) * mask_TE[:, :, None]
    return h_TEF.flatten(1) @ mlp.down_EFD.flatten(0, 1)


def stock_experts(mlp: ExpertMlp) -> SimpleNamespace:
    """What transformers' functions read of a module."""
    assert mlp.gate_EFD is not None
    return SimpleNamespace(
        gate_up_proj=torch.cat([mlp.gate_EFD, mlp.up_EFD], 1),
        down_proj=mlp.down_EFD.transpose(1, 2).contiguous(),
        num_experts=mlp.experts, has_gate=True, has_bias=False, has_post_expert_norm=False,
        is_transposed=False, is_concatenated=True, _is_expert_parallel=False,
        _apply_gate=lambda both: silu(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1],
    )  # fmt: skip


def stock_run(
    call: Callable[..., Tensor], stock: list[Any], x: Tensor, ids: Tensor, weight: Tensor, copy: int
) -> Tensor:
    return call(stock[copy], x, ids, weight)


def line(cell: dict[str, Any]) -> str:
    by = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in cell["speedup"].items())
    return (
        f"{cell['shape']} F={cell['size']} density {cell['density']} T={cell['batch']}, "
        f"{cell['routing']} routing, union {cell['union']:.3f} "
        f"(at random {cell['union_at_random']:.3f}): {by}; chosen {cell['chosen']}"
    )


if __name__ == "__main__":
    main()
