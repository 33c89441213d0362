"""Seconds, not FLOPs: dense and moefied side by side in one run, on three levels.

`bench_kernel` times the experts alone, `bench_layer` the module with its router, `bench_model` prompt and
cached decoding of a whole model; `bench` is what the verb calls. Every engine is checked before it is
timed, engines take turns, and a difference within the noise is none. docs/bench.md says how to read it.
"""

from moefy.bench.kernel import bench_kernel
from moefy.bench.layer import bench_layer
from moefy.bench.layers import Layers, Shape, synthetic
from moefy.bench.model import bench_model
from moefy.bench.request import bench, calibrate_for

__all__ = [
    "Layers",
    "Shape",
    "bench",
    "bench_kernel",
    "bench_layer",
    "bench_model",
    "calibrate_for",
    "synthetic",
]
