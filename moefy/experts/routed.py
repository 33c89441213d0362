"""What every module in experts has: a router, a selection, a compensation, switches; of an MLP, its hook points.

`SparseMlp` routes groups of neurons, `SparseHeads` the heads of an attention block.

A hook point is a module that passes its value on: a forward hook of torch, or a tracer that wraps
modules, sees the value there and may put another in its place. Nobody listens as a rule, and then no
point is called. `moefy.experts.hooks` gives the points their names, `moefy.experts.interventions` makes interventions.

An expert that is off has an output too: what asks for it, and what changes neurons, has every neuron
computed, by the definition rather than by a backend.

Shapes: T tokens, of b sequences at p positions each, D width, N neurons, E experts (the shared ones
first), F neurons per expert.
"""

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import torch
from torch import Tensor, nn

from moefy.errors import MoefyError
from moefy.methods.base import Compensation, Context, Router, Selection
from moefy.methods.routers.baselines import expert_norms


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


SCORES, MASK, IN, OUT = "hook_router_scores", "hook_expert_mask", "hook_in", "hook_out"
NORM, EXPERT_OUT, ERROR = "hook_expert_norm", "hook_expert_out", "hook_moe_error"
OF_ALL = (NORM, EXPERT_OUT, ERROR)
"""Points whose values need every expert, run or not."""
POINTS = (IN, SCORES, MASK, *OF_ALL, OUT)
"""All points of a layer, in the order in which a pass comes by."""

Intervention = Callable[[Tensor, Tensor], Tensor]
"""From what the neurons add, `r_e h_j` `[T, N]`, and the places that hold tokens `[b, p]` (bool), to what
they add instead."""


class Hooked(Routed):
    """An MLP in experts with its hook points; `forward` is that of the subclass."""

    hook_router_scores: nn.Identity
    hook_expert_mask: nn.Identity
    hook_in: nn.Identity
    hook_out: nn.Identity
    hook_expert_norm: nn.Identity
    hook_expert_out: nn.Identity
    hook_moe_error: nn.Identity

    def __init__(self, router: Router, selection: Selection, compensation: Compensation) -> None:
        super().__init__(router, selection, compensation)
        for name in POINTS:
            self.add_module(name, nn.Identity())
        self.intervention: Intervention | None = None
        """What changes the neurons of this layer, if anything does."""
        points: list[nn.Module] = [getattr(self, name) for name in POINTS]
        # Looked at in every pass: the dicts themselves, since finding modules by name takes longer.
        self._hooks = tuple(d for p in points for d in (p._forward_pre_hooks, p._forward_hooks))

    @property
    def hooked(self) -> bool:
        """Whether a hook of torch is at any point."""
        return any(self._hooks)

    @property
    def watched(self) -> bool:
        """Whether somebody may listen: a hook, or a tracer, which takes the place of `forward`."""
        return any(self._hooks) or "forward" in self.__dict__

    @property
    def tells_all(self) -> bool:
        """Whether what is asked for needs every neuron: an intervention, or a hook of `OF_ALL`."""
        return self.intervention is not None or (
            any(self._hooks) and any(self._hooked_at(name) for name in OF_ALL)
        )

    def _hooked_at(self, name: str) -> bool:
        point: nn.Module = getattr(self, name)
        return bool(point._forward_hooks or point._forward_pre_hooks)

    def show(self, name: str, value: Tensor, shape: torch.Size) -> Tensor:
        """A value `[T, ...]` as whoever listens at a point leaves it; they see it as `[b, p, ...]`.

        They may edit it in place, so it has to be nobody else's. `shape` is that of the layer's
        input without its last axis. Raises `MoefyError` where they leave another shape or dtype.
        """
        shown = value.reshape(*self._places(shape), *value.shape[1:])
        got = getattr(self, name)(shown)
        if not isinstance(got, Tensor) or (got.shape, got.dtype) != (shown.shape, shown.dtype):
            what = (
                f"{list(got.shape)} {got.dtype}" if isinstance(got, Tensor) else type(got).__name__
            )
            raise MoefyError(
                f"a hook at {name} returned {what}; return {list(shown.shape)} {shown.dtype}, or None "
                "to leave the value as it is"
            )
        return got.reshape(value.shape)

    def _places(self, shape: torch.Size) -> tuple[int, int]:
        """b and p; families that lay sequences end to end leave b to the context."""
        batch = shape[0] if len(shape) > 1 else self.context.batch
        return batch, shape.numel() // batch

    def _holding(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Places that hold tokens `[b, p]` (bool)."""
        places, mask_BT = self._places(shape), self.context.mask_BT
        if mask_BT is None or mask_BT.shape != places:
            return torch.ones(places, dtype=torch.bool, device=device)
        return mask_BT.to(device)

    def tell_all(
        self,
        h_TN: Tensor,
        mask_TE: Tensor,
        down_ND: Tensor,
        extra_TD: Tensor | None,
        shape: torch.Size,
    ) -> Tensor:
        """The output `[T, D]` without its bias, from every neuron, as hooks and the intervention leave it.

        `extra_TD` is what the compensation adds. With `v_j` for what neuron j adds after the
        intervention, `y = sum_j v_j d_j + extra` and the error is `sum_j (h_j - v_j) d_j - extra`.
        """
        self._show_norms(h_TN, down_ND, mask_TE.shape[1], shape)
        h_TEF = h_TN.view(*mask_TE.shape, -1)
        run_TN = _running(h_TEF, mask_TE).reshape(h_TN.shape)
        left_TN = run_TN
        if self.intervention is not None:
            left_TN = self.intervention(run_TN, self._holding(shape, h_TN.device))
        y_TD = left_TN.to(down_ND.dtype) @ down_ND
        missing_TD = None
        if self._hooked_at(EXPERT_OUT):
            down_EFD = down_ND.view(mask_TE.shape[1], -1, down_ND.shape[1])
            out_TED = torch.einsum("tef,efd->ted", h_TEF.to(down_ND.dtype), down_EFD)
            out_TED = self.show(EXPERT_OUT, out_TED, shape)
            y_TD = _running(out_TED, mask_TE).sum(1)
            if left_TN is not run_TN:
                y_TD = y_TD + (left_TN - run_TN).to(down_ND.dtype) @ down_ND
            missing_TD = h_TN.to(down_ND.dtype) @ down_ND - y_TD
        if extra_TD is not None:
            extra_TD = extra_TD.to(y_TD.dtype)
        if self._hooked_at(ERROR):
            if missing_TD is None:
                missing_TD = (h_TN - left_TN).to(down_ND.dtype) @ down_ND
            error_TD = missing_TD if extra_TD is None else missing_TD - extra_TD
            y_TD = y_TD + (error_TD - self.show(ERROR, error_TD.clone(), shape))
        return y_TD if extra_TD is None else y_TD + extra_TD

    def _show_norms(self, h_TN: Tensor, down_ND: Tensor, experts: int, shape: torch.Size) -> None:
        if self._hooked_at(NORM):
            wide = torch.promote_types(h_TN.dtype, torch.float32)
            norm_TE = expert_norms(h_TN.to(wide), down_ND, experts)
            if not torch.equal(self.show(NORM, norm_TE.clone(), shape), norm_TE):
                raise MoefyError(
                    f"a hook at {NORM} returned other norms, which nothing is computed from; write "
                    f"to {EXPERT_OUT} or use model.experts(scale=...)"
                )


def _running(value_TEX: Tensor, mask_TE: Tensor) -> Tensor:
    """Zero where an expert is off; in training the mask is a number that carries a gradient."""
    if mask_TE.dtype == torch.bool:
        return torch.where(mask_TE[..., None], value_TEX, 0)
    return value_TEX * mask_TE[..., None].to(value_TEX.dtype)


@cache
def say_once(text: str) -> None:
    """Warn, the first time in this process."""
    warnings.warn(text, stacklevel=3)
