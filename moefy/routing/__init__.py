"""Which experts run for a token: routers score them, selections choose, compensations stand in.

Three tables, one file per entry; a new one is a file and a line here, or `package.module:Name` in a
recipe. Scores, masks and means cover the *routed* experts only: shared experts always run and are
none of a router's business.

Shapes: T tokens, D width, N neurons, E routed experts, K experts that run, F neurons per expert.
"""

from importlib import import_module
from typing import Any, TypeVar

from moefy.errors import RecipeError, unknown_choice
from moefy.routing.activation import ActivationRouter
from moefy.routing.base import Compensation, Context, Router, Selection
from moefy.routing.centred import Centred
from moefy.routing.centred_residual import CentredResidual
from moefy.routing.centroid import CentroidRouter
from moefy.routing.conditional_mean import ConditionalMean
from moefy.routing.dynamic_k import DynamicK
from moefy.routing.largest_inputs import LargestInputsRouter
from moefy.routing.linear import LinearRouter
from moefy.routing.losses import LOSSES
from moefy.routing.low_bit import LowBitRouter
from moefy.routing.low_rank import LowRankRouter
from moefy.routing.mean import MeanOutput
from moefy.routing.mean_gate import MeanGateRouter
from moefy.routing.mean_residual import MeanResidual
from moefy.routing.mlp import MlpRouter
from moefy.routing.norm_regression import NormRouter
from moefy.routing.nothing import NoCompensation
from moefy.routing.oracle import OracleRouter, expert_norms
from moefy.routing.prompt_static import PromptStatic
from moefy.routing.random import RandomRouter
from moefy.routing.representative import RepresentativeRouter
from moefy.routing.residual import Residual
from moefy.routing.self_gating import SelfGatingRouter
from moefy.routing.softmax_topk import SoftmaxTopK
from moefy.routing.static import StaticRouter
from moefy.routing.tanh_mlp import TanhMlpRouter
from moefy.routing.targets import TARGETS
from moefy.routing.threshold import Threshold
from moefy.routing.top_p import TopP
from moefy.routing.topk import TopK

ROUTERS: dict[str, type[Router]] = {
    "linear": LinearRouter,
    "largest_inputs": LargestInputsRouter,
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
    "LOSSES",
    "ROUTERS",
    "SELECTIONS",
    "TARGETS",
    "Compensation",
    "Context",
    "Router",
    "Selection",
    "choose",
    "expert_norms",
]
