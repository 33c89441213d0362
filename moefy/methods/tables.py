"""Which experts run for a token: routers score them, selections choose, compensations stand in.

Three tables, one file per entry; a new one is a file and a line here, or `package.module:Name` in a
recipe. Scores, masks and means cover the *routed* experts only: shared experts always run and are
none of a router's business.

Shapes: T tokens, D width, N neurons, E routed experts, K experts that run, F neurons per expert.
"""

from importlib import import_module
from typing import Any, TypeVar

from moefy.errors import RecipeError, unknown_choice
from moefy.methods.base import Compensation, Context, NoCompensation, Router, Selection
from moefy.methods.compensations.centred import Centred, CentredResidual
from moefy.methods.compensations.mean import ConditionalMean, MeanOutput
from moefy.methods.compensations.residual import MeanResidual, Residual
from moefy.methods.losses import LOSSES
from moefy.methods.routers.centroid import CentroidRouter
from moefy.methods.routers.largest_inputs import LargestInputsRouter
from moefy.methods.routers.linear import LinearRouter
from moefy.methods.routers.low_bit import LowBitRouter
from moefy.methods.routers.low_rank import LowRankRouter
from moefy.methods.routers.mean_gate import MeanGateRouter
from moefy.methods.routers.mlp import MlpRouter
from moefy.methods.routers.norm_regression import NormRouter
from moefy.methods.routers.oracle import ActivationRouter, OracleRouter, expert_norms
from moefy.methods.routers.random import RandomRouter
from moefy.methods.routers.representative import RepresentativeRouter
from moefy.methods.routers.self_gating import SelfGatingRouter
from moefy.methods.routers.static import StaticRouter
from moefy.methods.routers.tanh_mlp import TanhMlpRouter
from moefy.methods.selections.dynamic_k import DynamicK
from moefy.methods.selections.prompt_static import PromptStatic
from moefy.methods.selections.softmax_topk import SoftmaxTopK
from moefy.methods.selections.threshold import Threshold
from moefy.methods.selections.top_p import TopP
from moefy.methods.selections.topk import TopK
from moefy.methods.targets import TARGETS

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
