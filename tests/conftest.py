"""Settings every test runs under, and the shared models and corpora where they are at hand."""

import gc
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Set before anything imports torch, triton or huggingface_hub; child processes inherit them.
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# One thread: the tensors are tiny, and on a busy machine threads that wait for each other double the
# time of a run.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
# Where scripts/real_model.py puts the real LLM: asked before the cache is another one.
_HOME_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault("MOEFY_MODELS", str(_HOME_CACHE / "moefy" / "models"))
# What this machine was calibrated to must not decide anything here.
_CACHE = tempfile.TemporaryDirectory(prefix="moefy-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_finish() -> None:
    if "triton" in sys.modules:
        import fast_interpreter

        fast_interpreter.install()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_no_garbage() -> None:
    """A full collection looks at half a million objects of torch and transformers otherwise, a quarter
    of a second each time, and code that returns memory collects at every layer."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


def _shared(folder: str) -> Path:
    path = SHARED_DATA / folder
    if not path.is_dir():
        pytest.skip(f"no shared data beside this repository ({folder})")
    return path


@pytest.fixture(scope="session")
def corpora() -> Path:
    """Folder of labelled corpora: `<domain>/train.txt` and `valid.txt`."""
    return _shared("corpora")


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Folder of small trained models, one transformers folder each."""
    return _shared("models")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the real LLM: 135M parameters, 30 layers of 576 x 1536, a vocabulary of 49,152."""
    folder = Path(os.environ["MOEFY_MODELS"]) / "SmolLM2-135M-Instruct"
    if not folder.is_dir():
        pytest.skip("no real LLM here; `scripts/setup --models` fetches it")
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a moefied model by its kind in `moefied_models.KINDS`, converted when first asked for."""
    from moefied_models import make

    folder, done = tmp_path_factory.mktemp("moefied"), {}

    def get(kind: str) -> Path:
        if kind not in done:
            done[kind] = make(kind, folder)
        return done[kind]

    return get


@pytest.fixture
def load(made: Callable[[str], Path]) -> Callable[..., Any]:
    """Loads a moefied model by its kind, in fp64 unless told otherwise."""
    import torch

    import moefy

    return lambda kind, **options: moefy.load(made(kind), **{"dtype": torch.float64, **options})
