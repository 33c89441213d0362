"""CMoE's own carving: binary markers, seeds of highest rate, one exact balanced assignment.

Pei et al. 2025, as their code does it: with token, gate and up rows normalised, the 10 neurons of
largest `|act(g.x) (u.x)|` are a token's markers; the neurons marked most often are shared; the next
most often marked seed the routed experts; the others go to the nearest seed by L1 distance of marker
columns, sizes equal, by one solution of the assignment problem. The `markers` ranks by contribution and
iterates.

Shapes: T tokens, D model width, N neurons, E experts.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import linear, normalize

from moefy.methods.partition.balanced import assign
from moefy.models.mlp import DenseMlp, activation_function

MARKS = 10
EXACT_LIMIT = 4096
"""Most neurons for which the assignment is solved exactly (cubic); beyond, by prices and swaps."""


def marker_table(mlp: DenseMlp, x_TD: Tensor) -> Tensor:
    """1 where a neuron is among the `MARKS` strongest of the token, else 0: `[N, T]`."""
    act, x_TD = activation_function(mlp.activation), normalize(x_TD.float(), dim=-1)
    strength_TN = linear(x_TD, normalize(mlp.up_ND.float(), dim=-1))
    if mlp.gate_ND is None:
        strength_TN = act(strength_TN)
    else:
        strength_TN = act(linear(x_TD, normalize(mlp.gate_ND.float(), dim=-1))) * strength_TN
    leaders_TM = strength_TN.abs().topk(min(MARKS, mlp.neurons), dim=1).indices
    return torch.zeros_like(strength_TN).scatter_(1, leaders_TM, 1.0).T.contiguous()


def cmoe(
    mlp: DenseMlp, x_TD: Tensor, num_experts: int, seed: int, routed_N: Tensor | None = None
) -> Tensor:
    """Owner of each neuron in `routed_N` (all); markers are found among all neurons of `mlp`."""
    routed_N = torch.arange(mlp.neurons) if routed_N is None else routed_N
    marker_NT = marker_table(mlp, x_TD)[routed_N]
    rate_N = marker_NT.mean(1)
    seeds_E = rate_N.topk(num_experts).indices
    # Binary columns: |a - b| summed is |a| + |b| - 2 a.b
    cost_NE = (
        rate_N[:, None]
        + rate_N[seeds_E]
        - 2 / marker_NT.shape[1] * (marker_NT @ marker_NT[seeds_E].T)
    )
    if len(routed_N) > EXACT_LIMIT:
        return assign(cost_NE)
    size = len(routed_N) // num_experts
    row, column = linear_sum_assignment(cost_NE.double().repeat_interleave(size, dim=1).numpy())
    owner_N = torch.empty(len(routed_N), dtype=torch.int64)
    owner_N[torch.from_numpy(row)] = torch.from_numpy(column) // size
    return owner_N
