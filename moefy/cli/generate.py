"""What `moefy generate` does: a text goes on."""

from contextlib import nullcontext
from pathlib import Path

import torch

from moefy.data.inputs import load_tokenizer
from moefy.errors import MoefyError
from moefy.experts.loading import open_model
from moefy.experts.moefied import of
from moefy.experts.placement import device_of
from moefy.experts.sparse_mlp import all_experts


def generate_text(
    folder: Path, prompt: str, *, tokens: int, seed: int | None = None, dense: bool = False
) -> str:
    """Continue `prompt`; returns prompt and continuation. With a `seed` tokens are drawn, else the likeliest
    are taken."""
    model = open_model(folder, verify=True, dense=False)
    if not model.can_generate():
        raise MoefyError(f"{folder}: a {type(model).__name__} does not generate text")
    tokenizer = load_tokenizer(of(model).checkpoint.folder)
    if tokenizer is None:
        raise MoefyError(f"{folder}: has no tokenizer; use moefy.load and token ids from Python")
    encoded = tokenizer(prompt, return_tensors="pt").to(device_of(model))
    encoded.pop("token_type_ids", None)
    if seed is not None:
        torch.manual_seed(seed)
    with all_experts(model) if dense else nullcontext():
        ids = model.generate(**encoded, max_new_tokens=tokens, do_sample=seed is not None)  # type: ignore[operator]
    text: str = tokenizer.decode(ids[0], skip_special_tokens=True)
    return text
