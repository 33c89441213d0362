"""Files of images: pictures, and stacks of `pixel_values`.

Shapes: C channels, H height, W width.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moefy.errors import CorpusError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
STACKS = (".npy", ".safetensors")


def read_stacks(path: Path) -> list[Tensor]:
    """The stacks `[images, C, H, W]` of a file of `STACKS`. Raises `CorpusError`."""
    try:
        if path.suffix == ".npy":
            stacks = [torch.from_numpy(np.load(path, allow_pickle=False))]
        else:
            stacks = list(load_file(path).values())
    except (ValueError, TypeError, EOFError, OSError, SafetensorError) as error:
        raise CorpusError(
            f"corpus {path}: truncated or no stack of numbers ({error}); write it again"
        ) from None
    for stack in stacks:
        if stack.ndim != 4:
            raise CorpusError(
                f"corpus {path}: pixel_values of shape {list(stack.shape)}; expected [images, C, H, W]"
            )
        if not stack.isfinite().all():
            raise CorpusError(f"corpus {path}: pixel_values with NaN or infinity; write it again")
    return stacks


def read_picture(path: Path) -> Tensor:
    """The colours of a picture `[3, H, W]` (uint8). Raises `CorpusError`."""
    try:
        from PIL import Image
    except ImportError:
        raise CorpusError(
            f"corpus {path}: reading images needs pip install moefy[images]"
        ) from None
    try:
        with Image.open(path) as picture:
            rgb = np.array(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CorpusError(
            f"corpus {path}: not an image that can be read ({error}); leave it out"
        ) from None
    return torch.from_numpy(rgb).permute(2, 0, 1).contiguous()
