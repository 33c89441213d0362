"""Where one may look into an MLP in experts and change what it does, and the computation that tells all.

A hook point is a module that passes its value on: a forward hook of torch, or a tracer that wraps
modules, sees the value there and may put another in its place. Nobody listens as a rule, and then no
point is called. `moefy.experts.hooks` gives the points their names, `moefy.experts.interventions` makes interventions.

An expert that is off has an output too: what asks for it, and what changes neurons, has every neuron
computed, by the definition rather than by a backend.

Shapes: T tokens, of b sequences at p positions each, D width, N neurons, E experts (the shared ones
first), F neurons per expert.
"""

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from moefy.errors import MoefyError
from moefy.experts.routed import Routed
from moefy.methods.tables import Compensation, Router, Selection, expert_norms

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
