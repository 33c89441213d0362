"""Routers made of the weights' own rows; nothing is fitted.

Shapes: T tokens, D width, N neurons, E routed experts, F neurons per expert.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize

from moefy.methods.base import Router
from moefy.methods.partition.clusters import marker_table
from moefy.models.mlp import DenseMlp, activation_function


class CentroidRouter(Router):
    """Centroid router: closeness of the token to the mean direction of each expert's neurons.

    MoEfication's similarity selection (Zhang et al. 2022): nothing is fitted.

    Scores `-||x/|x| - c_e||` with `c_e` the mean of the expert's normalised input rows.
    """

    trainable = False
    centroid: Tensor

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.register_buffer("centroid", torch.zeros(experts, width))

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, whole: DenseMlp) -> None:
        """Take the centroids from the gate rows, or the up rows without a gate."""
        rows_ND = normalize(mlp.selecting_ND.float(), dim=-1)
        self.centroid.copy_(rows_ND.view(len(self.centroid), -1, mlp.width).mean(1))

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`, between -2 and 0."""
        return -torch.cdist(normalize(x_TD.float(), dim=-1), self.centroid.float())


class MeanGateRouter(Router):
    """Mean-gate router: each expert's mean gate vector, unfitted (ExpertWeaver, arXiv 2602.15521).

    Scores `x . mean of the expert's gate rows`, the up rows without a gate.
    """

    trainable = False
    mean_ED: Tensor

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.register_buffer("mean_ED", torch.zeros(experts, width))

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, whole: DenseMlp) -> None:
        """Take the means."""
        self.mean_ED.copy_(mlp.selecting_ND.float().view(len(self.mean_ED), -1, mlp.width).mean(1))

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`."""
        return linear(x_TD.float(), self.mean_ED.float())


class RepresentativeRouter(Router):
    """Representative-neuron router: one real neuron speaks for each expert (CMoE, Pei et al. 2025).

    The representative is the neuron whose activation markers are nearest to the expert's mean markers.
    Nothing is fitted: two rows per expert are copied, or one without a gate.

    Scores `|act(g.x) (u.x)|` with the normalised rows of the representative neuron.
    """

    trainable = False
    gate_ED: Tensor
    up_ED: Tensor
    activation: str

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.register_buffer("up_ED", torch.zeros(experts, width))
        self.register_buffer("gate_ED", torch.zeros(experts, width))

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, whole: DenseMlp) -> None:
        """Find the representatives on the sample `x_TD`."""
        experts = len(self.up_ED)
        # Markers are found among all neurons; the shared ones come first.
        marker_EFT = marker_table(whole, x_TD)[-mlp.neurons :].view(experts, -1, len(x_TD))
        far_EF = (marker_EFT - marker_EFT.mean(1, keepdim=True)).abs().sum(-1)
        chosen_E = far_EF.argmin(1) + torch.arange(experts) * far_EF.shape[1]
        self.up_ED.copy_(normalize(mlp.up_ND[chosen_E].float(), dim=-1))
        if mlp.gate_ND is not None:
            self.gate_ED.copy_(normalize(mlp.gate_ND[chosen_E].float(), dim=-1))

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`, never negative."""
        act, up_TE = activation_function(mlp.activation), linear(x_TD.float(), self.up_ED.float())
        if mlp.gate_ND is None:
            return act(up_TE).abs()
        return (act(linear(x_TD.float(), self.gate_ED.float())) * up_TE).abs()

    def weights_read(self, mlp: DenseMlp) -> int:
        """The rows of the representatives."""
        return self.up_ED.numel() * (1 if mlp.gate_ND is None else 2)
