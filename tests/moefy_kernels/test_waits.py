"""No operation waits for the GPU: each runs its own code on tensors that have a shape and no values.

What asks such a tensor (of the device `meta`) for a value, for a shape that depends on values, or for a copy
on the host gets an error. A custom operation would hide its code behind a shape function, so `Bodies`
runs the code in its place; launches are noted, not run. The same on a GPU: `test_kernels_gpu.py`.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from moefy_kernels import decode, grouped, grouped_backward, routing, union
from moefy_kernels.expert_mlp import ExpertMlp
from moefy_kernels.neuron import neuron

BODIES = {
    "decode": decode._decode,
    "union": union._union,
    "grouped": grouped._grouped,
    "grouped_backward": grouped_backward.gradients,
    "route": routing._route,
    "select": routing._select,
    "listed": routing._listed,
}


class Bodies(TorchDispatchMode):
    """moefy's operations run their own code, and no tensor leaves `meta`."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "moefy":
            with self:
                return BODIES[func._opname]._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and not value.is_meta:
                raise RuntimeError(f"{func} gives a tensor on the {value.device}")
        return result


@pytest.fixture
def launched(monkeypatch):
    """Names of kernels in the order of their launches."""
    names: list[str] = []

    def note(self, *args, grid, warmup, **constants):
        assert all(type(side) is int and side > 0 for side in grid)
        assert not any(isinstance(value, Tensor) for value in constants.values())
        names.append(self.fn.__name__)

    monkeypatch.setattr(InterpretedFunction, "run", note)
    return names


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


class Given:
    """12 tokens and an MLP with everything that it may have."""

    def __init__(self, experts=8, size=16):
        self.x, self.bias = empty(12, 64), empty(64)
        up, down, gate = (empty(experts, size, 64) for _ in range(3))
        vectors = (empty(experts, size) for _ in range(3))
        self.mlp = ExpertMlp(up, down, "silu", gate, *vectors)
        self.expert, self.count = empty(12, 3, dtype=torch.int32), empty(12, dtype=torch.int32)
        self.weight, self.matrix = empty(12, 3), empty(12, experts)
        self.mask = empty(12, experts, dtype=torch.bool)
        self.router, self.router_bias = empty(experts, 64), empty(experts)

    def decode(self):
        return decode.decode(self.x, self.mlp, self.expert, self.weight, self.count, self.bias)

    def union(self):
        return union.union(self.x, self.mlp, self.mask, self.bias)

    def grouped(self):
        return grouped.grouped(self.x, self.mlp, self.mask, self.bias)

    def gradients(self):
        leaves = [self.x, *(v for v in self.mlp if isinstance(v, Tensor)), self.matrix, self.bias]
        for leaf in leaves:
            leaf.requires_grad_()
        y = grouped.grouped(self.x, self.mlp, self.matrix, self.bias, 3)
        return torch.autograd.grad(y, leaves, torch.empty_like(y))

    def route(self):
        return routing.route(self.x, self.router, self.router_bias, tau=0.5)

    def select(self):
        return routing.select(self.matrix, k=3)

    def listed(self):
        return routing.listed(self.mask), routing.listed(self.matrix, together=True)

    def neuron(self):
        return neuron(self.x, self.mlp, self.matrix, 0.5, None, self.bias)


DECODE, UNION = ["decode_hidden", "decode_down"], ["routing_list", "union_hidden", "union_down"]
GROUPED = ["list_tokens", "grouped_hidden", "grouped_scatter"]
BACKWARD = ["list_tokens", "grouped_slopes", "grouped_scatter", "grouped_outer", "grouped_outer"]
MANY = routing.WIDEST + 1
"""More experts than kernels list: the twins run."""


@pytest.mark.parametrize(
    ("name", "given", "kernels"),
    [
        ("decode", {}, DECODE),
        ("union", {}, UNION),
        ("grouped", {}, GROUPED),
        ("gradients", {}, GROUPED + BACKWARD),
        ("route", {}, ["routing_route"]),
        ("select", {}, ["routing_select"]),
        ("listed", {}, ["routing_list"] * 2),
        ("neuron", {"size": 1}, ["routing_select", *DECODE]),
        ("route", {"experts": routing.FUSED + 1, "size": 1}, ["routing_select"]),
        ("select", {"experts": MANY, "size": 1}, []),
        ("listed", {"experts": MANY, "size": 1}, []),
        ("union", {"experts": MANY, "size": 1}, []),
    ],
)
def test_nothing_asks_for_a_value(launched, name, given, kernels):
    g = Given(**given)
    with Bodies():
        getattr(g, name)()
    assert launched == kernels


READS = {
    "item": lambda v: v.sum().item(),
    "bool": lambda v: bool(v.any()),
    "list": lambda v: v.tolist(),
    "nonzero": lambda v: v.nonzero(),
    "mask": lambda v: v[v > 0],
    "copy": lambda v: v.cpu(),
    "constant": lambda v: v * torch.arange(v.shape[-1]),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("name", BODIES)
def test_a_read_by_the_host_is_found(launched, monkeypatch, name, read):
    def reading(*args):
        READS[read](args[0])
        return body(*args)

    body = BODIES[name]._init_fn
    monkeypatch.setitem(BODIES, name, SimpleNamespace(_init_fn=reading))
    with Bodies(), pytest.raises(RuntimeError, match=r"meta|tensor on the cpu"):
        getattr(Given(), {"grouped_backward": "gradients"}.get(name, name))()
