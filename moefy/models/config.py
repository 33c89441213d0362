"""The configuration of a checkpoint as transformers reads it."""

from typing import Any

from transformers import AutoConfig

from moefy.errors import CheckpointError
from moefy.models.checkpoint import Checkpoint


def read_config(checkpoint: Checkpoint) -> Any:
    """The transformers configuration; `CheckpointError` where transformers has no such type."""
    try:
        return AutoConfig.from_pretrained(checkpoint.folder)
    except (ValueError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{checkpoint.folder}: transformers cannot read config.json: {reason[:300]}"
        ) from None
