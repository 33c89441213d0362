"""Mean output: an expert that is off adds its mean output over all tokens (G-MoEfication).

Makes the output worse than nothing wherever the tokens on which an expert runs dominate its mean:
`conditional_mean` is the better constant. Here to compare with.

Shapes: T tokens, D width, N neurons, E routed experts, F neurons per expert.
"""

from collections.abc import Iterable

from torch import Tensor

from moefy.mlp import DenseMlp
from moefy.routing.expert_means import ExpertMeans


class MeanOutput(ExpertMeans):
    """`m_e = E[y_e]`."""

    def fit(self, chunks: Iterable[tuple[Tensor, Tensor, Tensor]], mlp: DenseMlp) -> None:
        """Average the activations, then apply the down projection."""
        experts = len(self.mean_ED)
        sum_N, tokens = mlp.down_ND.new_zeros(mlp.neurons), 0
        for _, h_TN, _ in chunks:
            sum_N += h_TN.sum(0)
            tokens += len(h_TN)
        self.set_activations((sum_N / max(tokens, 1)).view(experts, -1), mlp)
