"""Low-bit gate: every neuron's gate, read from a copy of very few bits, predicts its contribution.

A router has to guess which neurons will matter; the gate nearly says it, and a rough copy of the gate
is enough to rank neurons. The rows that decide (the gate, or up where there is none) are kept in
`bits` bits with one scale per 64 weights. A neuron scores

    |act(rough gate . x)| * c_j,    c_j = ||d_j|| * root mean square of u_j.x over a sample

(without a gate `c_j = ||d_j||`), which estimates the norm of its contribution and is the same in every
gauge; an expert scores the root of the sum of squares. Nothing is trained. What is read for a token is
`bits / 16` of the deciding matrix in memory traffic, though all of its products are computed:
`weights_read` counts the former, `products` the latter. CATS (Lee et al. 2024) reads the exact gate.

Shapes: T tokens, D width (padded to whole groups), N neurons, E routed experts, G groups of 64.
"""

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import linear, pad

from moefy.errors import RecipeError
from moefy.mlp import DenseMlp, activation_function
from moefy.routing.base import Router

GROUP = 64
BITS = (1, 2, 4)
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of a group's largest weight that are tried as the largest level."""

FLAT = frozenset({"relu", "relu2"})
"""Activations that are zero for every negative gate."""

ROWS = 4096
"""Neurons unpacked at a time."""


class LowBitRouter(Router):
    """Scores from a copy of the gate in 1, 2 or 4 bits a weight."""

    trainable = False
    codes_NP: Tensor
    scale_NG: Tensor
    size_N: Tensor

    def __init__(self, width: int, experts: int, neurons: int, bits: int) -> None:
        super().__init__()
        if bits not in BITS:
            raise RecipeError(f"router.bits: got {bits}, must be one of 1, 2, 4")
        groups = -(-width // GROUP)
        self.width, self.experts, self.bits = width, experts, bits
        packed = groups * GROUP * bits // 8
        self.register_buffer("codes_NP", torch.zeros(neurons, packed, dtype=torch.uint8))
        self.register_buffer("scale_NG", torch.zeros(neurons, groups, dtype=torch.float16))
        self.register_buffer("size_N", torch.zeros(neurons))

    @classmethod
    def make(cls, width: int, experts: int, hidden: int, neurons: int, bits: int) -> "LowBitRouter":
        """A router for these neurons; there is no hidden layer."""
        return cls(width, experts, neurons, bits)

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, whole: DenseMlp) -> None:
        """Quantise the rows and measure what their neurons carry on `x_TD`."""
        for first in range(0, mlp.neurons, ROWS):
            rows = slice(first, first + ROWS)
            codes, scale = quantise(mlp.selecting_ND[rows].float(), self.bits)
            self.codes_NP[rows], self.scale_NG[rows] = codes, scale
        size_N = vector_norm(mlp.down_ND.float(), dim=1)
        if mlp.gate_ND is not None:
            square_N = torch.zeros_like(size_N)
            for x in x_TD.split(1024):
                square_N += mlp.up(x).square().sum(0)
            size_N = size_N * (square_N / max(len(x_TD), 1)).sqrt()
        self.size_N.copy_(size_N)

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`; negative only for single neurons that seem to be off."""
        act, x_TD = activation_function(mlp.activation), x_TD.float()
        bias_N = mlp.up_bias_N if mlp.gate_ND is None else mlp.gate_bias_N
        parts = []
        for first in range(0, len(self.codes_NP), ROWS):
            rows = slice(first, first + ROWS)
            rough_ND = self.rough(rows)
            bias = None if bias_N is None else bias_N[rows].float()
            gate_TN = linear(x_TD, rough_ND, bias)
            value_TN = act(gate_TN)
            if mlp.activation in FLAT and self.experts == len(self.codes_NP):
                # Zero says nothing of how near a neuron is to being active: how negative it is, does.
                value_TN = value_TN - act(-gate_TN)
            parts.append(value_TN * self.size_N[rows].float())
        score_TN = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        if self.experts == len(self.codes_NP):
            return score_TN if mlp.activation in FLAT else score_TN.abs()
        score_TE: Tensor = vector_norm(score_TN.view(len(x_TD), self.experts, -1), dim=-1)
        return score_TE

    def rough(self, rows: slice = slice(None)) -> Tensor:
        """The rows that the codes stand for `[N, D]`, in fp32."""
        codes_NP, scale_NG = self.codes_NP[rows], self.scale_NG[rows]
        shifts = torch.arange(0, 8, self.bits, device=codes_NP.device, dtype=torch.uint8)
        levels = (codes_NP[..., None] >> shifts) & (2**self.bits - 1)
        levels = levels.view(len(codes_NP), -1, GROUP).float() - (2**self.bits - 1) / 2
        rough_NGK: Tensor = levels * scale_NG.float()[..., None]
        return rough_NGK.view(len(codes_NP), -1)[:, : self.width]

    def weights_read(self, mlp: DenseMlp) -> int:
        """Memory read, in weights of 16 bits: codes, scales and one size per neuron."""
        return self.codes_NP.numel() // 2 + self.scale_NG.numel() + len(self.size_N)

    def products(self, mlp: DenseMlp) -> int:
        """One for every weight of the deciding matrix."""
        return len(self.codes_NP) * self.width


def quantise(rows_ND: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes `[N, P]` (uint8, low bits first) and scales `[N, G]` (fp16) of least squared error.

    Levels are the odd multiples of half a scale, from `-(2^b - 1)/2` to `(2^b - 1)/2`: none is zero.
    """
    neurons, width = rows_ND.shape
    groups_NGK = pad(rows_ND, (0, -width % GROUP)).view(neurons, -1, GROUP)
    # What fills the last group up is never read: it must not draw the scale to itself.
    real_GK = pad(rows_ND.new_ones(width), (0, -width % GROUP)).view(-1, GROUP)
    top = (2**bits - 1) / 2
    largest_NG1 = groups_NGK.abs().amax(-1, keepdim=True)
    best_NG1 = torch.full_like(largest_NG1, torch.inf)
    scale_NG1 = torch.ones_like(largest_NG1)
    mean_NG1 = (groups_NGK.abs().sum(-1) / real_GK.sum(-1))[..., None]
    clips = (mean_NG1 * 2,) if bits == 1 else ()
    for trial_NG1 in (*clips, *(largest_NG1 * clip / top for clip in CLIPS)):
        # Scales are kept in 16 bits: what is compared is what will be read.
        trial_NG1 = trial_NG1.half().float()
        error_NG1 = (
            (_level(groups_NGK, trial_NG1, top) * trial_NG1 - groups_NGK)
            .square()
            .mul(real_GK)
            .sum(-1, keepdim=True)
        )
        better = error_NG1 < best_NG1
        best_NG1 = torch.where(better, error_NG1, best_NG1)
        scale_NG1 = torch.where(better, trial_NG1, scale_NG1)
    codes = (_level(groups_NGK, scale_NG1, top) + top).to(torch.uint8)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    packed = (codes.view(neurons, -1, len(shifts)) << shifts).sum(-1, dtype=torch.uint8)
    return packed, scale_NG1[..., 0].half()


def _level(groups: Tensor, scale: Tensor, top: float) -> Tensor:
    return ((groups / scale.clamp_min(1e-12) - 0.5).round() + 0.5).clamp(-top, top)
