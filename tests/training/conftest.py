"""What the tests of training share."""

from pathlib import Path

import pytest
from tiny_conversion import convert_tiny
from tiny_models import build


@pytest.fixture(scope="module")
def moefied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with trainable routers, compensations and thresholds."""
    folder = tmp_path_factory.mktemp("moefied")
    settings = {"selection.name": "threshold", "compensation.name": "mean_residual"}
    convert_tiny("llama", build("llama", folder / "source"), folder / "out", settings=settings)
    return folder / "out"
