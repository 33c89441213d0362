"""Fit one layer's router, selection and compensation on captured MLP inputs.

The target of a router is the oracle: the `k` experts with the largest contribution norm. Its loss is
binary cross-entropy in which every (token, expert) weighs as its squared contribution does, so that
a router is punished for what its mistake costs.

Shapes: T tokens, D width, N routed neurons, E routed experts.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from moefy.mlp import DenseMlp
from moefy.recipe import RouterRecipe
from moefy.routing import expert_norms
from moefy.routing.base import Compensation, Router, Selection

_CHUNK = 4096


@dataclass(frozen=True)
class RouterFit:
    """How well a router came out, on documents it was not fitted on."""

    epochs: int
    """Passes that were made; the best of them was kept."""
    captured: float
    """Squared contribution of the chosen experts over that of the oracle's, static top-k."""
    recall: float
    """Share of the oracle's experts that were chosen."""

    def record(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def contributions(mlp: DenseMlp, x_TD: Tensor, experts: int) -> Tensor:
    """Norms `[T, E]` of the experts' outputs in fp32; `mlp` has the routed neurons in order."""
    mlp = mlp.to(torch.float32)
    chunks = x_TD.split(_CHUNK)
    return torch.cat([expert_norms(mlp.hidden(x.float()), mlp.down_ND, experts) for x in chunks])


def top_mask(scores_TE: Tensor, k: int) -> Tensor:
    """Mask `[T, E]` of the `k` highest scores of each token."""
    ids_TK = scores_TE.topk(k, dim=-1).indices
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(-1, ids_TK, True)


def fit_router(
    router: Router,
    mlp: DenseMlp,
    x_TD: Tensor,
    held_TD: Tensor,
    *,
    experts: int,
    k: int,
    recipe: RouterRecipe,
    seed: int,
) -> RouterFit:
    """Fit `router` on `x_TD` and keep the epoch that captures most on the held-out `held_TD`.

    `mlp` has the routed neurons in expert order. A router with nothing to fit is only measured.
    """
    held_norm_TE = contributions(mlp, held_TD, experts)
    held_TD = held_TD.float()
    if not router.trainable or k == experts:
        return RouterFit(0, *_quality(router, mlp, held_TD, held_norm_TE, k))
    norm_TE = contributions(mlp, x_TD, experts)
    target_TE = top_mask(norm_TE, k).float()
    weight_TE = norm_TE.square()
    weight_TE = weight_TE / weight_TE.mean(1, keepdim=True).clamp_min(1e-30)
    # A bias common to all experts changes no ranking; it lets a bias-free router fit the rate.
    offset = torch.nn.Parameter(torch.tensor(0.0))
    parameters = [*router.parameters(), offset]
    steps = -(-len(x_TD) // recipe.batch_size) * recipe.epochs
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=steps + 1, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(seed)
    best, best_state, waited = _quality(router, mlp, held_TD, held_norm_TE, k), _copy(router), 0
    epochs = 0
    for epochs in range(1, recipe.epochs + 1):  # noqa: B007 - its last value is recorded
        order = torch.randperm(len(x_TD), generator=generator)
        for rows in order.split(recipe.batch_size):
            with torch.enable_grad():
                logits_BE = router(x_TD[rows].float(), mlp) + offset
                loss = binary_cross_entropy_with_logits(
                    logits_BE, target_TE[rows], weight=weight_TE[rows]
                )
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
            schedule.step()
        quality = _quality(router, mlp, held_TD, held_norm_TE, k)
        if quality[0] > best[0]:
            best, best_state, waited = quality, _copy(router), 0
        else:
            waited += 1
            if waited == 4:
                break
    router.load_state_dict(best_state)
    return RouterFit(epochs, *best)


@torch.no_grad()
def _quality(
    router: Router, mlp: DenseMlp, x_TD: Tensor, norm_TE: Tensor, k: int
) -> tuple[float, float]:
    """Captured share of the oracle's squared contribution, and recall of its experts."""
    scores = [router(x, mlp) for x in x_TD.split(_CHUNK)]
    chosen_TE, oracle_TE = top_mask(torch.cat(scores), k), top_mask(norm_TE, k)
    square_TE = norm_TE.square()
    captured = (square_TE * chosen_TE).sum() / (square_TE * oracle_TE).sum().clamp_min(1e-30)
    recall = (chosen_TE & oracle_TE).sum() / oracle_TE.sum()
    return captured.item(), recall.item()


def _copy(router: Router) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in router.state_dict().items()}


@torch.no_grad()
def fit_selection(
    kind: type[Selection], router: Router, mlp: DenseMlp, held_TD: Tensor, k: int
) -> Selection:
    """Settings of the selection from the router's scores on held-out tokens."""
    return kind.fit(torch.cat([router(x.float(), mlp) for x in held_TD.split(_CHUNK)]), k)


@torch.no_grad()
def fit_compensation(
    compensation: Compensation, router: Router, selection: Selection, mlp: DenseMlp, x_TD: Tensor
) -> None:
    """Fit what stands in for experts that are off, under the routing that will be used."""
    mlp = mlp.to(torch.float32)

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        for x in x_TD.split(_CHUNK):
            yield mlp.hidden(x.float()), selection(router(x.float(), mlp))

    compensation.fit(chunks(), mlp)
