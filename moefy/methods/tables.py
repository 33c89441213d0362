"""Which experts run for a token: routers score them, selections choose, compensations stand in.

Three tables; a new entry is a class and a line here, or `package.module:Name` in a
recipe. Scores, masks and means cover the *routed* experts only: shared experts always run and are
none of a router's business.

Shapes: T tokens, D width, N neurons, E routed experts, K experts that run, F neurons per expert.
"""

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any, TypeVar

from moefy.errors import MoefyError, RecipeError, unknown_choice
from moefy.methods.base import Compensation, NoCompensation, Router, Selection
from moefy.methods.compensations import (
    Centred,
    CentredResidual,
    ConditionalMean,
    MeanOutput,
    MeanResidual,
    Residual,
)
from moefy.methods.partition import METHODS
from moefy.methods.routers.baselines import (
    ActivationRouter,
    OracleRouter,
    RandomRouter,
    StaticRouter,
)
from moefy.methods.routers.bit_planes import BitPlanesRouter
from moefy.methods.routers.gates import LargestInputsRouter, SelfGatingRouter
from moefy.methods.routers.learned import (
    LinearRouter,
    LowRankRouter,
    MlpRouter,
    NormRouter,
    TanhMlpRouter,
)
from moefy.methods.routers.low_bit import LowBitRouter
from moefy.methods.routers.rows import CentroidRouter, MeanGateRouter, RepresentativeRouter
from moefy.methods.selections import DynamicK, PromptStatic, SoftmaxTopK, Threshold, TopK, TopP
from moefy.models.families import FAMILIES
from moefy.recipe import shipped

ROUTERS: dict[str, type[Router]] = {
    "linear": LinearRouter,
    "largest_inputs": LargestInputsRouter,
    "bit_planes": BitPlanesRouter,
    "low_bit": LowBitRouter,
    "low_rank": LowRankRouter,
    "mlp": MlpRouter,
    "tanh_mlp": TanhMlpRouter,
    "norm_regression": NormRouter,
    "centroid": CentroidRouter,
    "representative": RepresentativeRouter,
    "mean_gate": MeanGateRouter,
    "self_gating": SelfGatingRouter,
    "activation": ActivationRouter,
    "oracle": OracleRouter,
    "random": RandomRouter,
    "static": StaticRouter,
}
SELECTIONS: dict[str, type[Selection]] = {
    "topk": TopK,
    "threshold": Threshold,
    "dynamic_k": DynamicK,
    "top_p": TopP,
    "prompt_static": PromptStatic,
    "softmax_topk": SoftmaxTopK,
}
COMPENSATIONS: dict[str, type[Compensation]] = {
    "none": NoCompensation,
    "mean": MeanOutput,
    "conditional_mean": ConditionalMean,
    "residual": Residual,
    "mean_residual": MeanResidual,
    "centred": Centred,
    "centred_residual": CentredResidual,
}

T = TypeVar("T")


def choose(table: dict[str, T], what: str, name: str) -> T:
    """The entry called `name`, or what `package.module:Name` names.

    Raises `RecipeError` with the nearest name if there is no such entry.
    """
    if name in table:
        return table[name]
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            found: T = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise RecipeError(f"{what} '{name}': cannot be imported: {error}") from None
        return found
    raise RecipeError(unknown_choice(what, name, table))


def listing(what: str | None = None, **more: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """One table, or all of them with those of other rooms: name -> what it is."""
    tables = {
        "recipes": shipped(),
        "methods": _described(METHODS),
        "routers": _described(ROUTERS),
        "selections": _described(SELECTIONS),
        "compensations": _described(COMPENSATIONS),
        **{name: _described(table) for name, table in more.items()},
        "families": {
            name: f"{row.kind}, {'gated' if row.gate or row.fused else 'plain'} MLP"
            for name, row in FAMILIES.items()
        },
    }
    if what is None:
        return tables
    if what not in tables:
        raise MoefyError(unknown_choice("table", what, tables))
    return {what: tables[what]}


def _described(table: Mapping[str, Any]) -> dict[str, str]:
    """Entries with the first paragraph of their documentation."""
    works = {n: getattr(row, "run", getattr(row, "compute", row)) for n, row in table.items()}
    texts = {name: inspect.getdoc(work) or "" for name, work in works.items()}
    return {name: " ".join(text.split("\n\n")[0].split()) for name, text in texts.items()}
