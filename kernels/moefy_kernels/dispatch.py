"""How long every path takes for a layer: one function of device, dtype, tokens, experts and expected union.

All paths compute the same function, so that the fastest may be taken. Each is expected to take its least time
(`roofline`) over the share of that limit which it reaches. Shares are measured per device and written
beside its configurations (`tables/<device>.json`, `reached`); a device without a table has the defaults
below, which are guesses. CPUs have times of their own (`cpu.times`). Nothing is measured or asked of the
device at run time.

Shapes: T tokens, D width, E experts.
"""

import functools
import math

from moefy_kernels import roofline
from moefy_kernels.cpu import times
from moefy_kernels.measured import table
from moefy_kernels.roofline import Device, Layer, Work

REACHED = {"masked": 0.8, "decode": 0.7, "union": 0.7, "grouped": 0.5}
"""Share of the limit that a path is taken to reach where none was measured."""
MOST = {"decode": 16, "union": 64}
"""Tokens that these paths are made for."""


def seconds(
    path: str,
    device: str,
    layer: Layer,
    tokens: int,
    density: float,
    share: float | None = None,
    threads: int = 1,
) -> float:
    """The time that a path is expected to take on a device: its name as torch gives it, or `cpu`.

    `density` is the share of experts that a token is expected to run, `share` that which any of the
    tokens runs (`union_share` of random routing, where it is not known); `threads` are those of a CPU.
    Infinite for more tokens than a path is made for.
    """
    if tokens > MOST.get(path, tokens):
        return math.inf
    if device == "cpu":
        return times.seconds(path, layer, tokens, density, share, threads)
    known = known_device(device)
    least = roofline.least_seconds(
        _work(path, layer, tokens, density, share), known, layer.itemsize
    )
    shares: dict[str, float] = {**REACHED, **table(device)["reached"]}
    return least / shares[path]


def _work(path: str, layer: Layer, tokens: int, density: float, share: float | None) -> Work:
    if path == "masked":
        return roofline.masked_dense(layer, tokens)
    share = roofline.union_share(density, tokens) if share is None else share
    if path == "union":
        return roofline.union(layer, tokens, density, share)
    if path == "decode":
        # What several tokens chose comes from L2 the second time, which is about twice as fast.
        read = share + (tokens * density - share) / 2
        flops = 2.0 * tokens * density * layer.parameters
        return Work(layer.reads(read, tokens), flops, 2)
    # Every expert adds to the rows of its tokens in fp32.
    added = 4.0 * tokens * density * layer.experts * layer.width
    work = roofline.grouped(layer, tokens, density, share)
    return work._replace(bytes=work.bytes + added)


@functools.cache
def known_device(name: str) -> Device:
    """What is known of a device; one that no row names is taken to be like an H100."""
    rows = {**roofline.PEAK, **roofline.MEASURED}
    for row in rows:
        if row.replace(" SXM", "").removesuffix("-80GB") in name:
            return rows[row]
    return rows["H100 SXM"]
