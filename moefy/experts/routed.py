"""What every module in experts has: a router, a selection, a compensation, and switches.

`SparseMlp` routes groups of neurons, `SparseHeads` the heads of an attention block.

Shapes: T tokens, D width, E experts.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from moefy.errors import MoefyError
from moefy.methods.base import Compensation, Context, Router, Selection


class Turn:
    """Which threads have a pass of a model under way, and the one that has changed what its passes do."""

    def __init__(self) -> None:
        self.running: set[int] = set()
        self.owner: int | None = None
        self.single = False
        """Whether weights come and go while it runs, as of layers that are offloaded."""
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type["Turn"], tuple[()]]:
        """Nobody runs a copied or pickled model."""
        return Turn, ()

    def enter(self) -> None:
        """Begin a pass; `MoefyError` while another thread is `alone`, and while one runs a `single` model."""
        thread = threading.get_ident()
        with self._lock:
            if self.owner not in (None, thread):
                raise MoefyError(
                    "this model runs in one thread while another has all_experts, hooks, experts or an "
                    "observer on; enter those in the thread that runs it, or give each thread a copy.deepcopy"
                )
            if self.single and self._others():
                raise MoefyError(
                    "another thread runs this model, whose layers are offloaded: one thread at a time can"
                )
            self.running.add(thread)

    def leave(self) -> None:
        """End a pass."""
        self.running.discard(threading.get_ident())

    def _others(self) -> set[int]:
        """Other threads at a pass; one may have died in it."""
        alive = {thread.ident for thread in threading.enumerate() if thread.ident is not None}
        return self.running & alive - {threading.get_ident()}

    @contextmanager
    def alone(self) -> Iterator[None]:
        """While this lasts no other thread may run the model; `MoefyError` where one does."""
        thread = threading.get_ident()
        with self._lock:
            if self._others() or self.owner not in (None, thread):
                raise MoefyError(
                    "all_experts, hooks, experts and observers change every pass of a model, and another "
                    "thread is at one; wait until it has ended, or give each thread a copy.deepcopy"
                )
            before, self.owner = self.owner, thread
        try:
            yield
        finally:
            self.owner = before


class Routed(nn.Module):
    """A module that runs, for each token, the experts that its router and selection choose."""

    def __init__(self, router: Router, selection: Selection, compensation: Compensation) -> None:
        super().__init__()
        self.router, self.selection, self.compensation = router, selection, compensation
        self.context = Context()
        """What is known of the current pass; one object for all MLPs of a model."""
        self.turn = Turn()
        """Who runs the model; one object for all of it."""
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
    """Every expert of every layer runs, and every head: the dense function.

    Raises `MoefyError` where another thread runs the model; it may not until this ends.
    """
    modules = [module for module in model.modules() if isinstance(module, Routed)]
    with alone(modules):
        before = [module.all_on for module in modules]
        try:
            for module in modules:
                module.all_on = True
            yield
        finally:
            for module, was in zip(modules, before, strict=True):
                module.all_on = was


@contextmanager
def alone(modules: Iterable[Routed]) -> Iterator[None]:
    """While this lasts, this thread alone runs the models of these modules; `MoefyError` where another does."""
    with ExitStack() as stack:
        for turn in {id(module.turn): module.turn for module in modules}.values():
            stack.enter_context(turn.alone())
        yield
