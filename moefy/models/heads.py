"""Find the attention heads of a transformers model.

    for site in head_sites(model):
        heads = read_heads(site, model.get_parameter)

The output of an attention block is a sum over its heads: `y = b + sum_h z_h O_h`, with `z_h` what head
`h` puts out and `O_h` its rows of the output projection. Rows of `moefy.models.families` say where blocks
are; this module reads no files and changes no model.

Shapes: T tokens, D model width, H heads, N = H * (width of a head).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moefy.errors import UnsupportedModel
from moefy.models.families import FAMILIES, Attention, config_value
from moefy.models.locate import Place, matching
from moefy.models.mlp import HeadOutputs


@dataclass(frozen=True, kw_only=True)
class Spot:
    """A module whose input is looked at: a `Place` and nothing more."""

    index: int
    layer: str
    module: str
    width: int


@dataclass(frozen=True, kw_only=True)
class HeadSite:
    """One attention block of a model."""

    index: int
    """Position over all attention blocks of the model, from 0; encoder before decoder."""
    block: str
    """Full path of the attention module, whose input `[T, D]` a router reads."""
    projection: str
    """Full path of the output projection, whose input `[T, N]` is the heads side by side."""
    heads: int
    """H."""
    groups: int
    """Heads of keys and values; `heads / groups` heads that follow each other share one."""
    head_dim: int
    width: int
    """D."""
    transposed: bool
    """The output projection is stored `[in, out]`."""

    @property
    def layer(self) -> str:
        """Full path of the attention module, as `moefy.models.locate.Place` calls it."""
        return self.block

    @property
    def module(self) -> str:
        """Full path of the module that is looked at: the attention module."""
        return self.block

    @property
    def neurons(self) -> int:
        """N, the width of all heads together."""
        return self.heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Weights of the block's four projections, biases left out."""
        return 2 * self.width * (self.heads + self.groups) * self.head_dim

    def places(self, first: int) -> tuple[Place, Place]:
        """Where the block's input `[T, D]` and its heads `[T, N]` are seen.

        Their numbers follow those of `first` other places.
        """
        at = first + 2 * self.index
        return (
            Spot(index=at, layer=self.block, module=self.block, width=self.width),
            Spot(index=at + 1, layer=self.block, module=self.projection, width=self.neurons),
        )


def head_sites(model: PreTrainedModel) -> list[HeadSite]:
    """Every attention block of `model`, real or on the meta device, in the order in which they run.

    Raises `UnsupportedModel` where no row says where the heads are, or the model is not as the row
    says.
    """
    config, name = model.config, model.config.model_type
    family = FAMILIES.get(name)
    rule = family.attention if family else None
    if rule is None:
        known = ", ".join(sorted(n for n, row in FAMILIES.items() if row.attention))
        raise UnsupportedModel(
            f"{name}: where its attention heads are is not known; set attention.density=null to "
            f"leave them as they are, or convert one of: {known}"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    blocks = {path for pattern in rule.blocks for path in matching(modules, pattern)}
    if not blocks:
        raise UnsupportedModel(f"{name}: {type(model).__name__} has no attention blocks")
    ordered = [path for path in modules if path in blocks]
    return [_head_site(index, block, rule, modules, config) for index, block in enumerate(ordered)]


def _head_site(
    index: int, block: str, rule: Attention, modules: dict[str, nn.Module], config: Any
) -> HeadSite:
    name, projection = config.model_type, f"{block}.{rule.output}"
    linear = modules.get(projection)
    if not isinstance(linear, nn.Linear | Conv1D):
        raise UnsupportedModel(
            f"{name}: {projection} should be the output projection of the heads and is "
            f"{type(linear).__name__}"
        )
    heads, groups = config_value(config, rule.heads), config_value(config, rule.groups)
    head_dim = config_value(config, rule.head_dim)
    for what, value in (("heads", heads), ("heads of keys", groups), ("width", head_dim or 1)):
        if type(value) is not int or value < 1:
            raise UnsupportedModel(
                f"{name}: config.json says {what}={str(value)[:60]} of its attention; must be 1 or more"
            )
    transposed = isinstance(linear, Conv1D)
    first, second = linear.weight.shape
    neurons, width = (first, second) if transposed else (second, first)
    if heads % groups or neurons % heads or neurons != heads * (head_dim or neurons // heads):
        raise UnsupportedModel(
            f"{name}: {projection} reads {neurons} numbers, config.json says {heads} heads "
            f"({groups} of keys) of width {head_dim}"
        )
    return HeadSite(
        index=index, block=block, projection=projection, heads=heads, groups=groups,
        head_dim=neurons // heads, width=width, transposed=transposed,
    )  # fmt: skip


def read_heads(site: HeadSite, get: Callable[[str], Tensor]) -> HeadOutputs:
    """The heads' sum, without anything they put out, in the dtype in which `get` gives parameters."""
    weight = get(f"{site.projection}.weight")
    return HeadOutputs.behind(weight if site.transposed else weight.T)
