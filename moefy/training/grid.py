"""Weights on a grid that learn and stay on it: the scales and offsets of every 32 inputs move, the codes do not.

    with on_grid(model) as grids:               # the matrices of MLPs that are stored in few bits
        ...                                     # train grids.parameters()
    save(model, out)                            # the same codes, other scales and offsets

Two numbers of 32 weights are what can be trained of a rounded matrix without rounding it anew (Chen et al.
2024, EfficientQAT, trains them end to end). Each is rounded in every pass as it will be stored, and its gradient
is that of the number before (straight-through, Bengio et al. 2013): what is checked is what is written.

Shapes: N neurons, D width, G groups along the inputs, O outputs.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.models.quantised import GROUP, Quantised

_TOP = 255
_CHILD = "grid"
"""Name of the module that holds what learns, while it does."""


class _Values(torch.autograd.Function):
    """`scale * code - offset`, keeping the codes alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, codes_ND: Tensor, scale: Tensor, offset: Tensor, along: int) -> Tensor:
        ctx.save_for_backward(codes_ND)
        ctx.along = along
        wide = (
            s.repeat_interleave(GROUP, along).narrow(along, 0, codes_ND.shape[along])
            for s in (scale, offset)
        )
        return codes_ND * next(wide) - next(wide)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, None]:
        (codes_ND,) = ctx.saved_tensors
        (gradient_ND,) = gradients
        return (
            None,
            _by_group(gradient_ND * codes_ND, ctx.along),
            -_by_group(gradient_ND, ctx.along),
            None,
        )


def _by_group(value_ND: Tensor, along: int) -> Tensor:
    """Sums over the inputs of every group, shaped as scales are."""
    missing = -value_ND.shape[along] % GROUP
    padding = (0, missing) if along else (0, 0, 0, missing)
    sums: Tensor = pad(value_ND, padding).unflatten(along, (-1, GROUP)).sum(along + 1)
    return sums


class GridMatrix(nn.Module):
    """One matrix whose scales and offsets learn."""

    codes_ND: Tensor

    def __init__(self, stored: Quantised) -> None:
        super().__init__()
        self.stored = stored
        scale, offset = stored.scales()
        self.scale, self.offset = nn.Parameter(scale.clone()), nn.Parameter(offset.clone())
        self.register_buffer("codes_ND", stored.codes_ND, persistent=False)

    def forward(self) -> Tensor:
        """The values `[N, D]`, of numbers as they are stored."""
        new = self.quantised()
        scale, offset = (
            learned + (rounded.to(learned) - learned).detach()
            for learned, rounded in zip((self.scale, self.offset), new.scales(), strict=True)
        )
        apply: Any = _Values.apply
        values_ND: Tensor = apply(self.codes_ND, scale, offset, self.stored.along)
        return values_ND

    @torch.no_grad()
    def quantised(self) -> Quantised:
        """The matrix with scales and offsets as they have become, rounded as they were stored."""
        scale, offset = self.scale.detach(), self.offset.detach()
        if self.stored.most_O is None:
            return self._with(scale.clamp_min(6e-8).half(), offset.half(), None)
        along = self.stored.along
        most_O = torch.stack([s.amax(along) for s in (scale, offset)]).clamp(6e-8, 65504).half()
        unit_scale, unit_offset = (most_O.to(scale.dtype) / _TOP).unsqueeze(1 + along)
        return self._with(
            (scale / unit_scale).round().clamp(1, _TOP).to(torch.uint8),
            (offset / unit_offset).round().clamp(0, _TOP).to(torch.uint8),
            most_O,
        )

    def _with(self, scale: Tensor, offset: Tensor, most_O: Tensor | None) -> Quantised:
        return replace(
            self.stored, codes_ND=self.codes_ND, scale=scale, offset=offset, most_O=most_O
        )


@dataclass
class Grids:
    """The layers of a model that lie on a grid, by number."""

    layers: dict[int, SparseMlp]
    on: bool = True
    """Whether passes compute with what has been learned."""

    def parameters(self) -> list[nn.Parameter]:
        """All scales and offsets."""
        return [p for m in self.layers.values() for p in _matrices(m).parameters()]

    def weights(self) -> list[nn.Parameter]:
        """The matrices that stand for what is learned."""
        return [getattr(m, f"{name}_ND") for m in self.layers.values() for name in _matrices(m)]

    @contextmanager
    def off(self) -> Iterator[None]:
        """While it lasts passes compute with the weights as they were."""
        before, self.on = self.on, False
        try:
            yield
        finally:
            self.on = before

    @contextmanager
    def merged(self) -> Iterator[None]:
        """While it lasts the weights are those that have been learned."""
        before = {number: module.stored for number, module in self.layers.items()}
        with self.off():
            self.write()
            try:
                yield
            finally:
                for number, module in self.layers.items():
                    module.store(before[number])

    def write(self) -> None:
        """Put what has been learned into the weights."""
        for module in self.layers.values():
            stored = module.stored
            assert stored is not None
            new = {name: matrix.quantised() for name, matrix in _matrices(module).items()}
            module.store(stored.with_matrices(new))


def _matrices(module: SparseMlp) -> Any:
    return module.get_submodule(_CHILD)


@contextmanager
def on_grid(model: nn.Module) -> Iterator[Grids]:
    """Let scales and offsets of what is stored in few bits learn; what they became is in the weights then."""
    grids = Grids({i: m for i, m in sparse_mlps(model).items() if m.stored is not None})
    with ExitStack() as stack:
        for module in grids.layers.values():
            stack.enter_context(_learning(module, grids))
        yield grids
        grids.write()


@contextmanager
def _learning(module: SparseMlp, grids: Grids) -> Iterator[None]:
    """Have a layer compute with values that carry a gradient; they stand before its parameters."""
    stored = module.stored
    assert stored is not None
    names = {f"{name}_ND": name for name in stored.names}
    matrices = nn.ModuleDict({name: GridMatrix(stored.matrix(name)) for name in stored.names})
    module.add_module(_CHILD, matrices.to(module.device))

    def enter(*_: Any) -> None:
        if grids.on:
            vars(module).update({key: matrices[name]() for key, name in names.items()})

    def leave(*_: Any) -> None:
        for key in names:
            vars(module).pop(key, None)

    handles = [
        module.register_forward_pre_hook(enter),
        module.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        del module._modules[_CHILD]
