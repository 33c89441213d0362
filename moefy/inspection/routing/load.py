"""How often every expert runs: load, its evenness over a layer, dead experts, load by position.

Shapes: T tokens, D documents, E routed experts.
"""

from typing import Any

import numpy as np

from moefy.evaluation.statistics import ratio_interval
from moefy.inspection.routing.frame import Doubles, Routed, RoutingFrame, bin_edges

Columns = dict[str, Any]


def load(frame: RoutingFrame, routed: Routed) -> dict[str, Columns]:
    """Columns of `experts` and `layers`, and the tables `dead` and `positions` of one layer."""
    ran_DE = frame.by_document(routed.mask_TE)
    interval = ratio_interval(ran_DE, frame.tokens_D, frame.unit_D, seed=frame.seed)
    documents_E, tokens_E = (ran_DE > 0).sum(0), ran_DE.sum(0)
    whole = len(frame), len(frame.tokens_D)
    experts: Columns = {
        name: routed.column(values, shared=1.0) for name, values in interval.columns("load").items()
    }
    experts["documents"] = _whole(routed.column(documents_E, whole[1]))
    experts["tokens"] = _whole(routed.column(tokens_E, whole[0]))
    dead_E = np.flatnonzero(tokens_E == 0)
    layers = {
        "tokens": [whole[0]],
        "documents": [whole[1]],
        "units": [frame.units],
        "routed_experts": [routed.experts],
        "active": np.array([routed.active_T.mean()]),
        "load_entropy": np.array([evenness(routed.load_E)]),
        "load_gini": np.array([gini(routed.load_E)]),
        "dead": [len(dead_E)],
    }
    dead = {
        "layer": [routed.layer] * len(dead_E),
        "expert": dead_E + routed.shared,
        "tokens": [whole[0]] * len(dead_E),
        "documents": [whole[1]] * len(dead_E),
    }
    positions = _positions(frame, routed)
    return {"experts": experts, "layers": layers, "dead": dead, "positions": positions}


def evenness(load_E: Doubles) -> float:
    """Entropy of the loads as shares, over that of even loads: 1 is even, 0 is one expert alone."""
    if len(load_E) < 2 or not load_E.sum():
        return float("nan")
    share_E = load_E[load_E > 0] / load_E.sum()
    return float(-(share_E * np.log2(share_E)).sum() / np.log2(len(load_E)))


def gini(load_E: Doubles) -> float:
    """Gini coefficient: 0 is even, `1 - 1 / E` is one expert alone."""
    if not load_E.sum():
        return float("nan")
    size = len(load_E)
    rank_E = 2 * np.arange(1, size + 1) - size - 1
    return float((rank_E * np.sort(load_E)).sum() / (size * load_E.sum()))


def _positions(frame: RoutingFrame, routed: Routed) -> Columns:
    bins, experts = frame.bin.size, routed.experts
    count_B = frame.bin.count_C
    load_BE = frame.bin.sums(routed.mask_TE).astype(np.float64) / np.maximum(count_B, 1)[:, None]
    load_BE[count_B == 0] = np.nan
    first, last = bin_edges(bins)
    return {
        "layer": [routed.layer] * (bins * experts),
        "expert": np.repeat(np.arange(experts), bins) + routed.shared,
        "position": np.tile(first, experts),
        "position_last": np.tile(last, experts),
        "tokens": np.tile(count_B, experts),
        "load": load_BE.T.ravel(),
    }


def _whole(values_E: Doubles) -> list[int]:
    return [int(value) for value in values_E]
