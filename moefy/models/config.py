"""The configuration of a checkpoint as transformers reads it."""

import re
from collections.abc import Iterator
from typing import Any

from transformers import AutoConfig

from moefy.errors import CheckpointError
from moefy.models.checkpoint import Checkpoint
from moefy.models.refusals import refuse_foreign, refuse_quantized
from moefy.models.schema import LARGEST
from moefy.run.reading import reading

MOST_LAYERS = 10_000
"""Layers, heads, experts: what transformers makes as many modules of, one by one."""
MOST_LABELS = 1_000_000
_MANY = re.compile(r"layers?(_|$)|heads?(_|$)|experts?(_|$)|blocks?(_|$)|depths?(_|$)|stages?(_|$)")
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def read_config(checkpoint: Checkpoint) -> Any:
    """The transformers configuration.

    Raises `CheckpointError` where transformers has no such type, where sizes are absurd, where the
    weights are codes, and where the file names code to be fetched; none is run.
    """
    refuse_foreign(checkpoint.folder, checkpoint.config)
    tensors = checkpoint.tensors if checkpoint.has_weights else ()
    refuse_quantized(checkpoint.folder, checkpoint.config, tensors)
    file = checkpoint.folder / "config.json"
    for key, value in _leaves(checkpoint.config):
        last = key.rpartition(".")[2]
        if type(value) is int and (most := _most(last)) < abs(value):
            raise CheckpointError(
                f"{file}: {key}: got {value}, no model has more than {most}; download it again"
            )
        implements = last.removeprefix("_").removesuffix("_internal") in _IMPLEMENTATIONS
        if implements and isinstance(value, str) and "/" in value:
            raise CheckpointError(
                f"{file}: {key}: got '{value}', code to be fetched from the Hub; take it out"
            )
    with reading(file, "is it a type that this transformers has?"):
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)


def _leaves(data: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All values of nested JSON that are neither list nor table, by their dotted keys."""
    open_ = [(prefix, data)]
    while open_:
        key, value = open_.pop()
        if isinstance(value, dict):
            open_ += [(f"{key}.{k}" if key else k, v) for k, v in value.items()]
        elif isinstance(value, list):
            open_ += [(key, v) for v in value]
        else:
            yield key, value


def _most(key: str) -> int:
    """The largest whole number that a key can have."""
    if key == "num_labels":
        return MOST_LABELS
    counts = _MANY.search(key) is not None and not re.search("dim|size|width|theta|_id", key)
    return MOST_LAYERS if counts else LARGEST
