"""Figures of a layer as sums over documents, so that those of the whole model are their totals.

Shapes: D documents.
"""

import numpy as np

from moefy.interpret.routing_frame import Doubles, RoutingFrame
from moefy.interpret.statistics import ratio_interval

Totals = dict[str, tuple[Doubles, Doubles]]
"""By name, what stands above and below the fraction line, for every document `[D]`."""


def added(parts: list[Totals]) -> Totals:
    """The same figures over several layers."""
    found = {}
    for name in parts[0]:
        tops, bottoms = zip(*(part[name] for part in parts), strict=True)
        found[name] = np.sum(tops, axis=0), np.sum(bottoms, axis=0)
    return found


def ratio_columns(frame: RoutingFrame, totals: Totals) -> dict[str, Doubles]:
    """One row: every figure with its interval over documents."""
    top_DX = np.stack([top for top, _ in totals.values()], axis=1)
    bottom_DX = np.stack([bottom for _, bottom in totals.values()], axis=1)
    interval = ratio_interval(top_DX, bottom_DX, frame.unit_D, seed=frame.seed)
    return {
        key: values[index : index + 1]
        for index, name in enumerate(totals)
        for key, values in interval.columns(name).items()
    }
