"""Single neurons: every token runs those whose score is above a threshold.

Experts of one neuron are experts like others, so `decode` runs a list of neurons that is known already
(an `ExpertMlp` with F = 1). Here the list is made of scores first, on the device: gathering the rows of
a compact list keeps every thread loading, where a mask over all rows would leave most of them waiting.
Three launches, of which the first belongs to routing.

Shapes: T tokens, D width, N neurons.
"""

from torch import Tensor

from moefy_kernels.decode import decode
from moefy_kernels.expert_mlp import ExpertMlp
from moefy_kernels.routing import select


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
    neuron_TK, count_T = select(score_TN, threshold=threshold, most=most)
    return decode(x_TD, mlp, neuron_TK, None, count_T, bias_D)
