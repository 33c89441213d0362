"""`moefy bench`: settings as a user writes them, what they load, the level that times it, the record."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from moefy.benchmark.calibrate import calibrate, calibrate_unknown
from moefy.benchmark.engines import choose
from moefy.benchmark.engines.base import AUTO, Models
from moefy.benchmark.layers import LENGTH, Layers, Shape, own_layers, prompt, synthetic
from moefy.benchmark.levels import Sweep, bench_kernel, bench_layer
from moefy.benchmark.levels.model import bench_model
from moefy.errors import MoefyError, unknown_choice
from moefy.experts.loading import open_model
from moefy.experts.moefied import of
from moefy.experts.placement import placement
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.models.checkpoint import Checkpoint
from moefy.run.computing import asked
from moefy.run.console import Reporter

KERNEL, LAYER, MODEL = "kernel", "layer", "model"
BATCHES = {KERNEL: (1, 2, 4, 8, 16), LAYER: (1, 2, 4, 8, 16), MODEL: (1,)}
SAMPLES = {KERNEL: 15, LAYER: 15, MODEL: 7}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CALIBRATED = 512
"""Tokens of the inputs that a full calibration repeats."""

Number = TypeVar("Number", int, float)


@asked
def bench(
    model: str | Path | None = None,
    *,
    level: str | None = None,
    layer: str | None = None,
    against: str | Path | None = None,
    engines: Sequence[str] = (),
    compiled: bool = False,
    linears: bool = False,
    experts: Mapping[str, str | Path] | None = None,
    gguf: Sequence[str | Path] = (),
    batches: str | Sequence[int] | None = None,
    densities: str | Sequence[float] | None = None,
    dtype: str | None = None,
    prompt_tokens: int = 128,
    generated: int = 32,
    samples: int | None = None,
    calibrated: bool = True,
    device: torch.device | str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Time the folder `model`, or a synthetic `layer` written `D,N,E,k`; returns the record.

    `level` is `kernel`, `layer` (if left out, of a shape) or `model` (of a folder), engines as in `choose`. With
    `calibrated`, layers new to this machine are timed first for `auto`. Raises `MoefyError` for wrong settings.
    """
    settings = Settings(
        model=None if model is None else Path(model), layer=layer, dtype=dtype, against=against,
        level=level or (LAYER if model is None else MODEL), prompt=prompt_tokens, generated=generated,
    )  # fmt: skip
    sweep = Sweep(
        engines=choose(engines, compiled=compiled, linears=linears, experts=experts, gguf=gguf),
        batches=_numbers("--batches", batches or BATCHES[settings.level], int, "1,2,4,8,16"),
        densities=_numbers("--densities", densities or (), float, ".1,.25,.5"),
        samples=SAMPLES[settings.level] if samples is None else samples, report=Reporter(quiet=quiet),
    )  # fmt: skip
    run, modules = _load(settings, sweep)
    if calibrated and AUTO in {engine.backend for engine in sweep.engines}:
        calibrate_unknown(modules, sweep.report)
    return run()


def calibrate_machine(
    model: str | Path | None = None,
    *,
    layer: str | None = None,
    dtype: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Calibrate this machine for the layers of a folder, or for a synthetic one; returns the record.

    Raises `MoefyError` for settings that are wrong, and on a GPU.
    """
    folder = None if model is None else Path(model)
    settings = Settings(model=folder, layer=layer, level=KERNEL, dtype=dtype)
    return calibrate(_layers(settings, CALIBRATED), report=Reporter(quiet=quiet))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is timed, as `bench` is given it. Raises `MoefyError` for what is wrong or does not go together."""

    model: Path | None
    layer: str | None
    level: str
    dtype: str | None
    against: str | Path | None = None
    prompt: int = 1
    generated: int = 1

    def __post_init__(self) -> None:
        if (self.model is None) == (self.layer is None):
            got = "neither" if self.model is None else "both"
            raise MoefyError(f"got {got} of a model folder and --layer D,N,E,k; give one of them")
        if self.level not in BATCHES:
            raise MoefyError(unknown_choice("level", self.level, BATCHES))
        if self.dtype is not None and self.dtype not in DTYPES:
            raise MoefyError(unknown_choice("dtype", self.dtype, DTYPES))
        if self.level == MODEL and self.model is None:
            raise MoefyError("--layer does not go with --level model; use --level kernel or layer")
        if self.level != MODEL and self.against is not None:
            raise MoefyError(f"--against goes with --level model, not with --level {self.level}")
        for name, value in (("--prompt-tokens", self.prompt), ("--new-tokens", self.generated)):
            if value < 1:
                raise MoefyError(f"{name} {value}: expected 1 or more")

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype that models run in; None is what this machine runs best."""
        return DTYPES.get(self.dtype or "")

    def placed(self, weights: Checkpoint) -> dict[str, Any]:
        """Device and dtype of others that are loaded beside this checkpoint."""
        return placement(weights) | ({} if self.dtype is None else {"dtype": self.torch_dtype})


def _numbers(
    name: str, values: str | Sequence[Number], kind: type[Number], example: str
) -> list[Number]:
    """Numbers, or a text of them by comma."""
    try:
        parts = values.split(",") if isinstance(values, str) else values
        return [kind(part) for part in parts]
    except ValueError:
        raise MoefyError(f"{name} {values}: expected numbers by comma, such as {example}") from None


def _load(settings: Settings, sweep: Sweep) -> tuple[Callable[[], dict[str, Any]], list[SparseMlp]]:
    """What times layers or models of the settings, loaded, and the layers among which `auto` chooses."""
    if settings.level != MODEL:
        layers = _layers(settings, max(sweep.batches))
        level = bench_kernel if settings.level == KERNEL else bench_layer
        return partial(level, layers, sweep), layers.modules
    if sweep.densities:
        raise MoefyError("--densities does not go with --level model; use --level kernel or layer")
    models, weights, what = _models(settings)
    tokens = settings.prompt + settings.generated
    vocabulary = _vocabulary(models.sparse, settings)
    ids = prompt(weights.folder, vocabulary, max(sweep.batches), tokens)
    run = partial(bench_model, models, ids, sweep, what=what, generated=settings.generated)
    return run, [*sparse_mlps(models.sparse).values()]


def _layers(settings: Settings, tokens: int) -> Layers:
    """Layers of the folder with their inputs, or synthetic ones."""
    if settings.model is None:
        shape = Shape.parse(settings.layer or "")
        return synthetic(shape, dtype=DTYPES[settings.dtype or "float32"], tokens=tokens)
    model = open_model(settings.model, dtype=settings.torch_dtype, dense=False)
    weights, artefact = of(model).checkpoint, of(model).artefact
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", LENGTH)
    length = min(LENGTH, positions)
    ids = prompt(weights.folder, _vocabulary(model, settings), -(-tokens // length), length)
    return own_layers(model, str(artefact.source["name"]), ids, tokens=tokens)


def _models(settings: Settings) -> tuple[Models, Checkpoint, str]:
    """The folder and the stock model of the same weights or another one; its weights; both in words."""
    assert settings.model is not None
    sparse = open_model(settings.model, dtype=settings.torch_dtype, dense=False)
    weights, what = of(sparse).checkpoint, str(of(sparse).artefact.source["name"])
    dense = open_model(settings.against or settings.model, dtype=sparse.dtype, dense=True)
    what += "" if settings.against is None else f" against {settings.against}"
    return Models(dense, sparse, settings.placed(weights)), weights, what


def _vocabulary(model: PreTrainedModel, settings: Settings) -> int:
    size = getattr(model.config.get_text_config(), "vocab_size", None)
    if size is None:
        raise MoefyError(
            f"{settings.model}: {type(model).__name__} reads no text; use --layer D,N,E,k"
        )
    return int(size)
