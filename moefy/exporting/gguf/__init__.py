"""Write a stock checkpoint as one GGUF file, which llama.cpp runs.

    write_gguf("out", "out.gguf")

Takes dense models and mixtures of experts of the classes in `ARCHITECTURES`: moefy's exports and,
beside them, the dense models they are compared with. Needs the extra `gguf`.
"""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from moefy.errors import MoefyError, unknown_choice

try:
    import gguf
except ImportError:
    raise MoefyError('writing GGUF files needs pip install "moefy[gguf]"') from None
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from numpy.typing import NDArray

from moefy.errors import OutputError
from moefy.exporting.gguf.architectures import add_metadata, architecture_of, warnings
from moefy.exporting.gguf.layout import expert_gain, plan_tensors
from moefy.exporting.gguf.vocabulary import add_vocabulary
from moefy.exporting.tensors import Planned
from moefy.models.checkpoint import Checkpoint
from moefy.models.config import read_config
from moefy.run.job import Job
from moefy.run.output import OutputFolder, to_disk

QUANTIZATIONS = {"q8_0": GGMLQuantizationType.Q8_0}
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

    `quantize="q8_0"` rounds matrices whose rows are multiples of 32 to 8 bits, the router excepted.
    One tensor is in memory at a time. Returns the record. Raises `UnsupportedModel` for a model or
    tokenizer that llama.cpp computes in another way, and `OutputError` where `out` is in the way;
    the file appears when it is whole.
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
    mostly = Counter(types[tensor.name] for tensor in planned if len(tensor.shape) > 1)
    writer.add_file_type(_FILE_TYPES[mostly.most_common(1)[0][0]])
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
    """Matrices that no block of 8-bit numbers fits."""
    odd = [t for t in planned if len(t.shape) > 1 and t.shape[-1] % 32 and not _is_router(t)]
    if not odd or quantize is None:
        return []
    return [
        f"{len(odd)} matrices have rows that are no multiple of 32 and keep their dtype, first "
        f"{odd[0].name} {list(odd[0].shape)}"
    ]


def _is_router(tensor: Planned) -> bool:
    return "ffn_gate_inp" in tensor.name


def _type(tensor: Planned, quantize: str | None) -> GGMLQuantizationType:
    fits = len(tensor.shape) > 1 and not tensor.shape[-1] % 32 and not _is_router(tensor)
    return QUANTIZATIONS[quantize] if quantize and fits else _TYPES[tensor.dtype]


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
    if kind in QUANTIZATIONS.values():
        return np.asarray(gguf.quants.quantize(value.float().numpy(), kind))
    return np.asarray(value.flatten().view(torch.uint8).numpy())
