"""Find the MLPs of a model type that has no row in `moefy.families`."""

from transformers import PreTrainedModel

from moefy.errors import UnsupportedModel
from moefy.families import Family


def search(model: PreTrainedModel) -> Family:
    """A row for the type of `model`, found by structure."""
    raise UnsupportedModel(
        f"model_type '{model.config.model_type}' is not in the table of families"
    )
