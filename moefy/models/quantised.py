"""Weights on a grid: codes of few bits, with a scale and an offset for every 32 inputs of an output.

    q = quantise(mlp.gate_ND, 4)                  # rounds to the nearest
    q.values()                                    # what is computed with
    q.rough(2)                                    # what the two top bits of every code say

A value is `scale * code - offset`. Scales and offsets of a group are themselves 8-bit numbers of which
the largest of an output is kept in 16 bits (as in the K formats of GGUF), or, with `scale_bits=16`, in
fp16 each (as in its Q4_1). The bits of a code are ordered: the first b of them are a coarser rounding of
the same weight, so that whatever reads them alone needs no copy of its own.

Matrices are neuron-major, as everywhere in moefy. Inputs of gate and up are the D columns of a neuron's
row; inputs of down are the neurons: its groups are 32 neurons that follow each other (`along=0`).

Shapes: N neurons, D width, G groups along the inputs, O outputs (N of gate and up, D of down), P bytes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

GROUP = 32
"""Inputs that share a scale and an offset."""
_TOP = 255
"""Largest 8-bit scale or offset."""
GROUPED = {"up": 1, "gate": 1, "down": 0}
"""The matrices of an MLP, and along which axis of `[N, D]` their groups run."""


@dataclass(frozen=True)
class Quantised:
    """One matrix `[N, D]` on a grid."""

    codes_ND: Tensor
    """uint8, from 0 to `2**bits - 1`."""
    scale: Tensor
    """`[N, G]`, or `[G, D]` along neurons: fp16, or uint8 in 255ths of `most_O[0]`."""
    offset: Tensor
    """As `scale`, of `most_O[1]`; what is subtracted."""
    bits: int
    along: int = 1
    """1 if groups run along the columns, 0 along the rows."""
    most_O: Tensor | None = None
    """fp16 `[2, O]`: the largest scale and the largest offset of an output, where those have 8 bits."""

    @property
    def inputs(self) -> int:
        """Inputs of every output."""
        return self.codes_ND.shape[self.along]

    @property
    def scale_bits(self) -> float:
        """Bits a weight of all that is not its code."""
        each = 2 * self.scale.element_size() * 8 * self.scale.shape[self.along]
        return (each + (0 if self.most_O is None else 32)) / self.inputs

    @property
    def bits_per_weight(self) -> float:
        """Bits that are stored of a weight, all counted."""
        return self.bits + self.scale_bits

    def values(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights `[N, D]` that the codes stand for."""
        return self._of(self.codes_ND.float()).to(dtype)

    def rough(self, planes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The middle of all weights `[N, D]` whose codes begin with the same `planes` bits."""
        step = 2 ** (self.bits - planes)
        middle_ND = (self.codes_ND // step).float() * step + (step - 1) / 2
        return self._of(middle_ND).to(dtype)

    def scales(self) -> tuple[Tensor, Tensor]:
        """Scale and offset of every group in fp32, shaped as `scale`."""
        scale, offset = self.scale.float(), self.offset.float()
        if self.most_O is None:
            return scale, offset
        unit_scale, unit_offset = (self.most_O.float() / _TOP).unsqueeze(1 + self.along)
        return scale * unit_scale, offset * unit_offset

    def _of(self, codes_ND: Tensor) -> Tensor:
        scale, offset = (
            s.repeat_interleave(GROUP, self.along).narrow(self.along, 0, self.inputs)
            for s in self.scales()
        )
        return codes_ND * scale - offset

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps: `codes` packed in planes `[bits, N, P]`, the top bit of every code first."""
        shift = torch.arange(self.bits - 1, -1, -1, dtype=torch.uint8)
        planes_BND = (self.codes_ND[None] >> shift.view(-1, 1, 1)) & 1
        eights = pad(planes_BND, (0, -planes_BND.shape[2] % 8)).unflatten(2, (-1, 8))
        packed = (eights << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
        parts = {"codes": packed, "scale": self.scale, "offset": self.offset}
        return parts if self.most_O is None else {**parts, "most": self.most_O}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor], width: int, along: int) -> "Quantised":
        """The matrix of `width` columns that `tensors` was made of."""
        packed = tensors["codes"]
        bits = len(packed)
        planes = (packed[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
        planes_BND = planes.flatten(2)[..., :width]
        weight = 2 ** torch.arange(bits - 1, -1, -1, dtype=torch.uint8)
        codes_ND = (planes_BND * weight.view(-1, 1, 1)).sum(0, dtype=torch.uint8)
        return cls(codes_ND, tensors["scale"], tensors["offset"], bits, along, tensors.get("most"))

    def take(self, neurons: slice) -> "Quantised":
        """A run of neurons (views); of down it begins and ends at a group."""
        if self.along == 0:
            groups = slice(_group(neurons.start or 0), _up(neurons.stop))
            return self._part(self.codes_ND[neurons], groups, self.most_O)
        most_O = None if self.most_O is None else self.most_O[:, neurons]
        return self._part(self.codes_ND[neurons], neurons, most_O)

    def _part(self, codes_ND: Tensor, rows: slice, most_O: Tensor | None) -> "Quantised":
        return Quantised(
            codes_ND, self.scale[rows], self.offset[rows], self.bits, self.along, most_O
        )


def _group(first: int) -> int:
    if first % GROUP:
        raise ValueError(f"neuron {first} is not the first of a group of {GROUP}")
    return first // GROUP


def _up(stop: int | None) -> int | None:
    return None if stop is None else -(-stop // GROUP)


def quantise(weight_ND: Tensor, bits: int, *, along: int = 1, scale_bits: int = 8) -> Quantised:
    """Round to the nearest of `2**bits` even steps from the smallest to the largest weight of a group.

    Zero is always within them. Codes are made with scale and offset as they are stored.
    """
    w = weight_ND.float()
    groups = _grouped(w, along)
    axis = along + 1
    low, high = groups.amin(axis).clamp_max(0), groups.amax(axis).clamp_min(0)
    scale, offset = (high - low) / (2**bits - 1), -low
    most_O = None
    if scale_bits == 8:
        most_O = torch.stack([s.amax(along) for s in (scale, offset)]).clamp(6e-8, 65504).half()
        unit_scale, unit_offset = (most_O.float() / _TOP).unsqueeze(1 + along)
        scale = (scale / unit_scale).round().clamp(1, _TOP).to(torch.uint8)
        offset = (offset / unit_offset).round().clamp(0, _TOP).to(torch.uint8)
    else:
        scale, offset = scale.clamp_min(6e-8).half(), offset.half()
    empty = Quantised(
        torch.zeros(w.shape, dtype=torch.uint8, device=w.device), scale, offset, bits, along, most_O
    )
    wide_scale, wide_offset = (s.unsqueeze(axis) for s in empty.scales())
    codes = ((groups + wide_offset) / wide_scale).round().clamp(0, 2**bits - 1)
    codes_ND = _flat(codes, along).narrow(along, 0, w.shape[along]).to(torch.uint8)
    return Quantised(codes_ND.contiguous(), scale, offset, bits, along, most_O)


def _grouped(w_ND: Tensor, along: int) -> Tensor:
    """`[N, G, 32]`, or along neurons `[G, 32, D]`; what fills the last group up is its last input."""
    missing = -w_ND.shape[along] % GROUP
    if missing:
        last = w_ND.narrow(along, w_ND.shape[along] - 1, 1)
        w_ND = torch.cat([w_ND, last.repeat_interleave(missing, along)], along)
    groups: Tensor = w_ND.unflatten(along, (-1, GROUP))
    return groups


def _flat(groups: Tensor, along: int) -> Tensor:
    return groups.flatten(along, along + 1)


@dataclass(frozen=True)
class QuantisedMlp:
    """The matrices of one MLP as a file keeps them: `up.codes`, `up.scale`, ..., packed in planes.

    Nothing in it changes: copies of a model share it, and it stays where it is when the model moves.
    """

    tensors: Mapping[str, Tensor]
    """What `Quantised.tensors` keeps of each matrix, behind its name."""
    width: int
    first: int = 0
    last: int | None = None
    """The neurons of it, from the first on and before the last."""

    @classmethod
    def of(cls, matrices: Mapping[str, Tensor], bits: int, scale_bits: int) -> "QuantisedMlp":
        """The rounded matrices `[N, D]` of an MLP, by their names in `GROUPED`."""
        made = {
            name: quantise(w_ND.cpu(), bits, along=GROUPED[name], scale_bits=scale_bits)
            for name, w_ND in matrices.items()
        }
        return cls(_named(made), matrices["up"].shape[1])

    def with_matrices(self, changed: Mapping[str, Quantised]) -> "QuantisedMlp":
        """The same MLP with other matrices in the place of these."""
        return replace(self, tensors={**self.tensors, **_named(changed)})

    def __deepcopy__(self, memo: dict[int, object]) -> "QuantisedMlp":
        """Itself."""
        return self

    @property
    def names(self) -> list[str]:
        """Its matrices."""
        return [name for name in GROUPED if f"{name}.codes" in self.tensors]

    def matrix(self, name: str) -> Quantised:
        """One of them, unpacked; `ValueError` for neurons of down that cut a group."""
        own = {part: t for key, t in self.tensors.items() if (part := _part(key, name))}
        whole = Quantised.of_tensors(own, self.width, GROUPED[name])
        return whole.take(slice(self.first, self.last))

    def take(self, neurons: slice) -> "QuantisedMlp":
        """A run of neurons."""
        end = len(self) if neurons.stop is None else min(neurons.stop, len(self))
        return replace(self, first=self.first + (neurons.start or 0), last=self.first + end)

    def __len__(self) -> int:
        """N, the number of neurons."""
        last = self.tensors["up.codes"].shape[1] if self.last is None else self.last
        return last - self.first

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return len(self.tensors["up.codes"])

    @property
    def scale_bits(self) -> int:
        """Bits of a scale, and of an offset."""
        return 8 * self.tensors["up.scale"].element_size()

    def overhead(self, name: str) -> float:
        """Bits a weight of a matrix that are no codes: `Quantised.scale_bits`, without unpacking."""
        parts = (self.tensors.get(f"{name}.{part}") for part in ("scale", "offset", "most"))
        held = sum(8 * t.numel() * t.element_size() for t in parts if t is not None)
        return held / (self.tensors[f"{name}.codes"].shape[1] * self.width)

    @property
    def bits_per_weight(self) -> float:
        """Bits that are stored of a weight, all counted, of all matrices."""
        return self.bits + sum(self.overhead(name) for name in self.names) / len(self.names)


def shapes(
    neurons: int, width: int, bits: int, scale_bits: int, names: Iterable[str]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what `QuantisedMlp` holds of an MLP of these sizes with these matrices."""
    held: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    scale = torch.uint8 if scale_bits == 8 else torch.float16
    for name in names:
        along = GROUPED[name]
        groups = -(-(width if along else neurons) // GROUP)
        shape = (neurons, groups) if along else (groups, width)
        held[f"{name}.codes"] = (bits, neurons, -(-width // 8)), torch.uint8
        held[f"{name}.scale"] = held[f"{name}.offset"] = shape, scale
        if scale_bits == 8:
            held[f"{name}.most"] = (2, neurons if along else width), torch.float16
    return held


def unfilled(neurons: int, width: int, gated: bool, bits: int, scales: int) -> QuantisedMlp:
    """An MLP of these sizes whose tensors take no memory: what says how large they are going to be."""
    names = [name for name in GROUPED if name != "gate" or gated]
    kinds = shapes(neurons, width, bits, scales, names).items()
    tensors = {n: torch.empty(shape, dtype=dtype, device="meta") for n, (shape, dtype) in kinds}
    return QuantisedMlp(tensors, width)


def _named(matrices: Mapping[str, Quantised]) -> dict[str, Tensor]:
    return {
        f"{name}.{part}": value.cpu().contiguous()
        for name, made in matrices.items()
        for part, value in made.tensors().items()
    }


def _part(key: str, matrix: str) -> str | None:
    name, _, part = key.partition(".")
    return part if name == matrix else None
