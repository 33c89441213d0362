"""Reading GGUF files back, and what a refusal must look like."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

import moefy
from moefy.errors import MoefyError
from moefy.exporting.export import export

DEMO = Path(moefy.__file__).parent / "demo" / "llama"


def read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys and tensors of a GGUF."""
    reader = gguf.GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: tensor for tensor in reader.tensors}


def values(tensor: Any) -> Tensor:
    """A tensor of a GGUF in fp32, in torch's order of dimensions."""
    shape = [int(size) for size in reversed(tensor.shape)]
    flat = gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)
    return torch.from_numpy(flat.astype(np.float32)).reshape(shape)


def refused(error: type[MoefyError], folder: Path, out: Path, *words: str, **options: Any) -> None:
    before = {file.name for file in out.parent.iterdir()}
    with pytest.raises(error) as caught:
        export(folder, out, to="gguf", **options)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert {file.name for file in out.parent.iterdir()} == before
