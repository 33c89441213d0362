"""One token's down projection: a weighted sum of rows, read where they are.

`sum_k h[k] * weights[rows[k]]` is what an embedding bag computes, and on CPUs torch's is vectorised
in every dtype, where a product with a transposed matrix in 16 bits is not. One bag per thread keeps
all cores busy.

Shapes: K rows that count, N neurons, D width.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


def weighted_rows(h_K: Tensor, weights_ND: Tensor, rows_K: Tensor) -> Tensor:
    """The sum `[D]`, in the dtype of both arguments; added up in fp32 where that is 16 bits."""
    if not len(rows_K):
        return weights_ND.new_zeros(weights_ND.shape[1])
    bag = -(-len(rows_K) // torch.get_num_threads())
    offsets = torch.arange(0, len(rows_K), bag)
    parts = embedding_bag(rows_K, weights_ND, offsets, per_sample_weights=h_K, mode="sum")
    wide = torch.promote_types(parts.dtype, torch.float32)
    return parts.sum(0, dtype=wide).to(parts.dtype)
