"""Experts, inputs and routing of any shape for the kernels, and what they should give in fp64."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

from moefy_kernels import reference
from moefy_kernels.decode import decode
from moefy_kernels.expert_mlp import ACTIVATIONS, ExpertMlp
from moefy_kernels.grouped import grouped
from moefy_kernels.union import union

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
"""Relative Frobenius error; bf16 is truncated by the interpreter, which doubles it."""
TF32 = 3e-3
"""The same of fp32 where torch is told to multiply in TF32, whose numbers are cut off at 10 bits."""


@dataclass(frozen=True)
class Case:
    """One MLP, inputs, and a list of experts with weights for every token."""

    x: Tensor
    mlp: ExpertMlp
    expert: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def matrix(self) -> Tensor:
        """The routing as weights `[T, E]`."""
        return reference.weights_of(self.expert, self.weight, None, self.mlp.experts)

    @property
    def wanted(self) -> Tensor:
        """The output in fp64."""
        wide = [v.double() if isinstance(v, Tensor) else v for v in self.mlp]
        bias = None if self.bias is None else self.bias.double()
        return reference.weighted(self.x.double(), ExpertMlp(*wide), self.matrix.double(), bias)

    def without(self, **changes) -> "Case":
        return replace(self, **changes)


def case(
    seed=0, tokens=3, width=40, experts=5, size=12, k=2, dtype=torch.float32, activation="silu",
    gated=True, biased=False, centred=False,
) -> Case:  # fmt: skip
    """Random numbers of the sizes that trained models have; every token lists `k` different experts."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=None):
        return (torch.randn(*shape, generator=g) * (scale or shape[-1] ** -0.5)).to(dtype)

    mlp = ExpertMlp(
        up_EFD=draw(experts, size, width),
        down_EFD=draw(experts, size, width),
        activation=activation,
        gate_EFD=draw(experts, size, width) if gated else None,
        up_bias_EF=draw(experts, size, scale=0.5) if biased else None,
        gate_bias_EF=draw(experts, size, scale=0.5) if biased and gated else None,
        centre_EF=draw(experts, size, scale=0.2) if centred else None,
    )
    order = torch.rand(tokens, experts, generator=g).argsort(1)
    return Case(
        x=draw(tokens, width, scale=1.0),
        mlp=mlp,
        expert=order[:, :k].to(torch.int32),
        weight=torch.rand(tokens, k, generator=g) + 0.5,
        bias=draw(width, scale=0.5) if biased else None,
    )


@st.composite
def cases(draw: Any, tokens: int) -> Case:
    """A case of any shape, of up to so many tokens, in fp32."""
    experts = draw(st.integers(1, 9))
    return case(
        seed=draw(st.integers(0, 10**6)),
        tokens=draw(st.integers(1, tokens)),
        width=draw(st.integers(3, 70)),
        experts=experts,
        size=draw(st.integers(1, 37)),
        k=draw(st.integers(1, experts)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        gated=draw(st.booleans()),
        biased=draw(st.booleans()),
        centred=draw(st.booleans()),
    )


def run(name: str, c: Case, matrix: Tensor | None = None) -> Tensor:
    """The output of `decode`, or of `union` or `grouped` with a matrix, which is the case's by default."""
    if name == "decode":
        return decode(c.x, c.mlp, c.expert, c.weight, None, c.bias)
    matrix = c.matrix if matrix is None else matrix
    return {"union": union, "grouped": grouped}[name](c.x, c.mlp, matrix, c.bias)


def views(c: Case) -> Case:
    """The same case, of halves of a fused matrix, a stock down projection and strided inputs."""
    size = c.mlp.size
    fused = torch.cat([c.mlp.gate_EFD, c.mlp.up_EFD], 1)
    stock_down = c.mlp.down_EFD.transpose(1, 2).contiguous()
    mlp = c.mlp._replace(
        gate_EFD=fused[:, :size], up_EFD=fused[:, size:], down_EFD=stock_down.transpose(1, 2)
    )
    x, expert, weight = (torch.stack([v, v], 2)[..., 0] for v in (c.x, c.expert.long(), c.weight))
    return c.without(x=x, mlp=mlp, expert=expert, weight=weight)


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error."""
    return float((got.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def far_apart(value_EFD: Tensor) -> Tensor:
    """The same experts, each 2**30 elements behind the one before: memory that is hardly ever touched."""
    experts, *rest = value_EFD.shape
    stride = (2**30 + 64, *value_EFD[0].contiguous().stride())
    whole = torch.empty((experts - 1) * stride[0] + value_EFD[0].numel(), dtype=value_EFD.dtype)
    return whole.as_strided((experts, *rest), stride).copy_(value_EFD)


@contextmanager
def tf32() -> Iterator[None]:
    """torch may multiply fp32 matrices in TF32."""
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@contextmanager
def matrix_units() -> Iterator[None]:
    """Let the interpreter multiply bf16, which it holds as integers, and TF32, of which it knows nothing.

    bf16 is multiplied in fp32. TF32 has the first 10 of the 23 bits behind the point of an fp32 number.
    """
    dot = interpreter.InterpreterBuilder.create_dot

    def read(handle, tf32):
        if handle.dtype.scalar == tl.bfloat16:
            value = (handle.data.astype("uint32") << 16).view("float32")
        elif handle.dtype.scalar == tl.float32 and tf32:
            value = (handle.data.view("uint32") & 0xFFFFE000).view("float32")
        else:
            return handle
        return interpreter.TensorHandle(value, tl.float32)

    def patched(self, a, b, total, precision, *rest):
        tf32 = precision.name == "TF32"
        return dot(self, read(a, tf32), read(b, tf32), total, precision, *rest)

    interpreter.InterpreterBuilder.create_dot = patched
    try:
        yield
    finally:
        interpreter.InterpreterBuilder.create_dot = dot
