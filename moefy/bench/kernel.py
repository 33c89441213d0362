"""Level `kernel`: the experts alone, with masks given that were drawn at random."""

from collections.abc import Iterator, Sequence
from typing import Any

from moefy.bench.engines import choose
from moefy.bench.layer_engines import Case
from moefy.bench.layers import Layers, drawn_masks
from moefy.bench.moved import density as share_of
from moefy.bench.settings import check
from moefy.bench.sweep import sweep
from moefy.console import Reporter


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
