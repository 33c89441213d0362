"""Activations and their derivatives inside kernels, in fp32.

Only what the interpreter knows as well is used: tanh is made of a sigmoid.
"""

import triton
import triton.language as tl


@triton.jit
def activate(v, ACT: tl.constexpr):
    """`act(v)`."""
    if ACT == "silu":
        return v * tl.sigmoid(v)
    elif ACT == "gelu":
        return 0.5 * v * (1 + tl.erf(v * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 0.5 (1 + tanh(u)) = sigmoid(2u), u = sqrt(2 / pi) (v + 0.044715 v^3)
        return v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    elif ACT == "relu":
        return tl.maximum(v, 0.0)
    elif ACT == "relu2":
        return tl.maximum(v, 0.0) * tl.maximum(v, 0.0)
    else:
        tl.static_assert(ACT == "linear", "an activation that kernels do not know")
        return v


@triton.jit
def slope(v, ACT: tl.constexpr):
    """`act'(v)`; of ReLU at zero it is zero, as in torch."""
    if ACT == "silu":
        s = tl.sigmoid(v)
        return s * (1 + v * (1 - s))
    elif ACT == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * v * v)
        return 0.5 * (1 + tl.erf(v * 0.7071067811865476)) + v * density
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
        return s + v * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * v * v)
    elif ACT == "relu":
        return tl.where(v > 0, 1.0, 0.0)
    elif ACT == "relu2":
        return 2 * tl.maximum(v, 0.0)
    else:
        tl.static_assert(ACT == "linear", "an activation that kernels do not know")
        return tl.full(v.shape, 1.0, tl.float32)
