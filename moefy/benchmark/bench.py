"""`moefy bench`: settings as a user writes them, what they load, the level that times it, the record.

And `moefy calibrate`, which times every CPU path of a layer on a grid, for `auto` to choose by. `moefy bench`
does so by itself, coarsely and for a few seconds, where nothing is known of such a layer on this machine. What
is measured is kept by `moefy_kernels.cpu.times`, per shape, dtype and number of threads. Routing is at random;
a path that is hopeless for few tokens is not waited for with many.

Shapes: T tokens, D width.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.benchmark.costs import Run, Seconds, side_by_side
from moefy.benchmark.engines import choose
from moefy.benchmark.engines.base import AUTO, Models
from moefy.benchmark.layers import (
    COPIES,
    LENGTH,
    Layers,
    Shape,
    drawn_masks,
    own_layers,
    prompt,
    synthetic,
)
from moefy.benchmark.levels import Sweep, bench_kernel, bench_layer
from moefy.benchmark.levels.model import bench_model
from moefy.errors import MoefyError, unknown_choice
from moefy.experts.backends import BACKENDS, able, fastest
from moefy.experts.backends.base import CPU, Request, Workload, kernel_layer
from moefy.experts.loading import open_model
from moefy.experts.moefied import of
from moefy.experts.placement import placement
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.models.checkpoint import Checkpoint
from moefy.run.computing import DTYPES, asked
from moefy.run.console import Reporter
from moefy_kernels.cpu import times
from moefy_kernels.cpu.experts import DTYPES as TIMED

KERNEL, LAYER, MODEL = "kernel", "layer", "model"
BATCHES = {KERNEL: (1, 2, 4, 8, 16), LAYER: (1, 2, 4, 8, 16), MODEL: (1,)}
SAMPLES = {KERNEL: 15, LAYER: 15, MODEL: 7}
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
    seed: int = 0,
    device: torch.device | str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Time the folder `model`, or a synthetic `layer` written `D,N,E,k`; returns the record.

    `level` is `kernel`, `layer` (if left out, of a shape) or `model` (of a folder), engines as in `choose`. With
    `calibrated`, layers new to this machine are timed first for `auto`. `seed` draws synthetic weights, inputs and
    random token ids. Raises `MoefyError` for wrong settings.
    """
    settings = Settings(
        model=None if model is None else Path(model), layer=layer, dtype=dtype, against=against,
        level=level or (LAYER if model is None else MODEL), prompt=prompt_tokens, generated=generated,
        seed=seed,
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
    seed: int = 0

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
    ids = prompt(weights.folder, vocabulary, max(sweep.batches), tokens, settings.seed)
    run = partial(bench_model, models, ids, sweep, what=what, generated=settings.generated)
    return run, [*sparse_mlps(models.sparse).values()]


def _layers(settings: Settings, tokens: int) -> Layers:
    """Layers of the folder with their inputs, or synthetic ones."""
    if settings.model is None:
        shape = Shape.parse(settings.layer or "")
        dtype = DTYPES[settings.dtype or "float32"]
        return synthetic(shape, dtype=dtype, tokens=tokens, seed=settings.seed)
    model = open_model(settings.model, dtype=settings.torch_dtype, dense=False)
    weights, artefact = of(model).checkpoint, of(model).artefact
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", LENGTH)
    length = min(LENGTH, positions)
    rows, seed = -(-tokens // length), settings.seed
    ids = prompt(weights.folder, _vocabulary(model, settings), rows, length, seed)
    return own_layers(model, str(artefact.source["name"]), ids, tokens=tokens, seed=seed)


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


LONG = 0.2
"""Seconds of a call from which on one sample has to do."""
HOPELESS = 4.0
"""Times slower than the fastest: from there on a long call is taken to grow with the tokens."""


@dataclass(frozen=True)
class Grid:
    """What is timed; both axes rise."""

    tokens: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 512)
    densities: Sequence[float] = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0)
    samples: int = 5
    budget: float = math.inf
    """Seconds after which what is left of the grid follows from fewer tokens."""


COARSE = Grid(tokens=(1, 8, 64), densities=(0.25, 1.0), samples=3, budget=5.0)


@torch.no_grad()
def calibrate(
    layers: Layers, grid: Grid | None = None, report: Reporter | None = None
) -> dict[str, Any]:
    """Time `layers` (of one shape) by every path that serves them; returns what was kept, and where.

    Raises `MoefyError` on a GPU, whose tables are checked in, and in dtypes without times of their own.
    """
    grid, report = grid or Grid(), report or Reporter(quiet=True)
    experts, weights = layers.first.experts, layers.first.weights
    if weights.up_ND.device.type != CPU or weights.up_ND.dtype not in TIMED:
        raise MoefyError(
            f"calibration measures CPUs, in float32 or bfloat16: got {weights.up_ND.dtype} on "
            f"{weights.up_ND.device}"
        )
    shape = kernel_layer(layers.inputs_TD[0], weights, experts)
    request = Request(layers.inputs_TD[0], weights, torch.ones(1, experts, dtype=torch.bool))
    work = Workload(CPU, shape, 1, 1.0)
    paths = [path for path in able(request) if BACKENDS[path].seconds(work) < math.inf]
    seconds = _times(paths, layers, grid, report)
    entry = {
        "layer": list(shape),
        "threads": torch.get_num_threads(),
        "tokens": list(grid.tokens),
        "densities": list(grid.densities),
        "seconds": {path: seconds[n].tolist() for n, path in enumerate(paths)},
        "when": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}",
    }
    file = times.keep([entry])
    fastest.cache_clear()
    return {"kind": "calibration", "what": layers.what, "file": str(file), "entry": entry}


def _times(paths: list[str], layers: Layers, grid: Grid, report: Reporter) -> Seconds:
    """Seconds of one call by path, tokens and densities."""
    seconds = np.zeros((len(paths), len(grid.tokens), len(grid.densities)))
    until = time.perf_counter() + grid.budget
    places = list(product(enumerate(grid.tokens), enumerate(grid.densities)))
    for (i, tokens), (j, density) in report.track(places, "time every path"):
        expected = seconds[:, i - 1, j] * tokens / grid.tokens[i - 1] if i else np.zeros(len(paths))
        late = i > 0 and time.perf_counter() > until
        long = max(LONG, HOPELESS * expected.min())
        left = {}
        for n, path in enumerate(paths):
            if late or expected[n] > long:
                seconds[n, i, j] = expected[n]
            elif path == "masked" and j:
                seconds[n, i, j] = seconds[n, i, 0]  # computes every neuron anyway
            else:
                left[path] = n
        once = expected.min() > LONG
        runs = _runs(list(left), layers, tokens, density)
        taken = side_by_side(runs, 1 if once else grid.samples, warmup=0 if once else 1)
        for path, n in left.items():
            seconds[n, i, j] = np.median(taken[path])
    return seconds


def calibrate_unknown(modules: Sequence[SparseMlp], report: Reporter) -> dict[str, Any] | None:
    """Calibrate coarsely for layers of which nothing is known here, and say so; returns the record, if any.

    Layers that no CPU path but `masked` computes, and those on a GPU, need none.
    """
    weights, mlp = modules[0], modules[0].weights
    if weights.device.type != CPU or weights.dtype not in TIMED:
        return None
    threads = torch.get_num_threads()
    layer = kernel_layer(mlp.up_ND, mlp, weights.experts)
    if times.knows(layer, threads):
        return None
    dtype = str(weights.dtype).removeprefix("torch.")
    report.say(
        f"calibrate: first run with such layers in {dtype} and {threads} thread(s) on this machine, some "
        "seconds (--no-calibrate skips it)"
    )
    few = list(modules[:COPIES])
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(COARSE.tokens[-1], layer.width, generator=generator).to(weights.dtype)
    return calibrate(Layers("coarse calibration", few, [x_TD] * len(few), synthetic=True), COARSE)


def _runs(paths: list[str], layers: Layers, tokens: int, density: float) -> dict[str, Run]:
    masks = drawn_masks(layers.modules, tokens, density)
    # Only a batch of which one layer's weights would stay in a cache needs several layers.
    count = len(layers.modules) if tokens <= times.FEW else 1

    def call(path: str, n: int) -> Callable[[], Tensor]:
        x_TD = layers.inputs_TD[n]
        repeats = -(-tokens // len(x_TD))
        x_TD = x_TD.repeat(repeats, 1)[:tokens].contiguous()
        return partial(BACKENDS[path].compute, x_TD, layers.modules[n].weights, masks[n])

    return {path: Run([call(path, n) for n in range(count)]) for path in paths}
