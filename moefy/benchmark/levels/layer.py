"""The levels `kernel` and `layer`: cases one after the other, prepared, checked, timed, recorded.

`bench_kernel` times the experts alone, with masks given that were drawn at random; `bench_layer` the
module as models run it, router, selection and compensation included.

Shapes: T tokens, D width, E experts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch

from moefy.benchmark.engines.layer_engines import Call, Case, prepare
from moefy.benchmark.engines.table import AUTO, MASKED, Choice, Unavailable, choose
from moefy.benchmark.layers import Layers, drawn_masks
from moefy.benchmark.moved import active_parameters, dense_parameters, layer_bytes
from moefy.benchmark.moved import density as share_of
from moefy.benchmark.record import Facts, cell, failed, record
from moefy.benchmark.rounding import Exact, checked, exact
from moefy.benchmark.settings import check
from moefy.benchmark.timing import Run, percentiles, read_bandwidth, side_by_side
from moefy.errors import MoefyError
from moefy.experts.backends import BACKENDS
from moefy.methods.tables import SELECTIONS
from moefy.run.console import Reporter

ROUTER = "router and selection"


@torch.no_grad()
def sweep(
    level: str,
    layers: Layers,
    cases: Iterable[Case],
    choices: Sequence[Choice],
    *,
    samples: int,
    report: Reporter | None = None,
) -> dict[str, Any]:
    """Time every engine on every case; returns the record of the run."""
    weights = layers.first.weights.up_ND
    bandwidth = read_bandwidth(weights.device)
    cells = []
    for case in cases:
        if report is not None:
            report.say(f"time {level}: batch {case.tokens}, density {case.density:.2f}")
        cells.append(_cell(level, case, choices, samples, bandwidth["bytes_per_second"]))
    what = f"{layers.what}; {len(layers.modules)} layers in turn"
    return record(
        level, what, cells, dtype=weights.dtype, device=weights.device, samples=samples,
        bandwidth=bandwidth,
    )  # fmt: skip


def _cell(
    level: str, case: Case, choices: Sequence[Choice], samples: int, bandwidth: float
) -> dict[str, Any]:
    calls: dict[str, list[Call]] = {}
    facts: dict[str, Facts] = {}
    refused: dict[str, str] = {}
    wanted = {True: _dense_output(case), False: _output(case)}
    for choice in choices:
        try:
            made = prepare(choice, case)
            error = checked(made[0](), wanted[choice.dense])
            facts[choice.label] = _facts(choice, case, error)
            calls[choice.label] = made
        except Exception as reason:  # another engine may do
            refused[choice.label] = failed(reason)
    runs = {name: _walk(made) for name, made in calls.items()}
    if case.routed:
        pairs = zip(case.layers.modules, case.inputs, strict=True)
        runs[ROUTER] = _walk([partial(module.mask, x_TD) for module, x_TD in pairs])
    count = len(case.layers.modules)
    seconds = {name: s / count for name, s in side_by_side(runs, samples).items()}
    router = seconds.pop(ROUTER, None)
    least = [
        layer_bytes(module, mask_TE, whole=False, routed=case.routed)
        for module, mask_TE in zip(case.layers.modules, case.masks, strict=True)
    ]
    place = {
        "phase": level,
        "batch": case.tokens,
        "tokens": case.tokens,
        "density": case.density,
        "asked_density": case.asked,
        "union": case.union,
        "least_bytes": fmean(least),
        "router": None if router is None else percentiles(router),
    }
    return cell(place, seconds, facts, refused, bandwidth)


def _walk(calls: Sequence[Callable[[], object]]) -> Run:
    """All layers one after the other as one call."""

    def walk() -> None:
        for call in calls:
            call()

    return Run([walk])


def _facts(choice: Choice, case: Case, error: float) -> Facts:
    """What one call moves and uses, on average over the layers."""
    pairs = list(zip(case.layers.modules, case.masks, strict=True))
    if choice.dense:
        moved = [layer_bytes(m, mask_TE, whole=True, routed=False) for m, mask_TE in pairs]
        parameters = [dense_parameters(module) for module, _ in pairs]
        return Facts(True, error, fmean(moved), fmean(parameters))
    chosen = case.layers.first.chosen if choice.name in (*BACKENDS, AUTO) else choice.name
    if choice.name in BACKENDS and chosen != choice.name:
        raise Unavailable(f"does not compute such a layer, {chosen} takes its place")
    moved = [
        layer_bytes(m, mask_TE, whole=chosen == MASKED, routed=case.routed) for m, mask_TE in pairs
    ]
    parameters = [active_parameters(m, mask_TE, routed=case.routed) for m, mask_TE in pairs]
    by = chosen if choice.name == AUTO else ""
    return Facts(False, error, fmean(moved), fmean(parameters), by)


def _output(case: Case) -> Exact:
    """What the first layer puts out."""
    module, x_TD, mask_TE = case.layers.first, case.inputs[0], case.masks[0]
    extra_TD = module.compensation(x_TD, mask_TE[:, module.shared :]) if case.routed else None
    return exact(module.running, x_TD, mask_TE, extra_TD)


def _dense_output(case: Case) -> Exact:
    x_TD = case.inputs[0]
    every_T1 = torch.ones(len(x_TD), 1, dtype=torch.bool, device=x_TD.device)
    return exact(case.layers.first.weights, x_TD, every_T1)


def bench_kernel(
    layers: Layers,
    *,
    batches: Sequence[int] = (1,),
    densities: Sequence[float] = (),
    engines: Sequence[str] = (),
    samples: int = 15,
    report: Reporter | None = None,
) -> dict[str, Any]:
    """Time the experts of layers for batches and densities; no densities is those of the layers.

    Every token runs the same number of experts. `engines` as in `engines.choose`; returns the record.
    """
    check(batches, densities, samples)

    def cases() -> Iterator[Case]:
        for density in densities or (None,):
            for batch in batches:
                masks = drawn_masks(layers.modules, batch, density)
                for module, mask_TE in zip(layers.modules, masks, strict=True):
                    module.density = share_of(mask_TE)  # what `auto` counts with on GPUs
                yield Case(layers, layers.inputs(batch), masks, routed=False, asked=density)

    return sweep("kernel", layers, cases(), choose(engines), samples=samples, report=report)


def bench_layer(
    layers: Layers,
    *,
    batches: Sequence[int] = (1,),
    densities: Sequence[float] = (),
    engines: Sequence[str] = (),
    samples: int = 15,
    report: Reporter | None = None,
) -> dict[str, Any]:
    """Time layers with their routers, and the routers alone beside them.

    `densities` are for synthetic layers, whose top-k is set to them; a model's own layers choose for
    themselves. `engines` as in `engines.choose`; returns the record. Raises `MoefyError` for routers
    and selections that only work within a model.
    """
    check(batches, densities, samples)
    for module in layers.modules:
        if module.look_ahead or not module.selection.by_score:
            raise MoefyError(
                f"{layers.what}: a router that looks ahead or a selection by prompt needs the rest of "
                "the model; use --level model, or --level kernel"
            )
    if densities and not layers.synthetic:
        raise MoefyError(
            "--densities with --level layer is for --layer D,N,E,k; the layers of a model choose "
            "their own"
        )

    def cases() -> Iterator[Case]:
        for density in densities or (None,):
            if density is not None:
                for module in layers.modules:
                    k = max(1, round(density * module.experts))
                    module.selection = SELECTIONS["topk"](k=k)  # type: ignore[call-arg]
                    module.density = k / module.experts
            for batch in batches:
                inputs = layers.inputs(batch)
                pairs = zip(layers.modules, inputs, strict=True)
                masks = [module.mask(x_TD) for module, x_TD in pairs]
                yield Case(layers, inputs, masks, routed=True, asked=density)

    return sweep("layer", layers, cases(), choose(engines), samples=samples, report=report)
