"""What computes the experts of a mask: one row a backend, all of them the same function.

    name = choose(Request(x_TD, weights, mask_TE), density=0.25)
    y_TD = BACKENDS[name].compute(x_TD, weights, mask_TE)

A new backend is a function and a row of `BACKENDS`, there before the first pass: it can then be asked for by name
(`module.backend`), `auto` chooses it where it is expected to be fastest, and `moefy bench` times it.

Shapes: T tokens, D width, E experts.
"""

import functools
import math
from collections.abc import Callable
from importlib.util import find_spec

import torch

from moefy.errors import MoefyError, unknown_choice
from moefy.experts.backends import cpu
from moefy.experts.backends.base import CPU, GPU, Backend, Request, Workload
from moefy_kernels import dispatch, expert_views_mlp, masked_mlp
from moefy_kernels.cpu.library import constant
from moefy_kernels.measured import device_name
from moefy_kernels.roofline import Layer

LEAST_VIEW = 8
"""Smallest experts that are worth a matrix product of their own."""


def _expected(path: str) -> Callable[[Workload], float]:
    """The time that a path of `moefy_kernels` is expected to take."""

    def seconds(work: Workload) -> float:
        if (work.exact and path == "grouped") or (path == "views" and work.layer.size < LEAST_VIEW):
            return math.inf
        return dispatch.seconds(path, *work[:-1])

    return seconds


BACKENDS: dict[str, Backend] = {
    "masked": Backend(compute=masked_mlp, seconds=_expected("masked"), trains=True, in_graph=True),
    "views": Backend(
        compute=expert_views_mlp, seconds=_expected("views"), devices=frozenset({CPU})
    ),
    "native": Backend(
        compute=cpu.native_backend,
        seconds=_expected("native"),
        serves=cpu.serves,
        devices=frozenset({CPU}),
        in_graph=True,
        instead="views",
    ),
}
if find_spec("triton") is not None:
    from moefy.experts.backends import gpu

    BACKENDS |= {
        name: Backend(
            compute=compute,
            seconds=_expected(name),
            serves=gpu.serves,
            devices=frozenset({GPU}),
            trains=name == "grouped",
        )
        for name, compute in (
            ("decode", gpu.decode_experts),
            ("union", gpu.union_experts),
            ("grouped", gpu.grouped_experts),
        )
    }


def named(name: str, request: Request) -> str:
    """The row called `name`, or the one that stands in for it where it does not serve.

    Raises `MoefyError` if no row has that name.
    """
    if name not in BACKENDS:
        raise MoefyError(unknown_choice("backend", name, [*BACKENDS, "auto"]))
    return name if BACKENDS[name].serves(request) is None else BACKENDS[name].instead


def choose(request: Request, density: float) -> str:
    """The row that is expected to be fastest of those that serve.

    `density` is the share of the experts that a token is expected to run: what is counted with where the
    mask cannot be looked at, on a GPU (which would be waited for) and in a graph (which cannot hold it).
    """
    if request.x_TD.device.type == CPU:
        return _on_cpu(request, density)
    return on_gpu(request, density)


def on_gpu(request: Request, density: float) -> str:
    """`choose` for a GPU."""
    names = able(request, GPU)
    if len(names) == 1:
        return names[0]
    exact = torch.are_deterministic_algorithms_enabled()
    device, tokens = device_name(request.x_TD.device), request.x_TD.shape[0]
    return fastest(names, Workload(device, request.layer, tokens, density, exact=exact))


def _on_cpu(request: Request, density: float) -> str:
    graph, tokens, mask_TE = torch.compiler.is_compiling(), request.x_TD.shape[0], request.mask_TE
    names = able(request, CPU, graph)
    if len(names) == 1:
        return names[0]
    if graph:
        known = isinstance(tokens, int)
        return _in_graph(names, tokens, density, *request.layer) if known else names[0]
    density = share = int(mask_TE.count_nonzero()) / mask_TE.numel()
    if tokens > 1:
        share = int(mask_TE.any(0).sum()) / mask_TE.shape[1]
    threads = torch.get_num_threads()
    work = Workload(CPU, request.layer, tokens, about(density), about(share), threads)
    return fastest(names, work)


def able(request: Request, device: str = CPU, graph: bool = False) -> tuple[str, ...]:
    """The rows that `auto` chooses among, `masked` first; `graph` is one of `torch.compile`."""
    names = _meant_for(device, request.learns, graph)
    return tuple([name for name in names if BACKENDS[name].serves(request) is None])


@constant
def _meant_for(device: str, learns: bool, graph: bool) -> tuple[str, ...]:
    """The rows for such a pass, whatever the layer."""
    return tuple(
        name
        for name, row in BACKENDS.items()
        if device in row.devices and (row.trains or not learns) and (row.in_graph or not graph)
    )


@functools.lru_cache(4096)
def fastest(names: tuple[str, ...], work: Workload) -> str:
    """The one of these rows that is expected to take the least time."""
    return min(names, key=lambda name: BACKENDS[name].seconds(work))


@constant
def _in_graph(names: tuple[str, ...], tokens: int, density: float, *layer: int) -> str:
    """The same on a CPU; of numbers alone, since `torch.compile` holds the answer."""
    threads = torch.get_num_threads()
    return fastest(names, Workload(CPU, Layer(*layer), tokens, density, threads=threads))


def about(share: float) -> float:
    """Rounded to a tenth of itself, so that few choices are told apart; never to 0."""
    return min(1.0, math.exp(round(10 * math.log(max(share, 1e-4))) / 10))
