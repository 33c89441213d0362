"""Write a stock checkpoint as one GGUF file, which llama.cpp runs.

    write_gguf("out", "out.gguf")

Takes dense models and mixtures of experts of the classes in `ARCHITECTURES`: moefy's exports and,
beside them, the dense models they are compared with. Needs the extra `gguf`.

Experts of a layer are one tensor. Vectors and routers are fp32, which llama.cpp wants; matrices keep
their dtype. Three things are said in another way, since llama.cpp computes them so:

- `llama` turns neighbouring rows of a head: query and key rows are put in that order.
- `qwen2moe` does not divide the weights of experts by their sum. moefy's routers give every expert
  the same weight, 1/E before and 1/K after that division, so down projections are multiplied by E/K.
- `qwen2moe` computes the sigmoid of the shared expert's gate as silu(x)/x, which is 0/0 where its
  weights are zero, as moefy's are; they are written as `ALMOST_ZERO`.

Shapes: D width, E routed experts, F neurons per expert, K experts that run, H heads, S their size.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from moefy.errors import CheckpointError, MoefyError, OutputError, UnsupportedModel, unknown_choice

try:
    import gguf
except ImportError:
    raise MoefyError('writing GGUF files needs pip install "moefy[gguf]"') from None
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray
from torch import Tensor

from moefy.exporting.gguf.architectures import (
    Architecture,
    add_metadata,
    architecture_of,
    experts,
    position_factors,
    warnings,
)
from moefy.exporting.gguf.vocabulary import add_vocabulary
from moefy.exporting.tensors import EMBEDDING, HEAD, Planned, stored_as, times
from moefy.models.checkpoint import Checkpoint
from moefy.models.config import read_config
from moefy.run.folder import OutputFolder, to_disk
from moefy.run.job import Job

QUANTIZATIONS = {
    "q8_0": (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q8_0),
    "q4_1": (GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0),
}
"""By name: the blocks of MLPs, and those of other matrices."""
_TYPES = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}
_FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    GGMLQuantizationType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
}


def check_request(folder: Path, out: Path, *, quantize: str | None, overwrite: bool) -> None:
    """Raise `MoefyError` for an unknown quantization, and `OutputError` where `out` is in the way, or in `folder`."""
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise MoefyError(unknown_choice("quantization", quantize, QUANTIZATIONS))
    if out.is_dir():
        raise OutputError(f"{out}: is a folder; name a file, such as {out / 'model.gguf'}")
    output = OutputFolder(out)
    output.apart_from(folder)
    output.check(overwrite=overwrite)


def write_gguf(
    folder: str | Path,
    out: str | Path,
    *,
    name: str | None = None,
    quantize: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the stock model `folder` as the file `out`, its name in it `name` or the folder's.

    `quantize="q8_0"` rounds matrices whose rows are multiples of 32 to 8 bits, the router excepted;
    `"q4_1"` those of MLPs to 4 bits with a scale and an offset in fp16: but for ties the codes that a
    conversion with `storage.bits: 4` and `storage.scales: 16` has stored. One tensor is in memory at a
    time. Returns the record. Raises `UnsupportedModel` for a model or tokenizer that llama.cpp computes
    in another way, and `OutputError` where `out` is in the way; the file appears when it is whole.
    """
    checkpoint, out = Checkpoint.open(folder), Path(out)
    check_request(checkpoint.folder, out, quantize=quantize, overwrite=overwrite)
    config = read_config(checkpoint)
    architecture = architecture_of(config)
    gain = expert_gain(architecture, config, checkpoint)
    planned = plan_tensors(architecture, config, checkpoint, gain)
    types = {tensor.name: _type(tensor, quantize) for tensor in planned}
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_type("model")
    writer.add_name(name or checkpoint.folder.resolve().name)
    add_metadata(writer, architecture, config)
    cautions = [*warnings(config), *_rounded(planned, gain), *_unrounded(planned, quantize)]
    cautions += add_vocabulary(writer, checkpoint.folder, config.vocab_size, config)
    writer.add_file_type(_FILE_TYPES[_most(planned, types)])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write(writer, planned, types, out, overwrite=overwrite)
    return {
        "out": str(out),
        "architecture": architecture.name,
        "tensors": dict(Counter(kind.name for kind in types.values())),
        "bytes": out.stat().st_size,
        "quantize": quantize,
        "warnings": cautions,
    }


def _rounded(planned: list[Planned], gain: float) -> list[str]:
    """What multiplying the experts' down projections costs in 16 bits."""
    down = [tensor for tensor in planned if "ffn_down_exps" in tensor.name]
    if math.log2(gain).is_integer() or all(t.dtype == torch.float32 for t in down):
        return []
    return [
        f"down projections of experts are multiplied by {gain:.4g}, no power of two, and rounded; "
        "llama.cpp's qwen2moe does not divide their weights by their sum"
    ]


def _unrounded(planned: list[Planned], quantize: str | None) -> list[str]:
    """Matrices that no block of 32 numbers fits."""
    odd = [t for t in planned if len(t.shape) > 1 and t.shape[-1] % 32 and not _is_router(t)]
    if not odd or quantize is None:
        return []
    return [
        f"{len(odd)} matrices have rows that are no multiple of 32 and keep their dtype, first "
        f"{odd[0].name} {list(odd[0].shape)}"
    ]


def _most(planned: list[Planned], types: dict[str, GGMLQuantizationType]) -> GGMLQuantizationType:
    """The type of most numbers in matrices."""
    numbers: Counter[GGMLQuantizationType] = Counter()
    for tensor in planned:
        if len(tensor.shape) > 1:
            numbers[types[tensor.name]] += math.prod(tensor.shape)
    return numbers.most_common(1)[0][0]


def _is_router(tensor: Planned) -> bool:
    return "ffn_gate_inp" in tensor.name


def _type(tensor: Planned, quantize: str | None) -> GGMLQuantizationType:
    fits = len(tensor.shape) > 1 and not tensor.shape[-1] % 32 and not _is_router(tensor)
    if quantize is None or not fits:
        return _TYPES[tensor.dtype]
    mlps, others = QUANTIZATIONS[quantize]
    return mlps if ".ffn_" in tensor.name else others


def _write(
    writer: gguf.GGUFWriter,
    planned: list[Planned],
    types: dict[str, GGMLQuantizationType],
    out: Path,
    *,
    overwrite: bool,
) -> None:
    """Header first, then every tensor as it is made."""
    total = 0
    for tensor in planned:
        block, size = gguf.GGML_QUANT_SIZES[types[tensor.name]]
        count = math.prod(tensor.shape) // block * size
        total += count
        # Any dtype but uint8 says that the shape counts elements and not bytes.
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), count, types[tensor.name]
        )
    job = Job("export", out, resume=None, overwrite=overwrite, quiet=True)
    part = job.work / "model.gguf"
    with job.running(disk=total):
        try:
            writer.write_header_to_file(part)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in planned:
                writer.write_tensor_data(_encoded(tensor, types[tensor.name]))
        finally:
            writer.close()
        to_disk(part)
        part.replace(job.output.place)
    job.output.discard()


def _encoded(tensor: Planned, kind: GGMLQuantizationType) -> NDArray[Any]:
    """The bytes of a tensor as GGUF has them."""
    value = tensor.make().contiguous()
    if kind not in _TYPES.values():
        return np.asarray(gguf.quants.quantize(value.float().numpy(), kind))
    return np.asarray(value.flatten().view(torch.uint8).numpy())


ALMOST_ZERO = 2.0**-24
"""A weight whose gate is 1/2 up to D / 2^26 for a normed input."""
MOST_SPREAD = 0.05
"""Largest difference of two router scores for which every expert counts alike."""
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
_NORM = "post_attention_layernorm.weight"
_KEPT = {torch.float32, torch.float16, torch.bfloat16}


def plan_tensors(
    architecture: Architecture, config: Any, checkpoint: Checkpoint, gain: float
) -> list[Planned]:
    """Every tensor of the file; `gain` is that of `expert_gain`.

    Raises `UnsupportedModel` for a tensor that llama.cpp's architecture has no place for.
    """
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    planned: list[Planned] = []
    factors = position_factors(architecture, config)
    if factors is not None:
        planned.append(_made("rope_freqs.weight", factors.shape, torch.float32, lambda: factors))
    for stock, parts in _sources(architecture, config, checkpoint).items():
        name = names.get_name(stock, try_suffixes=(".weight", ".bias"))
        owner, _, kind = stock.rpartition(".")
        if name is None or (kind == "bias" and owner.split(".")[-1] not in architecture.biases):
            raise UnsupportedModel(
                f"{stock} {list(checkpoint.tensors[parts[0]].shape)} has no place in llama.cpp's "
                f"{architecture.name}"
            )
        planned.append(_planned(architecture, config, checkpoint, name, parts, gain))
    return planned


def _sources(
    architecture: Architecture, config: Any, checkpoint: Checkpoint
) -> dict[str, list[str]]:
    """Names on disk by the name of what they make up: one each, and all experts of a layer."""
    numbered: dict[str, dict[int, str]] = {}
    for name in checkpoint.tensors:
        match = _EXPERT.fullmatch(name)
        whole = f"{match[1]}.{match[3]}" if match else name
        numbered.setdefault(whole, {})[int(match[2]) if match else 0] = name
    names = {whole: [parts[n] for n in sorted(parts)] for whole, parts in numbered.items()}

    tied = bool(config.tie_word_embeddings)
    if HEAD not in names and not tied:
        raise CheckpointError(f"{checkpoint.folder}: no tensor on disk is {HEAD}")
    if HEAD in names and tied and torch.equal(checkpoint.map(HEAD), checkpoint.map(EMBEDDING)):
        del names[HEAD]
    if HEAD not in names and architecture.own_output:
        names[HEAD] = [EMBEDDING]
    return names


def _planned(
    architecture: Architecture,
    config: Any,
    checkpoint: Checkpoint,
    name: str,
    parts: list[str],
    gain: float,
) -> Planned:
    shape, dtype = stored_as(checkpoint, parts[0])
    read = partial(checkpoint.map, parts[0])
    make: Callable[[], Tensor] = read
    if "_exps." in name:
        shape = (len(parts), *shape)
        make = partial(_stacked, checkpoint, parts, gain if "ffn_down_exps" in name else 1.0)
    elif "ffn_gate_inp_shexp" in name:
        shape = shape[1:]
        make = partial(_open_gate, read)
    elif architecture.pairs and (".attn_q." in name or ".attn_k." in name):
        heads = config.num_attention_heads if ".attn_q." in name else config.num_key_value_heads
        make = partial(_paired, read, heads)
    if len(shape) == 1 or "ffn_gate_inp" in name or dtype not in _KEPT:
        dtype = torch.float32
    return _made(name, shape, dtype, make)


def _made(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[], Tensor]
) -> Planned:
    return Planned(name, tuple(shape), dtype, lambda: make().to(dtype))


def _paired(read: Callable[[], Tensor], heads: int) -> Tensor:
    """Rows i and i + S / 2 of each head beside each other."""
    rows = read()
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _stacked(checkpoint: Checkpoint, parts: list[str], gain: float) -> Tensor:
    stacked = torch.stack([checkpoint.map(part) for part in parts])
    return stacked if gain == 1.0 else times(stacked, gain, parts[0])


def _open_gate(read: Callable[[], Tensor]) -> Tensor:
    """The shared expert's gate `[D]`; never all zeros."""
    weight_D = read()[0].float()
    return weight_D if weight_D.any() else torch.full_like(weight_D, ALMOST_ZERO)


def expert_gain(architecture: Architecture, config: Any, checkpoint: Checkpoint) -> float:
    """By what down projections of routed experts are multiplied: E/K or 1.

    Raises `UnsupportedModel` where weights are divided by their sum, llama.cpp does not do it, and
    they are not nearly the same for all experts. The largest difference of two scores over all
    inputs is bounded by the lengths of the router's rows, since the input is normed.
    """
    if not experts(config) or architecture.normalises or not config.norm_topk_prob:
        return 1.0
    for layer in range(config.num_hidden_layers):
        router_ED = checkpoint.map(f"model.layers.{layer}.mlp.gate.weight").float()
        norm_D = checkpoint.map(f"model.layers.{layer}.{_NORM}").float()
        centred_ED = (router_ED - router_ED.mean(0)) * norm_D
        spread = 2 * float(centred_ED.norm(dim=1).max()) * config.hidden_size**0.5
        if not spread <= MOST_SPREAD:
            raise UnsupportedModel(
                f"layer {layer}: norm_topk_prob is true and router scores differ by up to "
                f"{spread:.2g}; llama.cpp's {architecture.name} does not divide weights by their "
                "sum, and only routers that moefy exported need no division"
            )
    return float(experts(config) / config.num_experts_per_tok)
