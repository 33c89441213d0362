"""Bit planes: the top bits of gate and up of every neuron say how large its contribution will be.

A weight of a few bits carries its own router: the first b bits of its code (`moefy.models.quantised`) are
a rounding of it, and what is read to choose need not be read again to compute. Gate and up are both
judged: in the gated MLPs of an LLM the gate alone is a poor judge (docs/real_llm.md).

The score is the root of the *expected* square of the contribution, given the rough values `g~`, `u~`, whose
errors have the variances `v_g`, `v_u` over a sample:

    s_j^2 = (act(g~)^2 + act'(g~)^2 v_g) (u~^2 + v_u) size_j^2

A neuron whose rough value is near zero by chance is so not taken for one that is off. `size_j` is
`||d_j||`, or, where the metric G of the layer's output is known (`weigh`), `sqrt(d_j^T G d_j)`: `s_j^2` is
then what leaving the neuron out is expected to cost in nats, and one threshold serves all layers (ours; the
metric is half the Fisher matrix, `moefy.conversion.backward`).

Shapes: T tokens, D width, N neurons, E routed experts, G groups of 32 inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import linear

from moefy.errors import RecipeError
from moefy.methods.base import WIDE_BITS, RoughCodes, Router
from moefy.methods.routers.gates import FLAT
from moefy.models.locate import Site
from moefy.models.mlp import DenseMlp, activation_function
from moefy.models.quantised import GROUP, Quantised, quantise

CODE_BITS = 4
"""Bits of codes that are made for the router alone, of weights that have none."""
_STEP = 1e-2
"""Distance on either side over which the slope of an activation is measured."""
FEW = 16
"""Tokens of a pass for which rows that planes stand for are kept for the next."""
_CHUNK = 1024
"""Tokens at a time in fitting."""
_PARTS = ("codes", "scale", "offset", "most")


class BitPlanesRouter(Router):
    """Bit planes: gate and up of every neuron from the top bits of their codes.

    Scores by the expected square of every neuron's contribution.
    """

    @dataclass(frozen=True, kw_only=True)
    class Settings(Router.Settings):
        """`router.bits` of a recipe: the planes that are read, 1 to 3."""

        bits: int = 2
        gated: bool = True
        """Whether there is a gate to read; a conversion sets it, and the next."""
        codes: int = CODE_BITS
        """Bits of the codes whose top bits are read: those of the weights, if they are stored in codes."""

        def __post_init__(self) -> None:
            """Refuse planes that the codes do not have."""
            if not 1 <= self.bits <= self.codes <= 8:
                raise RecipeError(
                    f"router.bits: got {self.bits}, bit_planes reads 1 to {self.codes} of codes of "
                    f"{self.codes} bits"
                )

    trainable = False
    weighs = True
    size_N: Tensor

    def __init__(
        self, width: int, experts: int, neurons: int, bits: int, gated: bool, codes: int
    ) -> None:
        super().__init__()
        self.width, self.experts, self.bits, self.codes = width, experts, bits, codes
        self.matrices = ("gate", "up") if gated else ("up",)
        groups = -(-width // GROUP)
        for matrix in self.matrices:
            buffers = {
                "codes": torch.zeros(bits, neurons, -(-width // 8), dtype=torch.uint8),
                "scale": torch.zeros(neurons, groups, dtype=torch.uint8),
                "offset": torch.zeros(neurons, groups, dtype=torch.uint8),
                "most": torch.zeros(2, neurons, dtype=torch.float16),
                "error": torch.zeros(2, neurons),
            }
            for name, zeros in buffers.items():
                self.register_buffer(f"{matrix}_{name}", zeros)
        self.register_buffer("size_N", torch.zeros(neurons))
        self._rows: dict[str, tuple[object, Tensor]] = {}

    @classmethod
    def planned(cls, site: Site, given: Mapping[str, Any], density: float) -> Router.Settings:
        """The settings of a recipe, whether this MLP has a gate, and how its weights are stored."""
        stored = given.get("codes", WIDE_BITS)
        codes = stored if stored < WIDE_BITS else CODE_BITS
        return cls.settings({**given, "settings": {"gated": site.gated, "codes": codes}})

    @classmethod
    def make(
        cls, width: int, experts: int, neurons: int, given: Mapping[str, Any]
    ) -> "BitPlanesRouter":
        """A router of `bits` planes."""
        return cls(width, experts, neurons, **vars(cls.settings(given)))

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, whole: DenseMlp) -> None:
        """Take the planes of the neurons, and measure on `x_TD` how far their rough values are off."""
        self.size_N.copy_(vector_norm(mlp.down_ND.float(), dim=1))
        for matrix in self.matrices:
            rows_ND = getattr(mlp, f"{matrix}_ND").float()
            self._take_planes(mlp, matrix)
            difference_ND = rows_ND - self._planes(matrix).rough(self.bits)
            sums = torch.zeros(2, len(rows_ND), device=rows_ND.device)
            for x in x_TD.float().split(_CHUNK):
                error_TN = linear(x, difference_ND)
                sums += torch.stack([error_TN.sum(0), error_TN.square().sum(0)])
            self.get_buffer(f"{matrix}_error").copy_(sums / max(len(x_TD), 1))

    def _take_planes(self, mlp: DenseMlp, matrix: str) -> None:
        codes = mlp.stored.matrix(matrix) if mlp.stored and self.nested(mlp) else None
        if codes is None or codes.most_O is None:
            codes = quantise(getattr(mlp, f"{matrix}_ND").float(), self.codes)
        for name, value in codes.tensors().items():
            planes = value[: self.bits] if name == "codes" else value
            self.get_buffer(f"{matrix}_{name}").copy_(planes)

    def follow(self, mlp: DenseMlp) -> None:
        """Take the planes of the weights as they are stored now; how far rough values are off stays as measured."""
        for matrix in self.matrices:
            self._take_planes(mlp, matrix)

    def weigh(self, mlp: DenseMlp, metric_DD: Tensor) -> None:
        """Sizes of down rows in the metric: a score is then the root of an expected cost in nats."""
        down_ND, metric_DD = mlp.down_ND.float(), metric_DD.to(mlp.down_ND.device)
        product_ND = down_ND @ metric_DD if metric_DD.ndim else down_ND * metric_DD
        square_N = (product_ND * down_ND).sum(1)
        self.size_N.copy_(square_N.clamp_min(0).sqrt())

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`, never negative; of an expert the root of the sum of squares."""
        act, x_TD = activation_function(mlp.activation), x_TD.float()
        decided_TN, variance_N = self._rough(x_TD, mlp, self.matrices[0])
        # By a difference, since transformers' activations have no derivative to call; of those that are flat
        # below zero as wide as the error is, since a neuron that seems to be off may be on.
        step = variance_N.clamp_min(1e-12).sqrt() if mlp.activation in FLAT else _STEP
        slope_TN = (act(decided_TN + step) - act(decided_TN - step)) / (2 * step)
        value_TN = act(decided_TN)
        if mlp.gate_ND is None and mlp.centre_N is not None:
            value_TN = value_TN - mlp.centre_N
        square_TN = value_TN.square() + slope_TN.square() * variance_N
        if len(self.matrices) == 2:
            up_TN, variance_N = self._rough(x_TD, mlp, "up")
            square_TN = square_TN * (up_TN.square() + variance_N)
        score_TN = square_TN.sqrt() * self.size_N
        if self.experts == len(self.size_N):
            return score_TN
        score_TE: Tensor = vector_norm(score_TN.unflatten(1, (self.experts, -1)), dim=-1)
        return score_TE

    def _rough(self, x_TD: Tensor, mlp: DenseMlp, matrix: str) -> tuple[Tensor, Tensor]:
        """Rough outputs `[T, N]` of a matrix, free of their mean error, and the variance of the rest `[N]`."""
        mean_N, variance_N = self._error(matrix)
        bias_N: Tensor | None = getattr(mlp, f"{matrix}_bias_N")
        bias_N = mean_N if bias_N is None else mean_N + bias_N.float()
        return linear(x_TD, self._rough_rows(matrix, len(x_TD)), bias_N), variance_N

    def _error(self, matrix: str) -> tuple[Tensor, Tensor]:
        """Mean and variance `[N]` of what the planes of a matrix leave out."""
        mean_N, square_N = self.get_buffer(f"{matrix}_error")
        # Of errors that hardly vary the difference may round to below zero, and its root be no number.
        return mean_N, (square_N - mean_N.square()).clamp_min(0)

    def _rough_rows(self, matrix: str, tokens: int) -> Tensor:
        """Rows `[N, D]` in fp32 that the planes of a matrix stand for.

        For few tokens, as in decoding, they are kept until the planes change: in fp32 they take as much memory
        as the matrix has in two bf16 copies, which a pass over many tokens can make anew.
        """
        codes = self.get_buffer(f"{matrix}_codes")
        key = (codes.data_ptr(), 0 if codes.is_inference() else codes._version, codes.device)
        held = self._rows.get(matrix)
        if held is not None and held[0] == key:
            return held[1]
        rows_ND = self._planes(matrix).rough(self.bits)
        if tokens <= FEW:
            self._rows[matrix] = key, rows_ND
        return rows_ND

    def _planes(self, matrix: str) -> Quantised:
        tensors = {name: self.get_buffer(f"{matrix}_{name}") for name in _PARTS}
        top = tensors["codes"]
        rest = top.new_zeros(self.codes - self.bits, *top.shape[1:])
        return Quantised.of_tensors({**tensors, "codes": torch.cat([top, rest])}, self.width, 1)

    def __getstate__(self) -> dict[str, Any]:
        """Copies make their own rows of the planes."""
        return {**self.__dict__, "_rows": {}}

    def rough_codes(self) -> RoughCodes | None:
        """What `forward` scores by, where experts are single neurons."""
        if self.experts != len(self.size_N):
            return None
        errors = {matrix: self._error(matrix) for matrix in self.matrices}
        matrices = {matrix: self._planes(matrix) for matrix in self.matrices}
        return RoughCodes(self.bits, matrices, errors, self.size_N)

    def nested(self, mlp: DenseMlp) -> bool:
        """Whether its planes are the top bits of the codes that the weights are stored in."""
        return mlp.stored is not None and mlp.stored.bits == self.codes

    def weights_read(self, mlp: DenseMlp) -> int:
        """What is read, in weights of 16 bits."""
        return round(self.bits_read(mlp) / WIDE_BITS)

    def bits_read(self, mlp: DenseMlp) -> float:
        """Planes and scales, mean error and variance of every rough value, and the sizes; in 16 bits each."""
        numbers = len(self.size_N) * (1 + 2 * len(self.matrices))
        return self._planes_read(mlp) + WIDE_BITS * numbers

    def bits_reused(self, mlp: DenseMlp) -> float:
        """Planes and scales, where they are those of the weights themselves."""
        return self._planes_read(mlp) if self.nested(mlp) else 0

    def _planes_read(self, mlp: DenseMlp) -> float:
        scales = 16 / GROUP + 2 * WIDE_BITS / self.width
        if mlp.stored is not None and self.nested(mlp):
            scales = mlp.stored.overhead("up")
        return len(self.matrices) * len(self.size_N) * self.width * (self.bits + scales)

    def products(self, mlp: DenseMlp) -> int:
        """One for every weight of gate and up."""
        return len(self.matrices) * len(self.size_N) * self.width
