"""What `moefy bench` is asked for: settings as a user writes them, what they load, which level they reach."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moefy.benchmark.calibrate import calibrate, calibrate_unknown
from moefy.benchmark.engines.table import AUTO, choose
from moefy.benchmark.layers import LENGTH, Layers, Shape, own_layers, synthetic
from moefy.benchmark.levels.layer import bench_kernel, bench_layer
from moefy.benchmark.levels.model import bench_model
from moefy.benchmark.prompts import prompt
from moefy.benchmark.settings import check, parse_batches, parse_densities
from moefy.errors import MoefyError, unknown_choice
from moefy.experts.loading import open_model
from moefy.experts.moefied import of
from moefy.experts.placement import placement
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.run.console import Reporter

KERNEL, LAYER, MODEL = LEVELS = ("kernel", "layer", "model")
BATCHES = {KERNEL: "1,2,4,8,16", LAYER: "1,2,4,8,16", MODEL: "1"}
SAMPLES = {KERNEL: 15, LAYER: 15, MODEL: 7}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bench(
    model: Path | None = None,
    *,
    level: str | None = None,
    layer: str | None = None,
    against: str | None = None,
    engines: Sequence[str] = (),
    batches: str | None = None,
    densities: str | None = None,
    dtype: str | None = None,
    prompt_tokens: int = 128,
    generated: int = 32,
    samples: int | None = None,
    calibrated: bool = True,
    quiet: bool = False,
) -> dict[str, Any]:
    """Time the folder `model`, or a synthetic `layer` written `D,N,E,k`; returns the record.

    `level` is `kernel`, `layer` or `model`: `model` for a folder and `layer` for a shape where it is left
    out. With `calibrated`, paths that `auto` chooses among are timed first, for some seconds, where nothing
    is known of such layers on this machine. Raises `MoefyError` for settings that are wrong or do not go
    together.
    """
    level = level or (MODEL if model is not None else LAYER)
    _check_together(model, level, layer, against, densities, dtype)
    for name, value in (("--prompt", prompt_tokens), ("--generated", generated)):
        if value < 1:
            raise MoefyError(f"{name} {value}: expected 1 or more")
    many = parse_batches(batches or BATCHES[level])
    shares = [] if densities is None else parse_densities(densities)
    count = SAMPLES[level] if samples is None else samples
    # What is wrong is said before anything is loaded.
    check(many, shares, count)
    calibrated &= any(choice.base == AUTO for choice in choose(engines))
    report = Reporter(quiet=quiet)
    common: dict[str, Any] = {
        "batches": many, "engines": engines, "samples": count, "report": report,
    }  # fmt: skip
    if level == MODEL:
        assert model is not None
        return _model(model, against, dtype, prompt_tokens, generated, common, calibrated)
    layers = _layers(model, layer, dtype, max(many))
    if calibrated:
        calibrate_unknown(layers.modules, report)
    run = bench_kernel if level == KERNEL else bench_layer
    return run(layers, densities=shares, **common)


def _check_together(
    model: Path | None,
    level: str,
    layer: str | None,
    against: str | None,
    densities: str | None,
    dtype: str | None,
) -> None:
    """Raise `MoefyError` for names that are unknown and settings that do not go together."""
    if (model is None) == (layer is None):
        got = "neither" if model is None else "both"
        raise MoefyError(f"bench: got {got} of a model folder and --layer; give one of them")
    if level not in LEVELS:
        raise MoefyError(unknown_choice("level", level, LEVELS))
    if dtype is not None and dtype not in DTYPES:
        raise MoefyError(unknown_choice("dtype", dtype, DTYPES))
    if level == MODEL and (model is None or densities is not None):
        wrong = "--layer" if model is None else "--densities"
        raise MoefyError(
            f"bench: {wrong} does not go with --level model; use --level kernel or layer"
        )
    if level != MODEL and against is not None:
        raise MoefyError(f"bench: --against goes with --level model, not with --level {level}")


def calibrate_for(
    model: Path | None, layer: str | None, dtype: str | None, *, quiet: bool = False
) -> dict[str, Any]:
    """Calibrate this machine for the layers of a folder, or for a synthetic one; returns the record."""
    if (model is None) == (layer is None):
        raise MoefyError("bench --calibrate: give either a model folder or --layer D,N,E,k")
    if dtype is not None and dtype not in DTYPES:
        raise MoefyError(unknown_choice("dtype", dtype, DTYPES))
    return calibrate(_layers(model, layer, dtype, 512), report=Reporter(quiet=quiet))


def _layers(model: Path | None, layer: str | None, dtype: str | None, tokens: int) -> Layers:
    if model is not None:
        return _own(model, dtype, tokens)
    return synthetic(Shape.parse(layer or ""), dtype=DTYPES[dtype or "float32"], tokens=tokens)


def _vocabulary(model: PreTrainedModel, folder: Path) -> int:
    found = getattr(model.config.get_text_config(), "vocab_size", None)
    if found is None:
        raise MoefyError(f"{folder}: {type(model).__name__} reads no text; use --layer D,N,E,k")
    return int(found)


def _model(
    folder: Path,
    against: str | None,
    dtype: str | None,
    prompt_tokens: int,
    generated: int,
    common: dict[str, Any],
    calibrated: bool,
) -> dict[str, Any]:
    """`bench_model` of a folder, against the stock model of the same weights or another one."""
    sparse = open_model(folder, dtype=DTYPES.get(dtype or ""), dense=False)
    weights, artefact = of(sparse).checkpoint, of(sparse).artefact
    if calibrated:
        calibrate_unknown([*sparse_mlps(sparse).values()], common["report"])
    dense = open_model(against or folder, dtype=sparse.dtype, dense=True)
    tokens = prompt_tokens + generated
    vocabulary = _vocabulary(sparse, folder)
    ids = prompt(weights.folder, vocabulary, max(common["batches"]), tokens)
    what = str(artefact.source["name"]) + ("" if against is None else f" against {against}")
    where = placement(weights) | ({} if dtype is None else {"dtype": DTYPES[dtype]})
    return bench_model(
        dense, sparse, ids, what=what, generated=generated, placement=where, **common
    )


def _own(folder: Path, dtype: str | None, tokens: int) -> Layers:
    """Layers of a folder with their inputs."""
    model = open_model(folder, dtype=DTYPES.get(dtype or ""), dense=False)
    weights, artefact = of(model).checkpoint, of(model).artefact
    vocabulary = _vocabulary(model, folder)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", LENGTH)
    length = min(LENGTH, positions)
    ids = prompt(weights.folder, vocabulary, -(-tokens // length), length)
    return own_layers(model, str(artefact.source["name"]), ids, tokens=tokens)
