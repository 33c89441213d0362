"""The weights of one MLP in experts, as views that every kernel takes.

Nothing here copies: a matrix `[N, D]` in expert order, half of a fused `[E, 2F, D]` and a stock down
projection `[E, D, F]` seen from the side are all views `[E, F, D]`. Reading is fastest where the last
stride is 1, which the neuron-major layout of moefy has everywhere.

Shapes: D width, N neurons, E experts, F = N/E neurons per expert.
"""

from typing import NamedTuple

from torch import Tensor

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "linear")
"""What kernels compute; `gelu` is exact (erf), `relu2` the square of ReLU."""


class ExpertMlp(NamedTuple):
    """`y(x) = sum_e w_e sum_f (act(gate x + a)(up x + c) - centre) down`; without a gate `act(up x + c)`."""

    up_EFD: Tensor
    down_EFD: Tensor
    """Rows of the transposed down projection."""
    activation: str
    """One of `ACTIVATIONS`."""
    gate_EFD: Tensor | None = None
    up_bias_EF: Tensor | None = None
    """Like the other two vectors, its last stride is 1."""
    gate_bias_EF: Tensor | None = None
    centre_EF: Tensor | None = None
    """What is taken from every activation: where neurons stand that are off."""

    @classmethod
    def of(
        cls,
        experts: int,
        activation: str,
        up_ND: Tensor,
        down_ND: Tensor,
        gate_ND: Tensor | None = None,
        up_bias_N: Tensor | None = None,
        gate_bias_N: Tensor | None = None,
        centre_N: Tensor | None = None,
    ) -> "ExpertMlp":
        """Neuron-major matrices in expert order: expert `e` owns rows `e*F` to `(e+1)*F`."""
        up_EFD, down_EFD, gate_EFD, *vectors = (
            None if value is None else value.unflatten(0, (experts, -1))
            for value in (up_ND, down_ND, gate_ND, up_bias_N, gate_bias_N, centre_N)
        )
        assert up_EFD is not None and down_EFD is not None
        return cls(up_EFD, down_EFD, activation, gate_EFD, *vectors)

    @property
    def experts(self) -> int:
        """E, all experts."""
        return self.up_EFD.shape[0]

    @property
    def size(self) -> int:
        """F, neurons per expert."""
        return self.up_EFD.shape[1]

    @property
    def width(self) -> int:
        """D, the width of the model."""
        return self.up_EFD.shape[2]

    @property
    def matrices(self) -> int:
        """Weight matrices: 3 with a gate, 2 without."""
        return 2 if self.gate_EFD is None else 3
