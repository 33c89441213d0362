"""Time every partition method at the shape of a large MLP, and record it.

    python experiments/bench_partition.py                          # N=14336, D=4096, E=64 and 448
    python experiments/bench_partition.py --note "machine busy"    # say what else was running

Weights and tokens are drawn from a normal distribution: the hardest case for clustering, which has
nothing to find, and synthetic, so the inertia only shows how methods and versions compare. Seconds
are of one call to `partition`, canonical form and hidden activations included. CPU seconds are
recorded too: on a busy machine they say more than the clock.
"""

import argparse
import json
import os
import platform
import resource
import time
from pathlib import Path

import numpy
import torch
from torch.nn.functional import normalize

from moefy.methods.partition import METHODS, READS_TOKENS, partition, signals
from moefy.methods.partition.balanced import inertia
from moefy.models.mlp import DenseMlp

LIMITS = {64: 60, 448: 300}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--neurons", type=int, default=14336)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--experts", type=int, nargs="+", default=sorted(LIMITS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--methods", nargs="+", default=sorted(METHODS))
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument(
        "--record", type=Path, default=Path("benchmarks/records/partition_scaling.json")
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    random = torch.Generator().manual_seed(options.seed)
    weight_ND = {
        name: torch.randn(options.neurons, options.width, generator=random) / options.width**0.5
        for name in ("gate_ND", "up_ND", "down_ND")
    }
    mlp = DenseMlp(activation="silu", **weight_ND)
    x_TD = torch.randn(options.tokens, options.width, generator=random)
    used = len(signals.sample(x_TD, options.neurons))
    gate_ND = normalize(weight_ND["gate_ND"], dim=1)

    rows = []
    print(
        f"{'method':14}{'E':>6}{'seconds':>10}{'CPU s':>9}{'limit s':>9}  inertia of gate rows / N"
    )
    for experts in options.experts:
        for method in options.methods:
            clock, cpu = time.perf_counter(), time.process_time()
            found = partition(mlp, x_TD, experts=experts, method=method, seed=options.seed)
            clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
            assert torch.bincount(found.owner_N).tolist() == [options.neurons // experts] * experts
            row = {
                "method": method,
                "experts": experts,
                "seconds": round(clock, 2),
                "cpu_seconds": round(cpu, 2),
                "limit_seconds": LIMITS.get(experts),
                "tokens": used if method in READS_TOKENS else 0,
                "gate_inertia_per_neuron": round(
                    inertia(gate_ND, found.owner_N, experts) / options.neurons, 5
                ),
            }
            rows.append(row)
            limit = row["limit_seconds"] or "-"
            print(
                f"{method:14}{experts:6}{clock:10.1f}{cpu:9.1f}{limit:>9}"
                f"  {row['gate_inertia_per_neuron']}",
                flush=True,
            )
    record = {
        "what": "seconds of one call to moefy.methods.partition.partition on synthetic normal weights",
        "neurons": options.neurons,
        "width": options.width,
        "tokens_given": options.tokens,
        "tokens_used": used,
        "seed": options.seed,
        "threads": options.threads,
        "cores": os.cpu_count(),
        "note": options.note,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "results": rows,
    }
    options.record.parent.mkdir(parents=True, exist_ok=True)
    options.record.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {options.record}")


if __name__ == "__main__":
    main()
