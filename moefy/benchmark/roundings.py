"""The dense model in fewer bits, to compare with: what a user has without leaving anything out.

    for mlp, bits in ROUNDINGS["rtn-3"].make(dense): ...

Only MLPs are rounded, and every row is computed with the values that its codes stand for. Groups have 32
inputs of an output, with a scale and an offset in fp16: one bit a weight beside the code. llama.cpp's rows
are made by llama.cpp itself, from moefy's export, and read back; their bits are those of the tensors in its
file, which has no room for a K format where rows are no multiple of 256 and takes another one there.

* `rtn`: round to nearest.
* `hqq`: Half-Quadratic Quantization (Badri and Shaji 2023), by its library: offsets that suit small errors
  better than large ones. It reads no text.
* `gptq`: GPTQ (Frantar et al. 2023): columns are rounded in turn and those that follow make up for the error,
  on inputs of the router shard as the dense model has them. Its library needs another torch than moefy.

Shapes: T tokens, D width, N neurons, I inputs and O outputs of one matrix.
"""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.linalg import cholesky

from moefy.errors import MoefyError
from moefy.methods.base import WIDE_BITS
from moefy.models.checkpoint import Checkpoint
from moefy.models.locate import Site
from moefy.models.mlp import DenseMlp
from moefy.models.quantised import GROUP, quantise

CALIBRATION_TOKENS = 8192
"""Inputs of a layer that GPTQ looks at."""
_DAMPING = 0.01
_OFF_GRID = 'needs pip install "moefy[{extra}]"'


@dataclass(frozen=True)
class Dense:
    """The model that is rounded."""

    checkpoint: Checkpoint
    sites: list[Site]
    mlp: Callable[[Site], DenseMlp]
    """Its MLPs, in fp32."""
    inputs: Callable[[Site], Tensor]
    """Inputs `[T, D]` of one of them on the router shard."""
    folder: Path
    """Where files are put on the way."""


Mlps = Iterator[tuple[DenseMlp, float]]
"""Every MLP in turn, and the bits that a weight of it takes."""
Round = Callable[[Tensor, Tensor | None], tuple[Tensor, float]]
"""Values and bits of one matrix `[O, I]`, with a sample of its inputs `[T, I]` where one was asked for."""


@dataclass(frozen=True)
class Rounding:
    """One way to round."""

    make: Callable[[Dense], Mlps]
    file: Callable[[Dense], Path] | None = None
    """The whole model as one GGUF file, where the rounding makes one."""


def _as_is(dense: Dense) -> Mlps:
    for site in dense.sites:
        yield dense.mlp(site), WIDE_BITS


AS_IS = Rounding(_as_is)
"""Nothing is rounded."""


def _by_matrix(rounded: Round, dense: Dense, *, calibrated: bool = False) -> Mlps:
    """Gate and up, then down on what those make of the inputs."""
    for site in dense.sites:
        mlp, bits = dense.mlp(site), []
        x_TI = _sample(dense.inputs(site)) if calibrated else None
        for role in _roles(mlp):
            if role == "down" and x_TI is not None:
                x_TI = mlp.hidden(x_TI)
            values_OI, each = rounded(_matrix(mlp, role), x_TI)
            mlp = _with(mlp, role, values_OI)
            bits.append(each)
        yield mlp, sum(bits) / len(bits)


def _roles(mlp: DenseMlp) -> list[str]:
    return ["up", "down"] if mlp.gate_ND is None else ["gate", "up", "down"]


def _matrix(mlp: DenseMlp, role: str) -> Tensor:
    """One matrix `[O, I]`: a neuron's row of down holds its outputs."""
    weight_ND: Tensor = getattr(mlp, f"{role}_ND")
    return weight_ND.T if role == "down" else weight_ND


def _with(mlp: DenseMlp, role: str, values_OI: Tensor) -> DenseMlp:
    """The MLP with another matrix."""
    if role == "gate":
        return replace(mlp, gate_ND=values_OI)
    return replace(mlp, up_ND=values_OI) if role == "up" else replace(mlp, down_ND=values_OI.T)


def _sample(x_TD: Tensor) -> Tensor:
    return x_TD[:: max(1, len(x_TD) // CALIBRATION_TOKENS)][:CALIBRATION_TOKENS].float()


def _nearest(bits: int, weight_OI: Tensor, _: Tensor | None = None) -> tuple[Tensor, float]:
    rounded = quantise(weight_OI, bits, scale_bits=16)
    return rounded.values(), rounded.bits_per_weight


def _hqq(bits: int, weight_OI: Tensor, _: Tensor | None) -> tuple[Tensor, float]:
    if weight_OI.shape[1] % GROUP:
        raise MoefyError(f"{weight_OI.shape[1]} inputs are no multiple of {GROUP}, HQQ's groups")
    quantizer = _library("hqq.core.quantize", "hqq").Quantizer
    codes, facts = quantizer.quantize(
        weight_OI.contiguous(), nbits=bits, group_size=GROUP, axis=1, device="cpu", bitpack=False
    )
    scale, zero = (facts[name].half().float() for name in ("scale", "zero"))
    values_OI: Tensor = ((codes.view(-1, GROUP) - zero) * scale).view(weight_OI.shape)
    return values_OI, bits + 32 / GROUP


def gptq(bits: int, weight_OI: Tensor, x_TI: Tensor | None) -> tuple[Tensor, float]:
    """GPTQ of one matrix, group by group from the first input to the last.

    Scale and offset of a group are those of its weights as they stand when its turn comes.
    """
    assert x_TI is not None
    w = weight_OI.clone().contiguous()
    hessian_II = x_TI.T @ x_TI
    diagonal_I = hessian_II.diagonal()
    diagonal_I += _DAMPING * diagonal_I.mean() + 1e-8
    upper_II = cholesky(torch.cholesky_inverse(cholesky(hessian_II)), upper=True)
    values_OI, size = torch.empty_like(w), 0.0
    for first in range(0, w.shape[1], GROUP):
        columns = range(first, min(first + GROUP, w.shape[1]))
        last = columns.stop
        grid = quantise(w[:, first:last], bits, scale_bits=16)
        scale, offset = grid.scales()
        size += grid.bits_per_weight * len(columns)
        error_OK = torch.empty_like(w[:, first:last])
        for column in columns:
            code_O = ((w[:, column] + offset[:, 0]) / scale[:, 0]).round().clamp(0, 2**bits - 1)
            value_O = values_OI[:, column] = code_O * scale[:, 0] - offset[:, 0]
            error_O = (w[:, column] - value_O) / upper_II[column, column]
            error_OK[:, column - first] = error_O
            w[:, column:last] -= error_O[:, None] * upper_II[column, column:last]
        w[:, last:] -= error_OK @ upper_II[first:last, last:]
    return values_OI, size / w.shape[1]


def _library(module: str, extra: str) -> Any:
    if find_spec(module.partition(".")[0]) is None:
        raise MoefyError(_OFF_GRID.format(extra=extra))
    return import_module(module)


def _file(kind: str, dense: Dense) -> Path:
    """A GGUF of this kind, which llama.cpp makes from one in bf16."""
    library = _library("llama_cpp", "llama-cpp")
    from moefy.exporting.gguf import write_gguf  # needs the extra `gguf`

    wide, out = dense.folder / "wide.gguf", dense.folder / f"{kind}.gguf"
    if not wide.exists():
        write_gguf(dense.checkpoint.folder, wide)
    if not out.exists():
        part = out.with_suffix(".part")
        options = library.llama_model_quantize_default_params()
        options.ftype = getattr(library, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
        options.nthread = torch.get_num_threads()
        silent = library.llama_log_callback(lambda *_: None)  # held while llama.cpp may call it
        library.llama_log_set(silent, None)
        # Bytes and a pointer: the binding is one of C.
        if library.llama_model_quantize(
            str(wide).encode(), str(part).encode(), ctypes.byref(options)
        ):
            raise MoefyError(f"llama.cpp could not quantise {wide} as {kind}")
        part.rename(out)
    return out


def _llama_cpp(kind: str, dense: Dense) -> Mlps:
    file = _file(kind, dense)
    gguf: Any = import_module("gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for site in dense.sites:
        mlp, bits, weights = dense.mlp(site), 0, 0
        for role in _roles(mlp):
            tensor = tensors[f"blk.{site.index}.ffn_{role}.weight"]
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
            mlp = _with(mlp, role, torch.tensor(values))
            bits, weights = bits + 8 * int(tensor.n_bytes), weights + int(tensor.n_elements)
        yield mlp, bits / weights


def file_bits(file: Path) -> float:
    """Bits per weight of a whole GGUF file."""
    tensors = import_module("gguf").GGUFReader(file).tensors
    size = sum(int(tensor.n_bytes) for tensor in tensors)
    return 8 * size / sum(int(tensor.n_elements) for tensor in tensors)


LLAMA_CPP = ("q8_0", "q6_k", "q4_k_m", "q4_0", "q3_k_m", "q2_k")
ROUNDINGS: dict[str, Rounding] = {
    **{f"rtn-{b}": Rounding(partial(_by_matrix, partial(_nearest, b))) for b in (8, 4, 3, 2)},
    **{f"hqq-{b}": Rounding(partial(_by_matrix, partial(_hqq, b))) for b in (4, 3, 2)},
    **{
        f"gptq-{b}": Rounding(partial(_by_matrix, partial(gptq, b), calibrated=True))
        for b in (4, 3, 2)
    },
    **{name: Rounding(partial(_llama_cpp, name), partial(_file, name)) for name in LLAMA_CPP},
}
"""Every row by its name."""
