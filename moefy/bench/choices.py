"""Which experts an engine chooses beside those of a reference, so that rounding is told from faults.

Experts of almost the same score change places by rounding, which no two engines share, and one that does
changes the logits as much as a wrong kernel would. So an engine is led: it computes the experts that the
reference chose, on which its logits must agree as closely as dense ones, and beside that chooses for itself.
Where it would have chosen otherwise, the reference's scores must almost tie.

Shapes: T tokens, E routed experts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.bench.engines import Unavailable
from moefy.routed import midpoint
from moefy.routing.base import Context, Selection
from moefy.sparse_mlp import sparse_mlps

TIE = {torch.float32: 0.02, torch.float16: 0.05, torch.bfloat16: 0.1}
"""How far an expert that another engine chooses otherwise may lie from the boundary between those that run
and those that do not, in standard deviations of a token's scores."""
MANY = 0.05
"""Largest share of all choices that may be others: what almost ties is not much."""


@dataclass(frozen=True)
class Chosen:
    """What one layer chose in one pass."""

    mask_TE: Tensor
    scores_TE: Tensor | None
    """None where the choice was made before, from a prompt."""


class _Led(Selection):
    """Chooses by another selection, remembers that, and gives what it is led to, if it is.

    What changes from pass to pass is a tensor behind an attribute, which a graph of `torch.compile` takes
    as it finds it; lists are only touched between passes.
    """

    def __init__(self, own: Selection, lead: Sequence[Chosen] | None) -> None:
        self.own, self.lead = own, lead
        self.made: list[Chosen] = []
        self.mask_TE: Tensor | None = None
        self.scores_TE: Tensor | None = None
        self.led_TE = lead[0].mask_TE if lead else None

    def remembered(self, context: Context) -> Tensor | None:
        mask_TE = self.own.remembered(context)
        return None if mask_TE is None else self._keep(mask_TE, None)

    def __call__(self, scores_TE: Tensor, context: Context | None = None) -> Tensor:
        return self._keep(self.own(scores_TE, context), scores_TE)

    def _keep(self, mask_TE: Tensor, scores_TE: Tensor | None) -> Tensor:
        self.mask_TE, self.scores_TE = mask_TE, scores_TE
        return mask_TE if self.led_TE is None else self.led_TE

    def next_pass(self) -> None:
        """Write down what was chosen; lead to the next."""
        assert self.mask_TE is not None
        self.made.append(Chosen(self.mask_TE, self.scores_TE))
        if self.lead and len(self.made) < len(self.lead):
            self.led_TE = self.lead[len(self.made)].mask_TE


Choices = list[list[Chosen]]
"""Of every layer, of every pass."""


class Choosing:
    """What the layers of a model choose, pass by pass."""

    def __init__(self, led: Sequence[_Led]) -> None:
        self.led = led

    @property
    def made(self) -> Choices:
        """What was chosen so far."""
        return [selection.made for selection in self.led]

    def next_pass(self) -> None:
        """To be called after every forward pass."""
        for selection in self.led:
            selection.next_pass()


@contextmanager
def choosing(model: PreTrainedModel, lead: Choices | None = None) -> Iterator[Choosing]:
    """What the layers choose, as they run; with `lead` they compute those experts instead."""
    modules = list(sparse_mlps(model).values())
    led = [_Led(m.selection, lead[n] if lead else None) for n, m in enumerate(modules)]
    for module, selection in zip(modules, led, strict=True):
        module.selection = selection
    try:
        yield Choosing(led)
    finally:
        for module, selection in zip(modules, led, strict=True):
            module.selection = selection.own


def moved_on(choices: Choices) -> Choices:
    """Every expert's neighbour in its stead: what a model does that has the weights but not the routing."""
    return [[Chosen(one.mask_TE.roll(1, 1), None) for one in layer] for layer in choices]


def others(made: Choices, lead: Choices, dtype: torch.dtype) -> float:
    """Share of all choices that are not those of the reference `lead`.

    Raises `Unavailable` where they are many, or where the scores of one are no tie.
    """
    pairs = [p for mine, led in zip(made, lead, strict=True) for p in zip(mine, led, strict=False)]
    differing = [mine.mask_TE.bool() != led.mask_TE.bool() for mine, led in pairs]
    count = sum(mask_TE.numel() for mask_TE in differing)
    share = sum(int(mask_TE.sum()) for mask_TE in differing) / count if count else 0.0
    margin = max(
        (_margin(led, at_TE) for (_, led), at_TE in zip(pairs, differing, strict=True)), default=0.0
    )
    if share > MANY or not margin <= TIE[dtype]:
        raise Unavailable(
            f"chooses other experts: {share:.1%} of all choices, by {margin:.2f} standard deviations of "
            f"the scores where they differ most; at most {MANY:.0%} and {TIE[dtype]}"
        )
    return share


def _margin(led: Chosen, at_TE: Tensor) -> float:
    """How far the scores at some places are from those where the choice was close."""
    if led.scores_TE is None or not bool(at_TE.any()):
        return 0.0
    scores_TE = led.scores_TE.float()
    from_TE = (scores_TE - midpoint(scores_TE, led.mask_TE)).abs()
    return float((from_TE / scores_TE.std(1, keepdim=True).clamp_min(1e-30))[at_TE].max())
