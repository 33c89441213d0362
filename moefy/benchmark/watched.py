"""Every layer of a model checked on the very input that an engine gave it, as that engine runs.

Routers cut, at largest inputs, thresholds or the k-th score, so that hidden states which differ in the last
digit may choose other experts: no two engines can be asked to agree on what a whole model chooses. What
can be asked, layer by layer, is what each makes of its own input `x`:

- It chose experts that its router may choose for `x`. The router is run again on `x`, eagerly and in the
  same dtype. An engine that runs the same code must choose the same. `torch.compile` adds up in another
  order: where it chose otherwise, the selection has to choose that for scores which are off by no more
  than rounding.
- It put out what these experts give for `x`, within the bound of `rounding`.

What is between the layers is judged by the logits (`fidelity`).

Shapes: T tokens, D width, E experts.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.benchmark.engines.table import Unavailable
from moefy.benchmark.rounding import checked, exact
from moefy.experts.offload import present
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.methods.base import Context, Selection

MOST = 64
"""Tokens of a pass whose outputs are compared: all, or so many spread over it."""
TIMES = 8.0
"""Times the largest error of a router's own scores, against fp64, that reordered sums may be off by."""


class _Watch(Selection):
    """Stands for the selection and the forward of a layer, and keeps what passes through.

    That is held by attributes, which a graph of `torch.compile` sets when it ends.
    """

    def __init__(self, module: SparseMlp) -> None:
        self.own, self.forward = module.selection, module.forward
        self.x: Any = None
        self.y: Any = None
        self.mask_TE: Any = None
        self.scores_TE: Any = None
        """None where the choice was made before, from a prompt."""

    def remembered(self, context: Context) -> Tensor | None:
        mask_TE = self.own.remembered(context)
        if mask_TE is not None:
            self.mask_TE, self.scores_TE = mask_TE, None
        return mask_TE

    def __call__(self, scores_TE: Tensor, context: Context | None = None) -> Tensor:
        mask_TE = self.own(scores_TE, context)
        self.mask_TE, self.scores_TE = mask_TE, scores_TE
        return mask_TE

    def run(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """The forward of the layer."""
        y = self.forward(hidden)
        self.x, self.y = hidden.clone(), y.clone()
        return y if residual is None else y + residual


@dataclass(frozen=True)
class Seen:
    """One layer in one pass."""

    x_TD: Tensor
    mask_TE: Tensor
    """Of the routed experts."""
    scored: bool
    """Whether it was chosen from scores of these tokens."""
    y_TD: Tensor


class Watched:
    """What every layer of a model saw, chose and put out, pass by pass."""

    def __init__(self, watches: dict[SparseMlp, _Watch]) -> None:
        self.watches = watches
        self.passes: list[list[Seen]] = []

    def next_pass(self) -> None:
        """To be called after every forward pass."""
        self.passes.append([_seen(watch) for watch in self.watches.values()])


def _seen(watch: _Watch) -> Seen:
    x_TD, y_TD = (value.detach().flatten(0, -2) for value in (watch.x, watch.y))
    mask_TE = watch.mask_TE.bool()
    mask_TE = mask_TE.repeat_interleave(len(x_TD) // len(mask_TE), 0)
    return Seen(x_TD, mask_TE.clone(), watch.scores_TE is not None, y_TD)


@contextmanager
def watching(model: PreTrainedModel) -> Iterator[Watched]:
    """Watch the layers as they run."""
    watches = {module: _Watch(module) for module in sparse_mlps(model).values()}
    # accelerate has put a forward of its own there, if any.
    own = {module: vars(module).pop("forward", None) for module in watches}
    for module, watch in watches.items():
        module.selection = watch
        vars(module)["forward"] = watch.run
    try:
        yield Watched(watches)
    finally:
        for module, watch in watches.items():
            module.selection = watch.own
            del vars(module)["forward"]
            if own[module] is not None:
                vars(module)["forward"] = own[module]


@torch.no_grad()
def check_layers(model: PreTrainedModel, passes: Sequence[Sequence[Seen]]) -> float:
    """The largest relative error of a layer; raises `Unavailable` for one that is not its function."""
    worst = 0.0
    for index, module in sparse_mlps(model).items():
        try:
            with present(module):
                for one in passes:
                    _check_choice(module, one[index], one[index - module.look_ahead])
                worst = max(worst, _check_output(module, [one[index] for one in passes]))
        except Unavailable as reason:
            raise Unavailable(f"layer {index} {reason}") from None
    return worst


def _check_output(module: SparseMlp, seen: Sequence[Seen]) -> float:
    places = [torch.linspace(0, len(s.x_TD) - 1, min(MOST, len(s.x_TD))).long() for s in seen]
    pairs = list(zip(seen, places, strict=True))
    x_TD, mask_TE, y_TD = (
        torch.cat([getattr(s, name)[at.to(s.x_TD.device)] for s, at in pairs])
        for name in ("x_TD", "mask_TE", "y_TD")
    )
    extra_TD = module.compensation(x_TD, mask_TE)
    shared_TE = mask_TE.new_ones(len(mask_TE), module.shared)
    every_TE = torch.cat([shared_TE, mask_TE], 1)
    return checked(y_TD, exact(module.running, x_TD, every_TE, extra_TD))


def _check_choice(module: SparseMlp, seen: Seen, read: Seen) -> None:
    """`read` has what the router reads."""
    if not seen.scored:
        return
    watch = _Watch(module)
    before = module.context.previous_TD
    module.selection, module.context.previous_TD = watch, read.x_TD
    try:
        module.mask(seen.x_TD)
    finally:
        module.selection, module.context.previous_TD = watch.own, before
    if watch.scores_TE is None:  # chosen by a prompt, which later tokens do not change
        return
    differs_T = (watch.mask_TE.bool() != seen.mask_TE).any(1)
    if not bool(differs_T.any()):
        return
    scores_TE = watch.scores_TE.double()
    own_TE = (scores_TE - _exact_scores(module, read.x_TD)).abs()
    least = torch.finfo(torch.float32).eps * float(scores_TE.abs().max())
    off = TIMES * max(float(own_TE.max()), least)
    towards_TE = seen.mask_TE.double() * 2 - 1
    for share in (1, -1):  # less of what was chosen may be what reaches a sum
        chosen_TE = watch.own(scores_TE + share * off * towards_TE, module.context).bool()
        differs_T &= (chosen_TE != seen.mask_TE).any(1)
    if bool(differs_T.any()):
        raise Unavailable(
            f"chooses experts that its router does not: {int(differs_T.sum())} of {len(differs_T)} tokens"
        )


def _exact_scores(module: SparseMlp, x_TD: Tensor) -> Tensor:
    """Scores `[T, E]` in fp64."""
    router = copy.deepcopy(module.router).double()
    routed, wide_TD = module.routed.to(torch.float64), x_TD.double()
    if module.computes_gate:
        return router.scores(routed.deciding(wide_TD), routed)
    scores_TE: Tensor = router(wide_TD, routed)
    return scores_TE
