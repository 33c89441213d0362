"""Ratios of sums over documents, with 95 % bootstrap intervals.

What is drawn again is never the token: tokens of one document are alike, and an interval over them
is far too narrow. Whole sources are drawn, or whole documents where there are fewer than 20 sources.

Shapes: N documents, G groups (sources or documents), R = 1000 resamples.
"""

from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moefy.data import MANY_SOURCES

RESAMPLES = 1000


class Bootstrap:
    """One set of resamples, shared by every figure of the same documents."""

    def __init__(self, sources: list[Hashable], seed: int) -> None:
        """`sources` names the source of every document `[N]`."""
        self.sources = len(set(sources))
        self.by_source = self.sources >= MANY_SOURCES
        labels = sources if self.by_source else list(range(len(sources)))
        numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        self.group_N = np.array([numbers[label] for label in labels])
        groups = len(numbers)
        draws_RG = np.random.default_rng(seed).integers(groups, size=(RESAMPLES, groups))
        self.times_RG = np.stack([np.bincount(draw, minlength=groups) for draw in draws_RG])

    @property
    def unit(self) -> str:
        """What is drawn, in words."""
        return "sources" if self.by_source else "documents (single-source)"

    def ratio(self, top_N: ArrayLike, bottom_N: ArrayLike) -> dict[str, Any] | None:
        """`sum(top) / sum(bottom)` as `mean`, with `ci95`; None where `bottom` is zero."""
        top, bottom = np.asarray(top_N, dtype=float), np.asarray(bottom_N, dtype=float)
        if not bottom.sum():
            return None
        low, over = self._resampled(bottom), self._resampled(top)
        drawn = over[low != 0] / low[low != 0]
        return {
            "mean": float(top.sum() / bottom.sum()),
            "ci95": [float(v) for v in np.quantile(drawn, [0.025, 0.975])],
        }

    def _resampled(self, values_N: NDArray[Any]) -> NDArray[Any]:
        sums_G = np.bincount(self.group_N, weights=values_N, minlength=self.times_RG.shape[1])
        return np.asarray(self.times_RG @ sums_G)
