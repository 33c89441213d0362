"""moefy turns the MLPs of a trained transformer into experts.

    import moefy
    moefy.convert("path/to/model", "out", recipe=moefy.Recipe(density=0.25))
    model = moefy.load("out")

Importing this package loads neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moefy.benchmark.bench import bench as bench
    from moefy.benchmark.pareto import compare as compare
    from moefy.conversion.convert import convert as convert
    from moefy.data.corpus import load_corpus as load_corpus
    from moefy.data.inputs import load_tokenizer as load_tokenizer
    from moefy.errors import MoefyError as MoefyError
    from moefy.evaluation import statistics as statistics
    from moefy.evaluation.folder import evaluate as evaluate
    from moefy.experts.backends.cpu import native_linears as native_linears
    from moefy.experts.backends.stock_moe import register_experts as register_experts
    from moefy.experts.loading import load as load
    from moefy.experts.loading import open_model as open_model
    from moefy.experts.sparse_mlp import all_experts as all_experts
    from moefy.exporting.export import export as export
    from moefy.inspection.diff import diff as diff
    from moefy.inspection.inspect import inspect as inspect
    from moefy.inspection.record import Inspection as Inspection
    from moefy.inspection.removal.prune import prune as prune
    from moefy.methods.base import Compensation as Compensation
    from moefy.methods.base import Router as Router
    from moefy.methods.base import Selection as Selection
    from moefy.models.lora import permute_adapter as permute_adapter
    from moefy.models.reorder import revert as revert
    from moefy.recipe import Recipe as Recipe
    from moefy.training.recipe import RecoverRecipe as RecoverRecipe
    from moefy.training.recipe import SparsifyRecipe as SparsifyRecipe
    from moefy.training.recover import recover as recover
    from moefy.training.sparsify import sparsify as sparsify

__version__ = "0.1.0"

_HOME = {
    "all_experts": "moefy.experts.sparse_mlp",
    "bench": "moefy.benchmark.bench",
    "compare": "moefy.benchmark.pareto",
    "Compensation": "moefy.methods.base",
    "convert": "moefy.conversion.convert",
    "diff": "moefy.inspection.diff",
    "evaluate": "moefy.evaluation.folder",
    "export": "moefy.exporting.export",
    "inspect": "moefy.inspection.inspect",
    "Inspection": "moefy.inspection.record",
    "load": "moefy.experts.loading",
    "load_corpus": "moefy.data.corpus",
    "load_tokenizer": "moefy.data.inputs",
    "MoefyError": "moefy.errors",
    "native_linears": "moefy.experts.backends.cpu",
    "open_model": "moefy.experts.loading",
    "permute_adapter": "moefy.models.lora",
    "prune": "moefy.inspection.removal.prune",
    "recover": "moefy.training.recover",
    "Recipe": "moefy.recipe",
    "RecoverRecipe": "moefy.training.recipe",
    "register_experts": "moefy.experts.backends.stock_moe",
    "revert": "moefy.models.reorder",
    "Router": "moefy.methods.base",
    "Selection": "moefy.methods.base",
    "sparsify": "moefy.training.sparsify",
    "SparsifyRecipe": "moefy.training.recipe",
    "statistics": "moefy.evaluation.statistics:",
}
"""Where a name lives, and what it is called there if otherwise (nothing after `:` is the module itself)."""
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moefy' has no attribute '{name}'")
    home, colon, inside = _HOME[name].partition(":")
    module = import_module(home)
    return module if colon and not inside else getattr(module, inside or name)
