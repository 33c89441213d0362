"""Which experts run for a token: routers score them, selections choose, compensations stand in.

Three tables, one file per entry; a new one is a file and a line here, or `package.module:Name` in a
recipe. Scores, masks and means cover the *routed* experts only: shared experts always run and are
none of a router's business.

Shapes: T tokens, D width, N neurons, E routed experts, K experts that run, F neurons per expert.
"""

from importlib import import_module
from typing import Any, TypeVar

from moefy.errors import RecipeError, unknown_choice
from moefy.routing.base import Compensation, Router, Selection
from moefy.routing.centroid import CentroidRouter
from moefy.routing.conditional_mean import ConditionalMean
from moefy.routing.linear import LinearRouter
from moefy.routing.mlp import MlpRouter
from moefy.routing.nothing import NoCompensation
from moefy.routing.oracle import OracleRouter, expert_norms
from moefy.routing.softmax_topk import SoftmaxTopK
from moefy.routing.threshold import Threshold
from moefy.routing.topk import TopK

ROUTERS: dict[str, type[Router]] = {
    "linear": LinearRouter,
    "mlp": MlpRouter,
    "centroid": CentroidRouter,
    "oracle": OracleRouter,
}
SELECTIONS: dict[str, type[Selection]] = {
    "topk": TopK,
    "threshold": Threshold,
    "softmax_topk": SoftmaxTopK,
}
COMPENSATIONS: dict[str, type[Compensation]] = {
    "none": NoCompensation,
    "conditional_mean": ConditionalMean,
}

T = TypeVar("T")


def choose(table: dict[str, type[T]], what: str, name: str) -> type[T]:
    """The entry called `name`, or the class at `package.module:Name`.

    Raises `RecipeError` naming the nearest entry where there is none.
    """
    if name in table:
        return table[name]
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            found: Any = getattr(import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise RecipeError(f"{what} '{name}': cannot be imported: {error}") from None
        return found  # type: ignore[no-any-return]
    raise RecipeError(unknown_choice(what, name, table))


__all__ = [
    "COMPENSATIONS",
    "ROUTERS",
    "SELECTIONS",
    "Compensation",
    "Router",
    "Selection",
    "choose",
    "expert_norms",
]
