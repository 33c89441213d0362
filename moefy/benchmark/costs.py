"""What a run costs: bytes and parameters, counted from masks; seconds, of several runs side by side.

Bytes are the least there is to move: the weights of every expert that any token of the batch runs, what
routes them, the input and the output. Copies that an engine makes on the way are its own loss.

`mlp_share` measures how much of a dense model's time its MLPs take, and `amdahl` what experts may gain by
it (G. M. Amdahl, Validity of the single processor approach to achieving large scale computing
capabilities, AFIPS 1967): with a share `s` of the time that takes `d` of it afterwards, all is
`1 / (1 - s + s d)` as fast.

Runs that are timed take turns in an order that changes with every sample, so that drift and neighbours hit
all alike. What is compared are medians; their error is found by drawing whole samples again, the same ones of
both runs (a paired bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).

`read_bandwidth` is what every other figure of bytes per second is held against. On a CPU all threads read
buffers that no cache holds, in turn, by a sum and by a product with a vector, and the best counts. On a
GPU it is a copy, whose bytes are read and written.

Shapes: T tokens, E experts, D width, G samples, C calls of a sample, R resamples.
"""

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.evaluation.statistics import ends, resampled
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.models.locate import sites
from moefy.run.memory import free_memory


def union(mask_TE: Tensor) -> float:
    """Share of the experts that any token runs."""
    return float(mask_TE.bool().any(0).float().mean())


def density(mask_TE: Tensor) -> float:
    """Share of the experts that a token runs, on average."""
    return float(mask_TE.bool().float().mean())


def expert_tensors(module: SparseMlp, share: float, *, routed: bool) -> list[tuple[float, int]]:
    """Numbers and bytes of each, of every tensor that a share of the experts reads.

    With `routed`, gates that the router computes are its own, not theirs.
    """
    mlp = module.weights
    computed = mlp.selecting_ND if routed and module.computes_gate else None
    rows = (mlp.up_ND, mlp.gate_ND, mlp.down_ND, mlp.up_bias_N, mlp.gate_bias_N)
    read = [v for v in rows if v is not None and v is not computed]
    tensors = [(share * value.numel(), value.element_size()) for value in read]
    bias = mlp.down_bias_D
    return tensors if bias is None else [*tensors, (bias.numel(), bias.element_size())]


def dense_parameters(module: SparseMlp) -> float:
    """Parameters of the dense MLP."""
    return sum(count for count, _ in expert_tensors(module, 1, routed=False))


def routing_bytes(module: SparseMlp, mask_TE: Tensor) -> float:
    """Bytes that router and compensation read, once for all tokens.

    A router whose tensors are all read counts with them; one that reads other weights (columns of the
    gate, say) with the figure of its active budget, in the dtype of the layer.
    """
    stored = list(module.router.state_dict().values())
    read = module.router.weights_read(module.weights)
    plain = read == sum(value.numel() for value in stored)
    router = sum(v.nbytes for v in stored) if plain else read * module.dtype.itemsize
    sizes = [value.element_size() for value in module.compensation.state_dict().values()]
    return router + _compensation(module, mask_TE) * max(sizes, default=0)


def layer_bytes(module: SparseMlp, mask_TE: Tensor, *, whole: bool, routed: bool) -> float:
    """Bytes of one layer for a batch.

    `whole` is for engines that compute every neuron; `routed` adds router and compensation.
    """
    tensors = expert_tensors(module, 1 if whole else union(mask_TE), routed=routed)
    ends = 2 * len(mask_TE) * module.width * module.dtype.itemsize
    return _bytes(tensors) + ends + (routing_bytes(module, mask_TE) if routed else 0)


def active_parameters(module: SparseMlp, mask_TE: Tensor, *, routed: bool) -> float:
    """Parameters of one layer that a token uses, on average: those of the active budget."""
    weights = sum(count for count, _ in expert_tensors(module, density(mask_TE), routed=routed))
    if not routed:
        return weights
    return weights + module.router.weights_read(module.weights) + _compensation(module, mask_TE)


def model_bytes(model: PreTrainedModel, tokens: int, masks: Sequence[Tensor] = ()) -> float:
    """Bytes of a model's weights for one pass over `tokens` tokens, with these masks of its SparseMlps.

    Of a table of embeddings only the rows looked up, unless it is the output projection too.
    """
    head: Any = model.get_output_embeddings()
    output = None if head is None else head.weight
    total = float(sum(value.nbytes for value in _others(model)))
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is not output:
            unread = max(0, module.num_embeddings - tokens)
            total -= unread * module.embedding_dim * module.weight.element_size()
    for layer, mask_TE in zip(sparse_mlps(model).values(), masks, strict=True):
        total += _bytes(expert_tensors(layer, union(mask_TE), routed=True))
        total += routing_bytes(layer, mask_TE)
    return total


def model_parameters(model: PreTrainedModel, masks: Sequence[Tensor] = ()) -> float:
    """Parameters of a model that a token uses, with these masks of its SparseMlps."""
    layers = zip(sparse_mlps(model).values(), masks, strict=True)
    active = sum(active_parameters(layer, mask_TE, routed=True) for layer, mask_TE in layers)
    return sum(value.numel() for value in _others(model)) + active


def _others(model: nn.Module) -> list[Tensor]:
    """All parameters but those of SparseMlps."""
    inside = {id(p) for layer in sparse_mlps(model).values() for p in layer.parameters()}
    return [p for p in model.parameters() if id(p) not in inside]


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values that a cache holds."""
    held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(value.nbytes for value in held if isinstance(value, Tensor))


def _compensation(module: SparseMlp, mask_TE: Tensor) -> float:
    """Weights that the compensation reads for one token."""
    return module.compensation.weights_read(density(mask_TE) * module.experts - module.shared)


def _bytes(tensors: list[tuple[float, int]]) -> float:
    return sum(count * size for count, size in tensors)


def mlp_share(model: PreTrainedModel, steps: Sequence[Callable[[], object]]) -> float | None:
    """Share of the time of `steps`, passes of a dense model on a CPU, that its MLPs take.

    Their median; reading the clock around every MLP is in the time of both. None on a GPU,
    where the host does not wait for what it starts.
    """
    if model.device.type != "cpu":
        return None
    shares = []
    with _clocked(model) as spent:
        for step in steps:
            spent.clear()
            began = time.perf_counter()
            step()
            shares.append(sum(spent) / (time.perf_counter() - began))
    return median(shares)


@contextmanager
def _clocked(model: PreTrainedModel) -> Iterator[list[float]]:
    """Seconds of every pass through an MLP, as they are spent."""
    spent: list[float] = []
    began: dict[nn.Module, float] = {}

    def begin(module: nn.Module, _: Any) -> None:
        began[module] = time.perf_counter()

    def end(module: nn.Module, _: Any, __: Any) -> None:
        spent.append(time.perf_counter() - began.pop(module))

    handles = []
    for site in sites(model):
        # Families without a module for the MLP compute it in parts.
        paths = [site.module, *([site.act, site.path("down")] if site.act else [])]
        for module in map(model.get_submodule, paths):
            handles.append(module.register_forward_pre_hook(begin))
            handles.append(module.register_forward_hook(end))
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def amdahl(share: float, left: float) -> float:
    """How many times faster all is where a share of the time takes `left` of what it took."""
    return 1 / (1 - share + share * left)


Seconds = NDArray[np.float64]
LEAST_SAMPLES = 5
"""With fewer, resampling finds too little noise: 4 equal values are not rare."""
WARMUP = 2
CONFIDENCE = 0.99
"""Of many rows of a table one in a hundred that is called different need not be."""
FLOOR = 0.01
"""No interval is narrower to either side: where memory happens to lie does not change within a run, so
that no resampling of it shows what another run would give."""


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Run:
    """Calls that are made one after the other and timed one by one."""

    calls: Sequence[Callable[[], object]]
    before: Callable[[], object] = _nothing
    """Brings back the state that the calls start from; not timed."""

    def __call__(self) -> list[object]:
        """What the calls return, from the state they start from."""
        self.before()
        return [call() for call in self.calls]


def side_by_side(
    runs: Mapping[str, Run], samples: int, *, warmup: int = WARMUP, seed: int = 0
) -> dict[str, Seconds]:
    """Seconds `[G, C]` of every call of every run, after `warmup` samples that are thrown away."""
    for run in runs.values():
        for _ in range(warmup):
            run()
    order = random.Random(seed)
    taken: dict[str, list[list[float]]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for _ in range(samples):
            for name in order.sample(list(runs), len(runs)):
                runs[name].before()
                taken[name].append(_timed(runs[name].calls))
    finally:
        gc.enable()
    return {name: np.array(rows) for name, rows in taken.items()}


def _timed(calls: Sequence[Callable[[], object]]) -> list[float]:
    """Seconds of each call; on a GPU by its own clock, so that no call waits for the host."""
    if not torch.cuda.is_available():
        marks = [time.perf_counter()]
        for call in calls:
            call()
            marks.append(time.perf_counter())
        return [end - begin for begin, end in pairwise(marks)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for call, event in zip(calls, events[1:], strict=True):
        call()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(events)]


def percentiles(seconds: Seconds) -> dict[str, float]:
    """`p50` (the median) and `p95` of all calls."""
    return {f"p{share}": float(np.quantile(seconds, share / 100)) for share in (50, 95)}


@dataclass(frozen=True)
class Ratio:
    """How many times faster one run is than another, and between what the noise leaves it."""

    value: float
    low: float
    high: float

    @property
    def is_none(self) -> bool:
        """Whether the two may well be equally fast."""
        return self.low <= 1 <= self.high

    def record(self) -> dict[str, Any]:
        """JSON values; `speedup` is None if there is no difference, `ratio` what was measured."""
        speedup = None if self.is_none else self.value
        return {"speedup": speedup, "ratio": self.value, "interval": [self.low, self.high]}


def speedup(run_GC: Seconds, base_GC: Seconds, seed: int = 0) -> Ratio:
    """The median of `base` over that of `run`, with the interval of this ratio."""
    at_RG = resampled(len(run_GC), seed)
    value = float(np.median(base_GC) / np.median(run_GC))
    drawn_R = np.median(base_GC[at_RG], axis=(1, 2)) / np.median(run_GC[at_RG], axis=(1, 2))
    low, high = ends(value, drawn_R, level=CONFIDENCE)
    least = 1 + FLOOR
    return Ratio(value, min(float(low), value / least), max(float(high), value * least))


BUFFERS, BYTES = 4, 256 << 20
"""Buffers, and bytes of each: together several times the caches of any CPU of today."""
ROUNDS = 4
WIDTH = 4096


def read_bandwidth(device: torch.device) -> dict[str, Any]:
    """`bytes_per_second` of the fastest read, and `how` it was measured, in words.

    Buffers are smaller where memory is short.
    """
    passes: list[list[Callable[[], object]]]
    if device.type == "cuda":
        source = torch.empty(BYTES, dtype=torch.uint8, device=device)
        passes, size = [[partial(torch.empty_like(source).copy_, source)]], 2 * source.nbytes
        how = f"a copy of {BYTES >> 20} MB of device memory, read and written bytes"
    else:
        rows = max(1, min(BYTES, free_memory() // (2 * BUFFERS)) // (4 * WIDTH))
        buffers, vector = [torch.ones(rows, WIDTH) for _ in range(BUFFERS)], torch.ones(WIDTH)
        passes = [[partial(torch.sum, buffer) for buffer in buffers]]
        passes += [[partial(torch.mv, buffer, vector) for buffer in buffers]]
        size = sum(buffer.nbytes for buffer in buffers)
        how = (
            f"{torch.get_num_threads()} threads read {BUFFERS} buffers of {buffers[0].nbytes >> 20} MB in "
            "turn: the best of sums and products with a vector"
        )
    best = min(sum(_timed(calls)) for calls in passes for _ in range(ROUNDS))
    return {"bytes_per_second": size / best, "how": how}
