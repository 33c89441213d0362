"""Cases of the levels `kernel` and `layer`, one after the other: prepare, check, time, record.

Shapes: T tokens, D width, E experts.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import torch

from moefy.bench.bandwidth import read_bandwidth
from moefy.bench.cells import Facts, cell, failed, record
from moefy.bench.engines import AUTO, MASKED, Choice, Unavailable
from moefy.bench.layer_engines import Call, Case, prepare
from moefy.bench.layers import Layers
from moefy.bench.moved import active_parameters, dense_parameters, layer_bytes
from moefy.bench.rounding import Exact, checked, exact
from moefy.bench.timing import Run, percentiles, side_by_side
from moefy.console import Reporter
from moefy.sparse_mlp import BACKENDS

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
