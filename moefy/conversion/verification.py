"""Whether what was written is the dense model, and runs the experts and heads that were fitted.

With every expert on, the outputs have to be those of the source. That does not show which neurons an expert
owns: as the model routes, every MLP and every routed attention block is therefore computed once more from
the weights on the source's disk, for the masks that it ran with.

Shapes: T tokens, D width, N neurons or outputs of heads, E experts.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.conversion.task import Conversion
from moefy.errors import MoefyError
from moefy.experts.moefied import of
from moefy.experts.passes import watching
from moefy.experts.placement import running_dtype
from moefy.experts.sparse_heads import SparseHeads
from moefy.experts.sparse_mlp import SparseMlp
from moefy.models.heads import HeadSite, read_heads
from moefy.models.locate import Site, read_mlp
from moefy.models.reorder import rounded_mlp

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest relative error of the outputs with every expert on; the error itself is recorded."""
ROUTED = 10
"""How much more the output of one module alone may err, which no residual stream is added to."""
VERIFIED = 512
"""Tokens that every module is computed for once more."""
_CHUNK = 4096
"""Neurons that are in memory in fp32 at a time."""


def require_equal(error: float, dtype: torch.dtype) -> None:
    """Raise `MoefyError` where the outputs with every expert on are not those of the source."""
    limit = TOLERANCE[dtype]
    if not error <= limit:
        raise MoefyError(
            f"verification failed: with every expert on the outputs differ by {error:.1e} "
            f"(relative; at most {limit:.0e} for {dtype}); nothing was written; please "
            "report this with the model's config.json"
        )


class AsRouted:
    """What every routed module of a converted model puts out, against the source's weights under its masks."""

    def __init__(self, task: Conversion, model: PreTrainedModel) -> None:
        self.made, self.get = of(model), task.weights()
        self.limit = ROUTED * TOLERANCE[running_dtype(task.checkpoint)]
        self.seen: dict[str, tuple[Tensor, Tensor]] = {}
        """Inputs and masks of the modules that are running, by their paths."""

    @contextmanager
    def checking(self) -> Iterator[None]:
        """While this lasts, raise `MoefyError` for the first module that runs other experts than were fitted."""
        made = self.made
        with ExitStack() as stack:
            for site in made.sites:
                self._follow(stack, site.module, made.mlps[site.index], partial(self._mlp, site))
            for block in made.heads:
                module = made.blocks[block.index]
                self._follow(stack, block.projection, module, partial(self._heads, block))
            yield

    def _follow(
        self, stack: ExitStack, path: str, module: SparseMlp | SparseHeads, check: Any
    ) -> None:
        def note(_: int, x_TD: Tensor, mask_TE: Tensor) -> None:
            self.seen[path] = x_TD[:VERIFIED].float(), mask_TE[:VERIFIED]

        stack.enter_context(watching({0: module}, note))
        stack.callback(module.register_forward_hook(check, with_kwargs=True).remove)

    @torch.no_grad()
    def _mlp(self, site: Site, module: SparseMlp, args: Any, kwargs: Any, output: Tensor) -> None:
        x_TD, mask_TE = self.seen.pop(site.module)
        entry = self.made.artefact.layers[site.index]
        order_N = self.made.artefact.permutation(site.index).to(x_TD.device)

        def get(name: str) -> Tensor:
            return self.get(name).to(x_TD.device)

        if entry.storage is None:
            mlp = read_mlp(site, get)
        else:
            mlp, order_N = rounded_mlp(site, get, entry, order_N), torch.arange(site.neurons)
        centred = module.compensation.centred(mlp)
        mask_TN = mask_TE.repeat_interleave(mlp.neurons // mask_TE.shape[1], 1)
        want_TD = torch.zeros_like(x_TD)
        for first in range(0, mlp.neurons, _CHUNK):
            slots = slice(first, first + _CHUNK)
            part = replace(mlp, down_bias_D=None).take(order_N[slots]).to(torch.float32)
            if centred.centre_N is not None:
                part = replace(part, centre_N=centred.centre_N[slots])
            want_TD += part.output(part.hidden(x_TD) * mask_TN[:, slots])
        if centred.down_bias_D is not None:
            want_TD += centred.down_bias_D
        extra_TD = module.compensation(x_TD, mask_TE[:, module.shared :])
        residual = kwargs.get("residual", args[1] if len(args) > 1 else None)
        own = output if residual is None else output - residual
        self._compare(site.layer, "experts", own, want_TD, extra_TD)

    @torch.no_grad()
    def _heads(
        self, site: HeadSite, module: SparseHeads, args: Any, _: Any, output: Tensor
    ) -> None:
        x_TD, mask_TE = self.seen.pop(site.projection)
        down_ND = read_heads(site, self.get).down_ND.float().to(x_TD.device)
        heads_TN = args[0].reshape(-1, site.neurons)[:VERIFIED].float()
        want_TD = (
            heads_TN * mask_TE.repeat_interleave(site.neurons // mask_TE.shape[1], 1)
        ) @ down_ND
        if module.bias is not None:
            want_TD += self.get(f"{site.projection}.bias").float().to(x_TD.device)
        self._compare(site.block, "heads", output, want_TD, module.compensation(x_TD, mask_TE))

    def _compare(
        self, where: str, what: str, output: Tensor, want_TD: Tensor, extra_TD: Tensor | None
    ) -> None:
        want_TD = want_TD if extra_TD is None else want_TD + extra_TD
        got_TD = output.reshape(-1, output.shape[-1])[:VERIFIED].float()
        error = float((got_TD - want_TD).norm() / want_TD.norm().clamp_min(1e-12))
        if not error <= self.limit:
            raise MoefyError(
                f"verification failed: {where} runs other {what} than were fitted (its output "
                f"differs by {error:.1e}, at most {self.limit:.0e}); nothing was written; please report "
                "this with the model's config.json"
            )
