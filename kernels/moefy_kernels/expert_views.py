"""Experts as views of the weights: only the rows of experts that run are read, none is copied.

The torch-only path for CPUs. A gather (`index_select`) of the same rows loses to dense, because
copying a weight costs as much memory traffic as using it.

Shapes: T tokens, D width, N neurons, E experts, F = N/E neurons per expert.
"""

import itertools

import torch
from torch import Tensor

from moefy_kernels.reference import ExpertWeights
from moefy_kernels.weighted_rows import weighted_rows


def expert_views_mlp(x_TD: Tensor, weights: ExpertWeights, mask_TE: Tensor) -> Tensor:
    """Views of the experts that run, by torch: output `[T, D]`, the same function as `reference.masked_mlp`.

    One token walks over runs of neighbouring experts that are on; many tokens walk over the
    experts, each with the tokens that chose it.
    """
    size = weights.up_ND.shape[0] // mask_TE.shape[1]
    y_TD = x_TD.new_zeros(x_TD.shape, dtype=weights.down_ND.dtype)
    if x_TD.shape[0] == 1:
        expert_K = mask_TE[0].nonzero()[:, 0]
        runs = [slice(a * size, b * size) for a, b in _runs(expert_K.tolist())]
        if runs:
            h_K = torch.cat([weights.hidden(x_TD, rows)[0] for rows in runs])
            row_K = (expert_K[:, None] * size + torch.arange(size)).flatten()
            y_TD = weighted_rows(h_K.to(weights.down_ND.dtype), weights.down_ND, row_K)[None]
    else:
        expert_P, token_P = mask_TE.T.nonzero(as_tuple=True)
        counts = torch.bincount(expert_P, minlength=mask_TE.shape[1]).tolist()
        for expert, token_C in enumerate(token_P.split(counts)):
            if token_C.numel():
                rows = slice(expert * size, (expert + 1) * size)
                h_CF = weights.at(token_C).hidden(x_TD[token_C], rows).to(weights.down_ND.dtype)
                # Under autocast the product is of another dtype.
                part_CD = h_CF @ weights.down_ND[rows]
                y_TD.index_add_(0, token_C, part_CD.to(y_TD.dtype))
    return y_TD if weights.down_bias_D is None else y_TD + weights.down_bias_D


def _runs(experts: list[int]) -> list[tuple[int, int]]:
    """Sorted expert ids as half-open runs: [1, 2, 5] -> [(1, 3), (5, 6)]."""
    # Neighbours share the difference between their value and their position.
    groups = itertools.groupby(enumerate(experts), key=lambda pair: pair[1] - pair[0])
    return [(run[0][1], run[-1][1] + 1) for run in ([*group] for _, group in groups)]
