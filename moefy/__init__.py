"""moefy turns the MLPs of a trained transformer into experts.

    import moefy
    moefy.conversion.convert("path/to/model", "out", recipe=moefy.Recipe(density=0.25))
    model = moefy.load("out")

Importing this package loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moefy.conversion.convert import convert as convert
    from moefy.experts.backends.cpu import native_linears as native_linears
    from moefy.experts.backends.stock_moe import register_experts as register_experts
    from moefy.experts.loading import load as load
    from moefy.inspection.diff import diff as diff
    from moefy.inspection.inspect import inspect as inspect
    from moefy.inspection.removal.prune import prune as prune
    from moefy.recipe import Recipe as Recipe
    from moefy.training.recipe import RecoverRecipe as RecoverRecipe
    from moefy.training.recipe import SparsifyRecipe as SparsifyRecipe
    from moefy.training.recover import recover as recover
    from moefy.training.sparsify import sparsify as sparsify

__version__ = "0.1.0"

_HOME = {
    "convert": "moefy.conversion.convert",
    "diff": "moefy.inspection.diff",
    "inspect": "moefy.inspection.inspect",
    "load": "moefy.experts.loading",
    "native_linears": "moefy.experts.backends.cpu",
    "prune": "moefy.inspection.removal.prune",
    "recover": "moefy.training.recover",
    "register_experts": "moefy.experts.backends.stock_moe",
    "Recipe": "moefy.recipe",
    "RecoverRecipe": "moefy.training.recipe",
    "sparsify": "moefy.training.sparsify",
    "SparsifyRecipe": "moefy.training.recipe",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'moefy' has no attribute '{name}'")
