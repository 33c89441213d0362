"""The least time that a device needs for an operation: bytes over bandwidth, arithmetic over its rate, launches.

Bytes are those that have to come from memory at least once: the weights of every expert that any token
runs, the input and the output. Activations between two launches stay in caches. Arithmetic is what the
operation computes, two per multiplication, padding left out. A kernel that reaches the limit does not
exist; the fraction of it that one reaches says what is left to gain.

Shapes: T tokens, D width, N neurons, E experts, F = N/E neurons per expert, K experts that a token runs.
"""

from collections.abc import Sequence
from typing import NamedTuple

GRAPH_LAUNCH = 2e-6
"""Seconds from one kernel of a CUDA graph to the next that waits for it: assumed, not measured."""


class Device(NamedTuple):
    """What a GPU does at most."""

    name: str
    bandwidth: float
    """Bytes of its memory per second."""
    bf16_flops: float
    """Arithmetic per second of its matrix units in 16 bits, dense, fp32 sums."""
    fp32_flops: float
    """The same in fp32 without matrix units of fewer bits."""
    launch: float = GRAPH_LAUNCH
    """Seconds between dependent launches."""


PEAK = {
    device.name: device
    for device in (
        # NVIDIA A100 80GB SXM data sheet.
        Device("A100-80GB", 2.039e12, 312e12, 19.5e12),
        # NVIDIA H100 SXM data sheet; the rates it prints for bf16 are with sparsity, twice these.
        Device("H100 SXM", 3.35e12, 989.5e12, 67e12),
        # NVIDIA H200 SXM data sheet, likewise.
        Device("H200", 4.8e12, 989.5e12, 67e12),
        # AMD Instinct MI300X data sheet; fp32 by its matrix units.
        Device("MI300X", 5.3e12, 1307.4e12, 163.4e12),
    )
}
"""Published peaks, which nothing reaches."""

MEASURED = {
    # One run on one machine: a copy of device memory, and a bf16 product of 8192 x 8192 matrices.
    "H200": PEAK["H200"]._replace(bandwidth=4.3e12, bf16_flops=788e12),
}
"""What plain copies and products reached: the fp32 rate is still the published one."""


class Work(NamedTuple):
    """What an operation has to do."""

    bytes: float
    flops: float
    launches: int

    def then(self, other: "Work") -> "Work":
        """This operation and another after it."""
        return Work(
            self.bytes + other.bytes, self.flops + other.flops, self.launches + other.launches
        )


class Layer(NamedTuple):
    """An MLP in experts of `size` neurons."""

    width: int
    neurons: int
    size: int
    matrices: int = 3
    """3 with a gate, 2 without."""
    itemsize: int = 2
    """Bytes of a weight and of an activation."""

    @property
    def experts(self) -> int:
        """E."""
        return self.neurons // self.size

    @property
    def parameters(self) -> int:
        """Weights of all experts."""
        return self.matrices * self.width * self.neurons

    def reads(self, share: float, tokens: float) -> float:
        """Bytes of a share of the weights, and of input and output of some tokens."""
        return self.itemsize * (share * self.parameters + 2 * tokens * self.width)


def union_share(density: float, tokens: int) -> float:
    """Share of the experts that any of the tokens runs, if each runs `density` of them at random.

    `1 - (1 - K/E)^T`. Tokens of real text agree more than that: measure, where there is a model.
    """
    return 1 - (1 - density) ** tokens


def dense(layer: Layer, tokens: int) -> Work:
    """All neurons for all tokens: two or three products and the activation, a launch each."""
    flops = 2.0 * tokens * layer.parameters
    return Work(layer.reads(1, tokens), flops, layer.matrices + 1)


def masked_dense(layer: Layer, tokens: int) -> Work:
    """As dense, and a mask `[T, E]` of one byte each, applied with the activation."""
    work = dense(layer, tokens)
    return work._replace(bytes=work.bytes + tokens * layer.experts)


def decode(layer: Layer, expert_TK: Sequence[Sequence[int]]) -> Work:
    """`decode` with these lists: experts that several tokens chose come from memory once."""
    chosen = [expert for listed in expert_TK for expert in listed if 0 <= expert < layer.experts]
    share = len(set(chosen)) / layer.experts
    flops = 2.0 * layer.parameters * len(chosen) / layer.experts
    return Work(layer.reads(share, len(expert_TK)), flops, 2)


def union(layer: Layer, tokens: int, density: float, share: float | None = None) -> Work:
    """`union`: every expert of the union for every token, after a launch that lists them.

    `share` is the share of experts in the union, where it is known; otherwise `union_share`.
    """
    share = union_share(density, tokens) if share is None else share
    flops = 2.0 * tokens * share * layer.parameters
    return Work(layer.reads(share, tokens), flops, 3)


def grouped(layer: Layer, tokens: int, density: float, share: float | None = None) -> Work:
    """`grouped`: every expert for its own tokens, after the launches that list these.

    `share` as in `union`. Ten launches: the lists, seven small ones of PyTorch around them and
    around the output in fp32, and two for the products.
    """
    share = union_share(density, tokens) if share is None else share
    flops = 2.0 * tokens * density * layer.parameters
    return Work(layer.reads(share, tokens), flops, 10)


def routing(layer: Layer, tokens: int, hidden: int | None = None) -> Work:
    """A linear router `[E, D]` that chooses in its own launch, or one with a hidden layer, in three."""
    weights = layer.width * layer.experts
    if hidden is not None:
        weights = hidden * (layer.width + layer.experts)
    read = layer.itemsize * (weights + tokens * layer.width) + 4 * tokens * layer.experts
    return Work(read, 2.0 * tokens * weights, 1 if hidden is None else 3)


def least_seconds(work: Work, device: Device, itemsize: int = 2) -> float:
    """The least time of an operation whose weights have `itemsize` bytes; its launches lie in a row."""
    rate = device.bf16_flops if itemsize == 2 else device.fp32_flops
    busy = max(work.bytes / device.bandwidth, work.flops / rate)
    return work.launches * device.launch + busy


def fraction_of_limit(seconds: float, work: Work, device: Device, itemsize: int = 2) -> float:
    """How near a measured time is to the least one; more than 1 says that the model is wrong.

    Such as: weights in L2 from the call before, which a cold measurement throws out.
    """
    return least_seconds(work, device, itemsize) / seconds


def limited_by(work: Work, device: Device, itemsize: int = 2) -> str:
    """What takes most of the least time: `launches`, `bandwidth` or `arithmetic`."""
    rate = device.bf16_flops if itemsize == 2 else device.fp32_flops
    parts = {
        "launches": work.launches * device.launch,
        "bandwidth": work.bytes / device.bandwidth,
        "arithmetic": work.flops / rate,
    }
    return max(parts, key=lambda name: parts[name])
