"""Level `layer`: the module as models run it, router, selection and compensation included."""

from collections.abc import Iterator, Sequence
from typing import Any

from moefy.bench.engines import choose
from moefy.bench.layer_engines import Case
from moefy.bench.layers import Layers
from moefy.bench.settings import check
from moefy.bench.sweep import sweep
from moefy.console import Reporter
from moefy.errors import MoefyError
from moefy.routing import SELECTIONS


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
