"""SparseHeads, the module that takes the place of the output projection of an attention block.

Its experts are the heads, or the groups of heads that share keys and values: what is off is left out
of the projection. A token's own heads alone are masked, after attention: keys and values of every
head are computed and cached, so that later tokens attend to this one whatever it ran.

Shapes: B documents, T tokens, D width, H heads, E experts (heads or groups), N = H * (width of a
head), F = N / E.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moefy.errors import MoefyError
from moefy.experts.routed import Routed
from moefy.methods.base import Compensation, Router, Selection
from moefy.models.library import hidden_of
from moefy.models.mlp import HeadOutputs


class SparseHeads(Routed):
    """An output projection whose input is masked by head; parameters keep name and layout."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        *,
        transposed: bool,
        experts: int,
        router: Router,
        selection: Selection,
        compensation: Compensation,
    ) -> None:
        super().__init__(router, selection, compensation)
        self.register_parameter("weight", weight)
        self.register_parameter("bias", bias)
        self.transposed, self.experts = transposed, experts

    @property
    def summed(self) -> HeadOutputs:
        """The heads as neurons, as views of the parameters."""
        return HeadOutputs.behind(self.weight if self.transposed else self.weight.T)

    def mask(self, x_TD: Tensor) -> Tensor:
        """Which experts run `[T, E]`: bool, or in training a number that carries a gradient."""
        if self.all_on:
            shape = (len(x_TD), self.experts)
            return torch.ones(shape, dtype=torch.bool, device=x_TD.device)
        return self.select(self.router(x_TD, self.summed))

    def forward(self, heads: Tensor) -> Tensor:
        """Project what the heads put out, `[..., N]`, without those that are off: `[..., D]`."""
        attended = self.context.attended
        if attended is None:
            raise MoefyError(
                "the output projection was called without its attention module, whose input "
                "decides which heads run"
            )
        x_TD = attended.reshape(-1, attended.shape[-1]).to(heads.device)
        self.context.attended = None
        mask_TE = self.mask(x_TD)
        if self.observer is not None:
            self.observer(x_TD, mask_TE)
        heads_TEF = heads.reshape(*mask_TE.shape, -1) * mask_TE[..., None].to(heads.dtype)
        weight = self.weight.T if self.transposed else self.weight
        y = linear(heads_TEF.view(heads.shape), weight, self.bias)
        extra_TD = self.compensation(x_TD, mask_TE)
        return y if extra_TD is None else y + extra_TD.to(y.dtype).view(y.shape)


def hand_over(block: nn.Module, projection: str) -> None:
    """Let the SparseHeads at `projection` in `block` read what the attention module `block` is given."""
    # No module is bound to the hook, so that a copy of the model has hooks of its own.
    block.register_forward_pre_hook(functools.partial(_before, projection), with_kwargs=True)


def _before(
    projection: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    heads = block.get_submodule(projection)
    assert isinstance(heads, SparseHeads)
    heads.context.attended = hidden_of(args, kwargs)


def sparse_heads(model: nn.Module) -> dict[int, SparseHeads]:
    """The SparseHeads of a model by index of the attention block; empty where heads all run."""
    return dict(enumerate(m for m in model.modules() if isinstance(m, SparseHeads)))
