"""What every module in experts has: a router, a selection, a compensation, and switches.

`SparseMlp` routes groups of neurons, `SparseHeads` the heads of an attention block.

Shapes: T tokens, D width, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moefy.methods.base import Compensation, Context, Router, Selection


class Routed(nn.Module):
    """A module that runs, for each token, the experts that its router and selection choose."""

    def __init__(self, router: Router, selection: Selection, compensation: Compensation) -> None:
        super().__init__()
        self.router, self.selection, self.compensation = router, selection, compensation
        self.context = Context()
        """What is known of the current pass; one object for all MLPs of a model."""
        self.all_on = False
        self.straight_through = False
        """Training: the mask carries the gradient of a sigmoid of the scores."""
        self.scores_TE: Tensor | None = None
        """Scores of the last pass in training."""
        self.observer: Callable[[Tensor, Tensor], None] | None = None
        """Called with the input `[T, D]` and the mask of all experts in every forward pass."""

    def select(self, scores_TE: Tensor) -> Tensor:
        """Which experts run `[T, E]`: bool, or in training a number that carries a gradient."""
        mask_TE = self.selection(scores_TE, self.context)
        if self.straight_through:
            self.scores_TE = scores_TE
            mask_TE = straight_through(scores_TE, mask_TE)
        return mask_TE


def straight_through(scores_TE: Tensor, mask_TE: Tensor) -> Tensor:
    """The mask as numbers whose gradient is that of `sigmoid(score - midpoint)`.

    The midpoint of a token lies between the lowest score that runs and the highest that does not;
    Bengio et al. 2013 for the estimator.
    """
    soft_TE = torch.sigmoid(scores_TE - midpoint(scores_TE, mask_TE))
    return mask_TE.to(soft_TE.dtype) + (soft_TE - soft_TE.detach())


@torch.no_grad()
def midpoint(scores_TE: Tensor, mask_TE: Tensor) -> Tensor:
    """Between the lowest score that runs and the highest that does not `[T, 1]`; 0 where all or none run."""
    lowest_T1 = scores_TE.masked_fill(~mask_TE, torch.inf).amin(1, keepdim=True)
    highest_T1 = scores_TE.masked_fill(mask_TE, -torch.inf).amax(1, keepdim=True)
    return torch.nan_to_num((lowest_T1 + highest_T1) / 2, 0.0, 0.0, 0.0)


@contextmanager
def all_experts(model: nn.Module) -> Iterator[None]:
    """Every expert of every layer runs, and every head: the dense function."""
    modules = [module for module in model.modules() if isinstance(module, Routed)]
    for module in modules:
        module.all_on = True
    try:
        yield
    finally:
        for module in modules:
            module.all_on = False
