"""How far rounding may take a layer's output from the exact one: what tells it from a fault.

The exact output is that of the same weights, on the same input and with the same experts, in fp64. An
engine rounds a number to the dtype of the weights, unit roundoff `u`, where it stores it, and adds up
products with unit roundoff `v` (that of fp32, or of fp64). Rounding errors are taken to be independent
and of mean zero. Then the sum of `n` products `p_i` is off by about `sqrt(n) v sum |p_i|` (Higham and
Mary, A new approach to probabilistic rounding error analysis, SIAM J. Sci. Comput. 41(5), 2019, which
replaces the `n` of Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1), and
errors of different neurons add up as their squares. To first order, with `g` the gate, `u'` up and `a =
act(g)`:

    e_g = sqrt(D) v |x| |G| + u/2 |g|                            and e_u' alike
    e_a = the largest |act(g +- e_g) - a|, + u/2 |a|
    e_h = e_a |u'| + |a| e_u' + u |h|
    e_y = | e_h d |_2 + sqrt(N_on) v sum |h| |d| + (1 + sqrt(K)) u/2 (|y| + |h d|_2)

`u/2` is about the standard deviation of a rounding of relative size at most `u`. The last term is what
engines lose that add up K experts in the dtype of the weights; partial sums of terms with signs at
random are of the size `|y| + |h d|_2`. Of a token the norm over its width is compared, where errors of
single numbers average out: `SLACK` is for what the model leaves out, not for chance.

Shapes: T tokens, D width, N neurons, E experts, C neurons of a chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moefy.benchmark.engines.table import Unavailable
from moefy.models.mlp import DenseMlp, activation_function

SLACK = 4.0
"""Times the expected error that is still rounding."""
CHUNK = 1024
"""Neurons that are widened to fp64 at a time, or those of one expert."""


@dataclass(frozen=True)
class Exact:
    """What a layer has to put out, and how far rounding may take an engine from it."""

    y_TD: Tensor
    bound_T: Tensor
    """Of the norm of a token's error."""


def exact(mlp: DenseMlp, x_TD: Tensor, mask_TE: Tensor, extra_TD: Tensor | None = None) -> Exact:
    """The experts of the mask on `x_TD` in fp64, with `extra_TD` added, and the bound of the docstring."""
    size = mlp.neurons // mask_TE.shape[1]
    step = size * max(1, CHUNK // size)
    on_TE, wide_TD = mask_TE.bool(), x_TD.double()
    unit = _unit(x_TD.dtype, mlp.down_ND.dtype)
    fine = min(unit, _unit(torch.float32))
    y_TD, size_TD, square_TD, error_TD = (torch.zeros_like(wide_TD) for _ in range(4))
    for first in range(0, mlp.neurons, step):
        rows = slice(first, min(first + step, mlp.neurons))
        on_TC = on_TE[:, first // size : rows.stop // size].repeat_interleave(size, 1)
        if not on_TC.any():
            continue
        part = mlp.take(rows).to(torch.float64)
        h_TC, off_TC = (value_TC * on_TC for value_TC in _hidden(part, wide_TD, unit, fine))
        y_TD += h_TC @ part.down_ND
        size_TD += h_TC.abs() @ part.down_ND.abs()
        square_TD += h_TC.square() @ part.down_ND.square()
        error_TD += off_TC.square() @ part.down_ND.square()
    for added in (mlp.down_bias_D, extra_TD):
        if added is not None:
            y_TD += added.double()
            square_TD += added.double().square()
    experts_T1 = on_TE.sum(1, keepdim=True)
    stored_TD = (1 + experts_T1**0.5) * unit / 2 * (y_TD.abs() + square_TD**0.5)
    summed_TD = (experts_T1 * size) ** 0.5 * fine * size_TD
    bound_T = SLACK * (error_TD**0.5 + summed_TD + stored_TD).norm(dim=1)
    return Exact(y_TD, bound_T + torch.finfo(x_TD.dtype).tiny * mlp.neurons)


def _hidden(mlp: DenseMlp, x_TD: Tensor, unit: float, fine: float) -> tuple[Tensor, Tensor]:
    """Activations `[T, C]` and how far they may be off; `mlp` and `x_TD` are in fp64."""

    summed = float(mlp.width) ** 0.5 * fine

    def off(value_TC: Tensor, weight_CD: Tensor) -> Tensor:
        off_TC: Tensor = summed * (x_TD.abs() @ weight_CD.abs().T) + unit / 2 * value_TC.abs()
        return off_TC

    act = activation_function(mlp.activation)
    at_TC = mlp.deciding(x_TD)
    active_TC, off_TC = act(at_TC), off(at_TC, mlp.selecting_ND)
    ends = [(act(at_TC + sign * off_TC) - active_TC).abs() for sign in (-1, 1)]
    off_TC = torch.maximum(*ends) + unit / 2 * active_TC.abs()
    if mlp.gate_ND is not None:
        up_TC = mlp.up(x_TD)
        off_TC = off_TC * up_TC.abs() + active_TC.abs() * off(up_TC, mlp.up_ND)
    h_TC = mlp.finish(active_TC, x_TD)
    centre = 0.0 if mlp.centre_N is None else mlp.centre_N.abs()
    return h_TC, off_TC + unit * (h_TC.abs() + centre)


def _unit(*dtypes: torch.dtype) -> float:
    """The unit roundoff of the coarsest."""
    return 0.5 * max(float(torch.finfo(dtype).eps) for dtype in dtypes)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; the former where that is all zeros."""
    got, want = got.double(), want.double()
    return float((got - want).norm()) / (float(want.norm()) or 1.0)


def checked(got_TD: Tensor, want: Exact) -> float:
    """The relative error of an output; raises `Unavailable` where rounding does not explain it."""
    if got_TD.shape != want.y_TD.shape:
        raise Unavailable(
            f"computes something else: an output of shape {tuple(got_TD.shape)}, not "
            f"{tuple(want.y_TD.shape)}"
        )
    error = relative_error(got_TD, want.y_TD)
    times_T = (got_TD.double() - want.y_TD).norm(dim=1) / want.bound_T
    if not bool((times_T <= 1).all()):
        token = int(times_T.nan_to_num(torch.inf).argmax())
        raise Unavailable(
            f"computes something else: relative error {error:.1e}, of token {token} "
            f"{float(times_T[token]):.1f} times what rounding explains"
        )
    return error
