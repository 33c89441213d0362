"""Single neurons: every token runs those whose score is above a threshold.

Experts of one neuron are experts like others, so `decode` runs a list of neurons that is known already
(an `ExpertMlp` with F = 1). Here the list is made of scores first, on the device: gathering the rows of
a compact list keeps every thread loading, where a mask over all rows would leave most of them waiting.
Three launches, of which the first belongs to routing.

Shapes: T tokens, D width, N neurons, K length of a list.
"""

import torch
from torch import Tensor

from moefy_kernels import decode, reference, routing
from moefy_kernels.expert_mlp import ExpertMlp
from moefy_kernels.launching import runs_kernels


@torch.library.custom_op("moefy::neuron", mutates_args=())
def _neuron(
    x_TD: Tensor,
    up_EFD: Tensor,
    down_EFD: Tensor,
    activation: str,
    gate_EFD: Tensor | None,
    up_bias_EF: Tensor | None,
    gate_bias_EF: Tensor | None,
    centre_EF: Tensor | None,
    score_TN: Tensor,
    threshold: float,
    most: int,
    bias_D: Tensor | None,
) -> Tensor:
    mlp = ExpertMlp(up_EFD, down_EFD, activation, gate_EFD, up_bias_EF, gate_bias_EF, centre_EF)
    if not runs_kernels(x_TD):
        return reference.neuron(x_TD, mlp, score_TN, threshold, most, bias_D)
    neuron_TK, count_T = routing.select(score_TN, threshold=threshold, most=most)
    return decode.launch(x_TD, mlp, neuron_TK, None, count_T, bias_D)


@_neuron.register_fake
def _(x_TD: Tensor, up_EFD: Tensor, down_EFD: Tensor, *rest: object) -> Tensor:
    return x_TD.new_empty(x_TD.shape, dtype=down_EFD.dtype)


def neuron(
    x_TD: Tensor,
    mlp: ExpertMlp,
    score_TN: Tensor,
    threshold: float,
    most: int | None = None,
    bias_D: Tensor | None = None,
) -> Tensor:
    """Output `[T, D]` of the neurons with a score above `threshold`, the `most` best at most.

    `mlp` has experts of one neuron (raises `ValueError` otherwise); made for 1 to 16 tokens. The
    output has the dtype of the down projection. Without gradients.
    """
    if mlp.size != 1 or score_TN.shape[1] != mlp.experts:
        raise ValueError(
            f"neuron needs experts of 1 neuron and a score for each, got experts of {mlp.size} "
            f"and {score_TN.shape[1]} scores for {mlp.experts}; decode runs lists of larger ones"
        )
    most = min(most or mlp.experts, mlp.experts)
    return _neuron(x_TD, *mlp, score_TN, threshold, most, bias_D)  # type: ignore[no-any-return]
