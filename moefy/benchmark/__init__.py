"""Seconds, not FLOPs: dense and moefied side by side in one run, on three levels.

`bench_kernel` times the experts alone, `bench_layer` the module with its router, `bench_model` prompt and
cached decoding of a whole model; `bench` is what the verb calls. Every engine is checked before it is
timed, engines take turns, and a difference within the noise is none. docs/bench.md says how to read it.
"""
