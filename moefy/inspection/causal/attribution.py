"""A cheap guess at the causal matrix: one pass forward and one backward for all layers and experts.

    A[e, d] = mean over documents of mean_t <dCE/dy, c_e - y_e>        (attribution patching)

the first-order effect of replacing y_e by c_e. It is not the effect: it is shown beside its rank
correlation with the true one, and never printed as M. For encoders the loss 1 - cosine has no first
order; in its place is `E ||c_e - y_e||^2`, the energy of what is taken away.

The contraction goes over neurons, `sum_j (c_j - h_j) <g, d_j>`, so that no `[T, E, D]` is formed.

Shapes: T positions of a batch, N neurons, E experts, D width; S all experts, layer by layer, Q documents, C domains.
"""

from contextlib import ExitStack
from functools import partial

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from moefy.data.corpus import Batch
from moefy.evaluation.outputs import ce_per_token, judged_positions, run_outputs
from moefy.evaluation.statistics import Floats, ends, resampled
from moefy.inspection.causal.documents import Texts
from moefy.inspection.causal.engine import AblationEngine, Base, means
from moefy.inspection.causal.matrix import Matrix, cells
from moefy.inspection.record import Table, table
from moefy.methods.routers.baselines import expert_norms
from moefy.run.console import Reporter

GRADIENT, ENERGY = "gradient", "energy"


def attribution(engine: AblationEngine, texts: Texts, report: Reporter, what: str) -> Floats:
    """A of every expert and document `[S, Q]`."""
    own = []
    for number in report.track(engine.processes.mine(range(len(texts.batches))), what):
        batch = texts.batches[number]
        base, sums = engine.base(batch), []
        gradient = _gradients(engine, batch) if batch.targets_BT is not None else None
        for layer, module in engine.modules.items():
            along_TE = _along(base, layer, module.experts, gradient)
            keep_BT1 = judged_positions(batch)[:, :, None].to(along_TE.device)
            # The loss at one position moves with what is added at all positions before it.
            counted = keep_BT1 if gradient is None else torch.ones_like(keep_BT1)
            along_BTE = along_TE.view(*keep_BT1.shape[:2], -1) * counted
            sums.append(along_BTE.double().sum(1).T.cpu().numpy())
        own.append((number, np.concatenate(sums)))
    return np.concatenate(engine.processes.in_order(own), axis=1) / texts.tokens_Q


@torch.no_grad()
def _along(base: Base, layer: int, experts: int, gradient: dict[int, Tensor] | None) -> Tensor:
    change_TN, down_ND = base.change(layer)
    if gradient is None:
        return expert_norms(change_TN, down_ND, experts).square()
    along_TN = change_TN * (gradient[layer].to(change_TN.dtype) @ down_ND.T)
    return along_TN.view(len(along_TN), experts, -1).sum(-1)


def _gradients(engine: AblationEngine, batch: Batch) -> dict[int, Tensor]:
    """dCE/dy `[T, D]` of every layer, CE summed over the tokens of the batch."""
    added: dict[int, Tensor] = {}

    def add(layer: int, _: nn.Module, __: object, y: Tensor) -> Tensor:
        added[layer] = torch.zeros_like(y).requires_grad_()
        return y + added[layer]

    with ExitStack() as hooks:
        for layer, module in engine.modules.items():
            hooks.enter_context(module.register_forward_hook(partial(add, layer)))
        with torch.enable_grad(), engine.running():
            loss = ce_per_token(run_outputs(engine.model, batch)).sum()
            grads = torch.autograd.grad(loss, list(added.values()))
    return {layer: g.reshape(-1, g.shape[-1]) for layer, g in zip(added, grads, strict=True)}


def attribution_table(
    engine: AblationEngine, attribution_SQ: Floats, texts: Texts, square: Matrix, *, seed: int = 0
) -> Table:
    """Table `screen`: A beside M where M was computed, and how their ranks agree in every domain."""
    domains, pairs = texts.documents.domains, engine.experts
    attribution_SC = means(attribution_SQ, texts.documents.domain_Q, len(domains))
    place = {pair: row for row, pair in enumerate(pairs)}
    rows = [place[pair] for pair in square.experts]
    true_SC = np.full(attribution_SC.shape, np.nan)
    true_SC[rows] = square.ce.mean_C
    rank_C = [
        _spearman(attribution_SC[rows, c], true_SC[rows, c], seed) for c in range(len(domains))
    ]
    kind = GRADIENT if texts.batches[0].targets_BT is not None else ENERGY
    columns = {
        **cells(pairs, domains),
        "screen": attribution_SC.ravel(),
        "kind": [kind] * attribution_SC.size,
        "ce": true_SC.ravel(),
        "measured": np.isfinite(true_SC).ravel(),
        **{
            name: np.tile([rank[i] for rank in rank_C], len(pairs))
            for i, name in enumerate(("spearman", "spearman_low", "spearman_high"))
        },
        "spearman_experts": [len(rows)] * attribution_SC.size,
    }
    return table(columns)


def _spearman(a_E: Floats, b_E: Floats, seed: int) -> tuple[float, float, float]:
    """Rank correlation over experts, with a bootstrap interval over experts."""
    if len(a_E) < 3:
        return (np.nan,) * 3
    at_RE = resampled(len(a_E), seed)
    a_RE, b_RE = (stats.rankdata(v[at_RE], axis=1) for v in (a_E, b_E))
    a_RE, b_RE = (v - v.mean(1, keepdims=True) for v in (a_RE, b_RE))
    size_R = np.sqrt((a_RE**2).sum(1) * (b_RE**2).sum(1))
    drawn_R = (a_RE * b_RE).sum(1) / np.maximum(size_R, 1e-300)
    rank = float(stats.spearmanr(a_E, b_E).statistic)
    low, high = ends(rank, drawn_R)
    return rank, float(low), float(high)
