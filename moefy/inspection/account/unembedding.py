"""From the residual stream to logits: the final norm and the output embedding of a language model.

    logits = norm(r) W_U,   norm(r) = (r - centre(r)) gamma / sigma(r) + beta

With sigma frozen the logits are linear in the residual stream, so what an expert writes into it has a
direct effect on every logit: `<(y_e - centre(y_e)) gamma / sigma, W_U[v] - mean_v W_U>`. Subtracting
the mean over the vocabulary leaves the softmax alone and makes effects comparable between tokens.

Shapes: T tokens, D width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_CLOSE = 1e-3
_TOKENS = 16
"""Tokens that tell the norm's form; their logits are made for nothing."""


@dataclass
class Unembedding:
    """The linear map from the residual stream to logits, with the scale of every token frozen."""

    gamma_D: Tensor
    """Gain of the final norm."""
    centred: bool
    """Whether the norm subtracts the mean over channels (LayerNorm) or not (RMSNorm)."""
    weight_VD: Tensor
    """Output embedding, as the model holds it."""
    norm: nn.Module = field(repr=False)
    eps: float = 0.0

    def scale(self, residual_TD: Tensor) -> Tensor:
        """sigma `[T]` of the final norm for these residual streams, in fp32."""
        r_TD = residual_TD.float()
        if self.centred:
            r_TD = r_TD - r_TD.mean(1, keepdim=True)
        return (r_TD.square().mean(1) + self.eps).sqrt()

    def directions(self, tokens_T: Tensor | slice = slice(None)) -> Tensor:
        """For each of these tokens the direction `[., D]` whose inner product with `y_e` is sigma times
        the direct effect on its logit, the mean over the vocabulary taken off."""
        rows = self.weight_VD[tokens_T].float() - self.mean_D
        rows = rows * self.gamma_D
        return rows - rows.mean(1, keepdim=True) if self.centred else rows

    @cached_property
    def mean_D(self) -> Tensor:
        """Mean over the vocabulary of the output embedding `[D]`, in fp32."""
        return self.weight_VD.mean(0, dtype=torch.float32)


def find_unembedding(model: PreTrainedModel, ids_T: Tensor) -> Unembedding | None:
    """The final norm and output embedding, found by running the model on some ids; None where the
    model has none of the forms above (encoders, or logits made in another way).

    The norm is the last module with a gain of the model's width whose output is what the output
    embedding reads; its form is whichever reproduces that output numerically.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(head, nn.Module) or weight is None or weight.is_meta:
        return None
    width = weight.shape[1]
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    read: list[Tensor] = []

    def norm_hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if args and isinstance(out, Tensor):
            calls.append((module, args[0].detach(), out.detach()))

    handles = [head.register_forward_pre_hook(lambda _, args: read.append(args[0].detach()))]
    handles += [
        module.register_forward_hook(norm_hook)
        for module in model.modules()
        if isinstance(gain := getattr(module, "weight", None), Tensor) and gain.shape == (width,)
    ]
    try:
        with torch.no_grad():
            model(input_ids=ids_T[None, :_TOKENS].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not read:
        return None
    for module, r, out in reversed(calls):
        if out.shape == read[-1].shape and torch.equal(out, read[-1]):
            return _matching(module, r.reshape(-1, width), out.reshape(-1, width), weight.detach())
    return None


def _matching(norm: nn.Module, r_TD: Tensor, out_TD: Tensor, weight: Tensor) -> Unembedding | None:
    gain = norm.get_parameter("weight").detach().float()
    bias = getattr(norm, "bias", None)
    eps = float(
        next((getattr(norm, n) for n in ("eps", "variance_epsilon") if hasattr(norm, n)), 0)
    )
    for gamma in (gain, 1 + gain):
        for centred in (True, False):
            found = Unembedding(gamma, centred, weight, norm, eps)
            r = r_TD.float()
            r = r - r.mean(1, keepdim=True) if centred else r
            made = r * gamma / found.scale(r_TD)[:, None] + (0 if bias is None else bias.float())
            error = (made - out_TD.float()).norm() / out_TD.float().norm()
            if error < _CLOSE * (10 if out_TD.dtype != torch.float32 else 1):
                return found
    return None


@contextmanager
def scales(unembedding: Unembedding | None) -> Iterator[list[Tensor]]:
    """Collects sigma `[B, T]` of every pass run meanwhile."""
    found: list[Tensor] = []
    if unembedding is None:
        yield found
        return

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        r = args[0].detach()
        found.append(unembedding.scale(r.reshape(-1, r.shape[-1])).view(r.shape[:-1]))

    handle = unembedding.norm.register_forward_pre_hook(hook)
    try:
        yield found
    finally:
        handle.remove()
