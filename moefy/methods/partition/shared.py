"""Which neurons are always on: rankings from which the shared experts are filled.

Shapes: T tokens, D model width, N neurons, C domains.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from moefy.errors import RecipeError
from moefy.methods.partition.clusters import gate_activity, marker_table
from moefy.methods.partition.signals import mean_contribution
from moefy.models.mlp import DenseMlp

Ranking = Callable[[DenseMlp, Tensor, Tensor | None], Tensor]
"""`(mlp, x_TD, domain_T) -> [N]`: a higher value is shared first."""

SPECIAL = 0.6
"""Coefficient of variation above which ExpertWeaver calls a neuron specialised."""


def by_contribution(mlp: DenseMlp, x_TD: Tensor, domain_T: Tensor | None) -> Tensor:
    """Mean size of the contribution (ours)."""
    return mean_contribution(mlp, x_TD)


def by_activation_rate(mlp: DenseMlp, x_TD: Tensor, domain_T: Tensor | None) -> Tensor:
    """How often the neuron is among a token's strongest (CMoE)."""
    return marker_table(mlp, x_TD).mean(1)


def by_variation(mlp: DenseMlp, x_TD: Tensor, domain_T: Tensor | None) -> Tensor:
    """How little its activity differs between domains (ExpertWeaver): minus the coefficient of
    variation of the mean gate activity over domains.
    """
    return -variation(mlp, x_TD, domain_T)


def variation(mlp: DenseMlp, x_TD: Tensor, domain_T: Tensor | None) -> Tensor:
    """Standard deviation over mean of each neuron's gate activity across domains: `[N]`.

    Raises `RecipeError` where the sample has fewer than two domains.
    """
    domains = [] if domain_T is None else domain_T.unique().tolist()
    if domain_T is None or len(domains) < 2:
        raise RecipeError(
            "partition.shared_by=variation compares domains, and the corpus has fewer than two; "
            "give one with more (a folder of sub-folders) or another shared_by"
        )
    mean_CN = torch.stack(
        [gate_activity(mlp, x_TD[domain_T == d].float()).abs().mean(0) for d in domains]
    )
    return mean_CN.std(0) / mean_CN.mean(0).clamp_min(1e-12)


def shared_share(variation_N: Tensor) -> float:
    """ExpertWeaver's rule: from 0.7 of the neurons where none is specialised to 0.2 where all are."""
    return 0.7 - 0.5 * float((variation_N > SPECIAL).float().mean())


SHARED_BY: dict[str, Ranking] = {
    "contribution": by_contribution,
    "activation_rate": by_activation_rate,
    "variation": by_variation,
}
