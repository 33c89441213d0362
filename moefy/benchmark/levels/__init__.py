"""The levels of `moefy bench`: what a sweep is asked for, and the levels `kernel` and `layer`; `model` has the third.

`bench_kernel` times the experts alone, with masks given that were drawn at random; `bench_layer` the
module as models run it, router, selection and compensation included. Cases are prepared, checked, timed and
recorded one after the other.

Shapes: T tokens, D width, E experts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import Any, TypeVar

import torch

from moefy.benchmark.checks import Exact, checked, exact
from moefy.benchmark.costs import (
    LEAST_SAMPLES,
    Run,
    active_parameters,
    dense_parameters,
    layer_bytes,
    percentiles,
    read_bandwidth,
    side_by_side,
)
from moefy.benchmark.costs import density as share_of
from moefy.benchmark.costs import union as union_of
from moefy.benchmark.engines import choose
from moefy.benchmark.engines.base import AUTO, MASKED, Call, Engine, Unavailable
from moefy.benchmark.layers import Case, Layers, drawn_masks
from moefy.benchmark.record import Facts, cell, record
from moefy.errors import MoefyError
from moefy.methods.tables import SELECTIONS
from moefy.run.console import Reporter

ROUTER = "router and selection"
Checked = TypeVar("Checked")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Engines, and the sizes they are timed at. Raises `MoefyError` for what cannot be timed."""

    engines: Sequence[Engine] = field(default_factory=choose)
    batches: Sequence[int] = (1,)
    densities: Sequence[float] = ()
    """None is that of the layers themselves."""
    samples: int = 15
    report: Reporter = field(default_factory=lambda: Reporter(quiet=True))

    def __post_init__(self) -> None:
        few = self.batches
        if not few or min(few) < 1 or len(set(few)) < len(few):
            raise MoefyError(f"--batches {_listed(few)}: expected different numbers from 1 on")
        if any(not 0 < density <= 1 for density in self.densities):
            raise MoefyError(
                f"--densities {_listed(self.densities)}: expected numbers above 0, at most 1"
            )
        if self.samples < LEAST_SAMPLES:
            raise MoefyError(
                f"--samples {self.samples}: fewer than {LEAST_SAMPLES} say nothing of noise"
            )


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def admit(
    engines: Iterable[Engine], check: Callable[[Engine], Checked]
) -> tuple[dict[str, Checked], dict[str, str]]:
    """What `check` makes of every engine, by label, and why the others are not timed.

    What an engine fails with is its reason. Raises `MoefyError` for a file or folder that is none.
    """
    admitted: dict[str, Checked] = {}
    refused: dict[str, str] = {}
    for engine in engines:
        try:
            admitted[engine.label] = check(engine)
        except (Unavailable, MoefyError) as reason:
            if engine.path is not None and isinstance(reason, MoefyError):
                raise
            refused[engine.label] = str(reason)
        except Exception as reason:  # another engine may do
            words = str(reason).strip().splitlines()[:1]
            refused[engine.label] = ": ".join(["failed", type(reason).__name__, *words])
    return admitted, refused


def bench_kernel(layers: Layers, sweep: Sweep) -> dict[str, Any]:
    """Time the experts of layers for batches and densities; returns the record.

    Every token runs the same number of experts.
    """

    def cases() -> Iterator[Case]:
        for density in sweep.densities or (None,):
            for batch in sweep.batches:
                masks = drawn_masks(layers.modules, batch, density)
                for module, mask_TE in zip(layers.modules, masks, strict=True):
                    module.density = share_of(mask_TE)  # what `auto` counts with on GPUs
                yield Case(layers, layers.inputs(batch), masks, routed=False, asked=density)

    return _record("kernel", layers, cases(), sweep)


def bench_layer(layers: Layers, sweep: Sweep) -> dict[str, Any]:
    """Time layers with their routers, and the routers alone beside them; returns the record.

    Densities are for synthetic layers, whose top-k is set to them; a model's own layers choose for
    themselves. Raises `MoefyError` for routers and selections that only work within a model.
    """
    for module in layers.modules:
        if module.look_ahead or not module.selection.by_score:
            raise MoefyError(
                f"{layers.what}: a router that looks ahead or a selection by prompt needs the rest of "
                "the model; use --level model, or --level kernel"
            )
    if sweep.densities and not layers.synthetic:
        raise MoefyError(
            "--densities with --level layer is for --layer D,N,E,k; the layers of a model choose "
            "their own"
        )

    topk: Any = SELECTIONS["topk"]

    def cases() -> Iterator[Case]:
        for density in sweep.densities or (None,):
            if density is not None:
                for module in layers.modules:
                    k = max(1, round(density * module.experts))
                    module.selection, module.density = topk(k=k), k / module.experts
            for batch in sweep.batches:
                inputs = layers.inputs(batch)
                pairs = zip(layers.modules, inputs, strict=True)
                masks = [module.mask(x_TD) for module, x_TD in pairs]
                yield Case(layers, inputs, masks, routed=True, asked=density)

    return _record("layer", layers, cases(), sweep)


@torch.no_grad()
def _record(level: str, layers: Layers, cases: Iterator[Case], sweep: Sweep) -> dict[str, Any]:
    """The record of every engine on every case."""
    weights = layers.first
    bandwidth = read_bandwidth(weights.device)
    cells = []
    for case in cases:
        density = fmean(map(share_of, case.masks))
        sweep.report.say(f"time {level}: batch {case.tokens}, density {density:.2f}")
        cells.append(_cell(level, case, sweep, bandwidth["bytes_per_second"]))
    what = f"{layers.what}; {len(layers.modules)} layers in turn"
    return record(
        level, what, cells, dtype=weights.dtype, device=weights.device, samples=sweep.samples,
        bandwidth=bandwidth,
    )  # fmt: skip


def _cell(level: str, case: Case, sweep: Sweep, bandwidth: float) -> dict[str, Any]:
    wanted = {True: _dense_output(case), False: _output(case)}

    def check(engine: Engine) -> tuple[list[Call], Facts]:
        calls = engine.prepare(level, case)
        return calls, _facts(engine, case, checked(calls[0](), wanted[engine.dense]))

    admitted, refused = admit(sweep.engines, check)
    runs = {name: _walk(calls) for name, (calls, _) in admitted.items()}
    modules = case.layers.modules
    if case.routed:
        pairs = zip(modules, case.inputs, strict=True)
        runs[ROUTER] = _walk([partial(module.mask, x_TD) for module, x_TD in pairs])
    seconds = {n: s / len(modules) for n, s in side_by_side(runs, sweep.samples).items()}
    router = seconds.pop(ROUTER, None)
    read = partial(layer_bytes, whole=False, routed=case.routed)
    place = {
        "phase": level,
        "batch": case.tokens,
        "tokens": case.tokens,
        "density": fmean(map(share_of, case.masks)),
        "asked_density": case.asked,
        "union": fmean(map(union_of, case.masks)),
        "least_bytes": fmean(map(read, modules, case.masks)),
        "router": None if router is None else percentiles(router),
    }
    facts = {name: known for name, (_, known) in admitted.items()}
    return cell(place, seconds, facts, refused, bandwidth)


def _walk(calls: Sequence[Callable[[], object]]) -> Run:
    """All layers one after the other as one call."""

    def walk() -> None:
        for call in calls:
            call()

    return Run([walk])


def _facts(engine: Engine, case: Case, error: float) -> Facts:
    """What one call reads and uses, on average over the layers."""
    modules, masks = case.layers.modules, case.masks
    if engine.dense:
        read = fmean(map(partial(layer_bytes, whole=True, routed=False), modules, masks))
        return Facts(True, error, read, fmean(map(dense_parameters, modules)))
    computed_by = case.layers.first.chosen if engine.backend else engine.name
    if engine.backend not in ("", AUTO, computed_by):
        raise Unavailable(f"does not compute such a layer, {computed_by} takes its place")
    whole, routed = computed_by == MASKED, case.routed
    read = fmean(map(partial(layer_bytes, whole=whole, routed=routed), modules, masks))
    parameters = fmean(map(partial(active_parameters, routed=routed), modules, masks))
    return Facts(False, error, read, parameters, computed_by if engine.backend == AUTO else "")


def _output(case: Case) -> Exact:
    """What the first layer puts out."""
    module, x_TD, mask_TE = case.layers.first, case.inputs[0], case.masks[0]
    extra_TD = module.compensation(x_TD, mask_TE[:, module.shared :]) if case.routed else None
    return exact(module.running, x_TD, mask_TE, extra_TD)


def _dense_output(case: Case) -> Exact:
    x_TD = case.inputs[0]
    every_T1 = torch.ones(len(x_TD), 1, dtype=torch.bool, device=x_TD.device)
    return exact(case.layers.first.weights, x_TD, every_T1)
