"""moefy turns the MLPs of a trained transformer into experts.

    import moefy
    moefy.convert("path/to/model", "out", recipe=moefy.Recipe(density=0.25))
    model = moefy.load("out")

Importing this package loads neither torch nor transformers.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moefy.convert import convert as convert
    from moefy.difference import diff as diff
    from moefy.experts_interface import register_experts as register_experts
    from moefy.inspection import inspect as inspect
    from moefy.modeling import load as load
    from moefy.native_linears import native_linears as native_linears
    from moefy.prune import prune as prune
    from moefy.recipe import Recipe as Recipe
    from moefy.recover import recover as recover
    from moefy.sparsify import sparsify as sparsify
    from moefy.training_recipe import RecoverRecipe as RecoverRecipe
    from moefy.training_recipe import SparsifyRecipe as SparsifyRecipe

__version__ = "0.1.0"

_HOME = {
    "convert": "moefy.convert",
    "diff": "moefy.difference",
    "inspect": "moefy.inspection",
    "load": "moefy.modeling",
    "native_linears": "moefy.native_linears",
    "prune": "moefy.prune",
    "recover": "moefy.recover",
    "register_experts": "moefy.experts_interface",
    "Recipe": "moefy.recipe",
    "RecoverRecipe": "moefy.training_recipe",
    "sparsify": "moefy.sparsify",
    "SparsifyRecipe": "moefy.training_recipe",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'moefy' has no attribute '{name}'")


class _Package(ModuleType):
    """Importing the module `moefy.convert` must not put it in the place of the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
