"""Masked dense: every neuron is computed, the neurons of experts that are off are set to zero.

The PyTorch twin of every other operation here, and the fastest one wherever most experts run or the
layer is too small for anything else to pay.

Shapes: T tokens, D width, N neurons, E experts, F = N/E neurons per expert.
"""

from typing import Protocol

import torch
from torch import Tensor

from moefy_kernels.weighted_rows import weighted_rows


class ExpertWeights(Protocol):
    """One MLP with its neurons in expert order: expert `e` owns rows `e*F` to `(e+1)*F`."""

    @property
    def up_ND(self) -> Tensor:
        """Rows of the up projection."""
        ...

    @property
    def down_ND(self) -> Tensor:
        """Rows of the transposed down projection."""
        ...

    @property
    def down_bias_D(self) -> Tensor | None:
        """The output bias."""
        ...

    def hidden(self, x_TD: Tensor, rows: slice = ...) -> Tensor:
        """Activations `[T, rows]` of a run of neurons; a run must be a view, never a copy."""
        ...

    def at(self, token_C: Tensor) -> "ExpertWeights":
        """What computes some tokens of the batch: itself, unless it holds something of each token."""
        ...


def masked_mlp(x_TD: Tensor, weights: ExpertWeights, mask_TE: Tensor) -> Tensor:
    """Output `[T, D]` of the experts that `mask_TE` (bool) turns on for each token.

    The down projection may be of another dtype than the rest (T5 keeps it in fp32); the output has
    that dtype.
    """
    tokens, experts = mask_TE.shape
    h_TEF = weights.hidden(x_TD).view(tokens, experts, -1)
    if mask_TE.dtype == torch.bool:
        h_TN = torch.where(mask_TE[:, :, None], h_TEF, 0).reshape(tokens, -1)
    else:  # in training, a number that carries a gradient
        h_TN = (h_TEF * mask_TE[:, :, None].to(h_TEF.dtype)).view(tokens, -1)
    h_TN = h_TN.to(weights.down_ND.dtype)
    if tokens == 1 and not (h_TN.is_cuda or torch.is_grad_enabled()):
        every_N = torch.arange(h_TN.shape[1])
        y_TD = weighted_rows(h_TN[0], weights.down_ND, every_N)[None]
    else:
        y_TD = h_TN @ weights.down_ND
    return y_TD if weights.down_bias_D is None else y_TD + weights.down_bias_D
