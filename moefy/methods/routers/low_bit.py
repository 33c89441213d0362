"""Low-bit gate: every neuron's gate, read from a copy of very few bits, predicts its contribution.

The rows that decide (the gate, or up without one) are kept in `bits` bits with one scale per
64 weights: rough, and good enough to rank neurons by (ours; `moefy.methods.routers.gates` for the score).
What is read for a token is `bits / 16` of the deciding matrix in memory traffic, though all of its
products are computed: `weights_read` counts the former, `products` the latter.

Shapes: T tokens, D width (padded to whole groups), N neurons, P bytes of a row, G groups of 64.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from moefy.errors import RecipeError
from moefy.methods.routers.gates import RoughGateRouter
from moefy.models.mlp import DenseMlp

GROUP = 64
BITS = (1, 2, 4)
CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""Shares of a group's largest weight that are tried as the largest level."""

ROWS = 4096
"""Neurons unpacked at a time."""


class LowBitRouter(RoughGateRouter):
    """Low-bit gate: every neuron's gate, read from a copy of very few bits, predicts its contribution."""

    @dataclass(frozen=True, kw_only=True)
    class Settings(RoughGateRouter.Settings):
        """`router.bits` of a recipe."""

        bits: int = 2

        def __post_init__(self) -> None:
            """Refuse what does not fill bytes."""
            if self.bits not in BITS:
                raise RecipeError(f"router.bits: got {self.bits}, must be one of 1, 2, 4")

    codes_NP: Tensor
    scale_NG: Tensor

    def __init__(self, width: int, experts: int, neurons: int, bits: int) -> None:
        super().__init__(experts, neurons)
        groups = -(-width // GROUP)
        self.width, self.bits = width, bits
        packed = groups * GROUP * bits // 8
        self.register_buffer("codes_NP", torch.zeros(neurons, packed, dtype=torch.uint8))
        self.register_buffer("scale_NG", torch.zeros(neurons, groups, dtype=torch.float16))

    @classmethod
    def make(
        cls, width: int, experts: int, neurons: int, given: Mapping[str, Any]
    ) -> "LowBitRouter":
        """A router of `bits` bits a weight."""
        return cls(width, experts, neurons, **vars(cls.settings(given)))

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, whole: DenseMlp) -> None:
        """Quantise the rows and measure what their neurons carry on `x_TD`."""
        super().initialise(mlp, x_TD, whole)
        for first in range(0, mlp.neurons, ROWS):
            rows = slice(first, first + ROWS)
            codes, scale = quantise(mlp.selecting_ND[rows].float(), self.bits)
            self.codes_NP[rows], self.scale_NG[rows] = codes, scale

    def rough(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Gates of the rows that the codes stand for `[T, N]`, in fp32."""
        x_TD, bias_N = x_TD.float(), mlp.deciding_bias_N
        gate_TN = torch.cat(
            [
                linear(x_TD, self.rows(slice(first, first + ROWS)))
                for first in range(0, len(self.codes_NP), ROWS)
            ],
            dim=1,
        )
        return gate_TN if bias_N is None else gate_TN + bias_N.float()

    def rows(self, rows: slice = slice(None)) -> Tensor:
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
