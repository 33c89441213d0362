"""What `moefy generate` does: a text goes on."""

from contextlib import nullcontext
from pathlib import Path

from moefy.data.inputs import load_tokenizer
from moefy.errors import MoefyError
from moefy.experts.loading import load, weights_of
from moefy.experts.offload import device_of
from moefy.experts.placement import placement
from moefy.experts.sparse_mlp import all_experts
from moefy.models.artefact import read_artefact


def generate_text(
    folder: Path, prompt: str, *, tokens: int, sample: bool = False, dense: bool = False
) -> str:
    """Continue `prompt`; returns prompt and continuation."""
    weights = weights_of(read_artefact(folder, verify=False), folder, verify=False)
    model = load(folder, **placement(weights))
    if not model.can_generate():
        raise MoefyError(f"{folder}: a {type(model).__name__} does not generate text")
    tokenizer = load_tokenizer(weights.folder)
    if tokenizer is None:
        raise MoefyError(f"{folder}: has no tokenizer; use moefy.load and token ids from Python")
    encoded = tokenizer(prompt, return_tensors="pt").to(device_of(model))
    encoded.pop("token_type_ids", None)
    with all_experts(model) if dense else nullcontext():
        ids = model.generate(**encoded, max_new_tokens=tokens, do_sample=sample)  # type: ignore[operator]
    text: str = tokenizer.decode(ids[0], skip_special_tokens=True)
    return text
