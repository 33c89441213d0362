"""MLPs in a form that depends on their function alone, for draws that mix the neurons of a layer.

Shapes: N neurons.
"""

import torch

from moefy.methods.partition.canonical import HOMOGENEOUS, canonical_gauge, canonical_order
from moefy.models.mlp import DenseMlp


def balanced(mlp: DenseMlp) -> DenseMlp:
    """The MLP in fp32 and canonical order, what is free in each neuron's scale shared out evenly.

    Where the scale of a neuron's up row `u_j` is free (a gated MLP, or a homogeneous activation), it is
    set so that `||u_j|| = ||d_j||`, biases included in `u_j`; its sign is that of `canonical_gauge`.
    """
    mlp = mlp.on_cpu()
    found = canonical_gauge(mlp, canonical_order(mlp))
    degree = 1 if mlp.gate_ND is not None else HOMOGENEOUS.get(mlp.activation, 0)
    if not degree:
        return found
    square_N = found.up_ND.square().sum(1)
    if found.up_bias_N is not None:
        square_N = square_N + found.up_bias_N.square()
    up_N, down_N = square_N.sqrt(), found.down_ND.norm(dim=1)
    scale_N = (down_N / up_N).pow(1 / (1 + degree))
    # A neuron that reads or writes nothing stays as it is.
    scale_N = torch.where((up_N > 0) & (down_N > 0), scale_N, torch.ones_like(scale_N))
    bias_N = None if found.up_bias_N is None else found.up_bias_N * scale_N
    return DenseMlp(
        up_ND=found.up_ND * scale_N[:, None],
        down_ND=found.down_ND / scale_N[:, None] ** degree,
        activation=found.activation,
        gate_ND=found.gate_ND,
        up_bias_N=bias_N,
        gate_bias_N=found.gate_bias_N,
        down_bias_D=found.down_bias_D,
    )
