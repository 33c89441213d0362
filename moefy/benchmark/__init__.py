"""Seconds, not FLOPs: dense and moefied side by side in one run, on three levels.

`levels` times the experts alone (`kernel`), the module with its router (`layer`), or prompt and cached decoding
of a whole model (`model`); `bench` is what the verb calls. Every engine is checked before it is timed, engines
take turns, and a difference within the noise is none. docs/bench.md says how to read it.
"""
