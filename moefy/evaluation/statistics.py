"""Intervals and tests whose unit is the document, or the source where a domain has 20 or more.

Tokens of one document are alike: a test that counts tokens calls noise significant in a third of all
cases. Effect sizes come first; q-values are over all cells that are shown together. `Bootstrap` draws
the percentile intervals of an evaluation's ratios of sums.

Shapes: D or N documents, G units (sources or documents), C cells, R resamples.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from moefy.data.corpus import MANY_SOURCES
from moefy.data.documents import Documents

RESAMPLES = 2000
FEW = 100
"""Below so many units the percentile interval is corrected for bias and skewness."""
LEVEL = 0.95
_CELLS = 512

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """Estimates and 95 % intervals `[C]`; NaN where there is nothing to divide by, and for the interval
    where there is one unit alone."""

    mean_C: Floats
    low_C: Floats
    high_C: Floats

    def columns(self, name: str) -> dict[str, Floats]:
        """Three columns of a table: `name`, `name_low`, `name_high`."""
        return {name: self.mean_C, f"{name}_low": self.low_C, f"{name}_high": self.high_C}


def units(documents: Documents, chosen_D: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
    """The unit of every document `[D]`, numbered from 0: its source in domains that have 20 sources
    or more among the chosen documents, else itself. Documents that are not chosen have -1."""
    chosen = np.ones(len(documents), dtype=bool) if chosen_D is None else chosen_D
    sources, domains = documents.sources, [doc.domain for doc in documents.documents]
    many = {
        domain
        for domain in set(domains)
        if len({s for s, d, c in zip(sources, domains, chosen, strict=True) if c and d == domain})
        >= MANY_SOURCES
    }
    numbers: dict[Any, int] = {}
    found = np.full(len(documents), -1, dtype=np.int64)
    for index in np.flatnonzero(chosen):
        label = sources[index] if domains[index] in many else index
        found[index] = numbers.setdefault(label, len(numbers))
    return found


def ratio_interval(
    top_DC: ArrayLike, bottom_DC: ArrayLike, unit_D: ArrayLike, *, seed: int = 0
) -> Interval:
    """`sum_D top / sum_D bottom` of every cell with its bootstrap interval over units.

    Top and bottom are resampled together. `bottom` may be `[D]`. Documents with the unit -1 are left
    out. The percentile interval; corrected for bias and skewness (BCa, Efron 1987) where a cell has
    fewer than 100 units with a bottom. Each cell is resampled over the units that have one.
    """
    top, bottom = np.asarray(top_DC, dtype=float), np.asarray(bottom_DC, dtype=float)
    if bottom.ndim == 1:
        bottom = np.broadcast_to(bottom[:, None], top.shape)
    unit = np.asarray(unit_D)
    used = unit >= 0
    units_ = np.unique(unit[used], return_inverse=True)[1]
    groups, cells = int(units_.max(initial=-1)) + 1, top.shape[1]
    top_GC, bottom_GC = (_summed(values[used], units_, groups) for values in (top, bottom))
    found = np.full((3, cells), np.nan)
    # Cells that have the same units share their resamples.
    patterns = np.packbits(bottom_GC != 0, axis=0)
    _, kind_C = np.unique(patterns, axis=1, return_inverse=True)
    for kind in range(int(kind_C.max(initial=-1)) + 1):
        same_C = np.flatnonzero(kind_C == kind)
        has_G = bottom_GC[:, same_C[0]] != 0
        if not has_G.any():
            continue
        times_RG = _resamples(int(has_G.sum()), seed)
        for first in range(0, len(same_C), _CELLS):
            at = same_C[first : first + _CELLS]
            found[:, at] = _interval(top_GC[has_G][:, at], bottom_GC[has_G][:, at], times_RG)
    return Interval(*found)


def _summed(values_DC: Floats, unit_D: NDArray[np.int64], groups: int) -> Floats:
    found = np.zeros((groups, values_DC.shape[1]))
    np.add.at(found, unit_D, values_DC)
    return found


def _resamples(groups: int, seed: int) -> Floats:
    random = np.random.default_rng([seed, groups])
    return random.multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES).astype(float)


def _interval(top_GC: Floats, bottom_GC: Floats, times_RG: Floats) -> Floats:
    """Mean, low and high `[3, C]`."""
    groups = len(top_GC)
    top_C, bottom_C = top_GC.sum(0), bottom_GC.sum(0)
    mean_C = top_C / bottom_C
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn_RC = (times_RG @ top_GC) / (times_RG @ bottom_GC)
    tails = np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if groups == 1:
        # One document does not say how much documents differ.
        return np.stack([mean_C, *np.full((2, len(mean_C)), np.nan)])
    if groups >= FEW or groups < 3:
        low, high = np.nanquantile(drawn_RC, tails, axis=0)
        return np.stack([mean_C, low, high])
    with np.errstate(invalid="ignore", divide="ignore"):
        left_GC = (top_C - top_GC) / (bottom_C - bottom_GC)
    skew_C = left_GC.mean(0) - left_GC
    power_C = (skew_C**2).sum(0)
    acceleration_C = np.where(power_C > 0, (skew_C**3).sum(0) / (6 * power_C**1.5 + 1e-300), 0.0)
    below_C = (drawn_RC < mean_C).mean(0) + (drawn_RC == mean_C).mean(0) / 2
    bias_C = stats.norm.ppf(np.clip(below_C, 1 / RESAMPLES, 1 - 1 / RESAMPLES))
    z = stats.norm.ppf(tails)[:, None]
    level_2C = stats.norm.cdf(bias_C + (bias_C + z) / (1 - acceleration_C * (bias_C + z)))
    ordered_RC = np.sort(drawn_RC, axis=0)
    at_2C = np.clip((level_2C * (RESAMPLES - 1)).round().astype(int), 0, RESAMPLES - 1)
    low, high = np.take_along_axis(ordered_RC, at_2C, axis=0)
    return np.stack([mean_C, low, high])


def null_p(observed_C: ArrayLike, null_RC: ArrayLike) -> Floats:
    """One-sided p of every cell, `(1 + #{null >= observed}) / (1 + R)`."""
    observed, null = np.asarray(observed_C), np.asarray(null_RC)
    return np.asarray((1 + (null >= observed).sum(0)) / (1 + len(null)), dtype=float)


def null_z(observed_C: ArrayLike, null_RC: ArrayLike) -> Floats:
    """`(observed - mean of null) / standard deviation of null`; 0 where both agree, NaN where only
    the null does not vary."""
    observed, null = np.asarray(observed_C, dtype=float), np.asarray(null_RC, dtype=float)
    away, spread = observed - null.mean(0), null.std(0, ddof=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = np.where(spread > 0, away / spread, np.where(away == 0, 0.0, np.nan))
    return np.asarray(found, dtype=float)


def q_values(p_C: ArrayLike) -> Floats:
    """Benjamini and Hochberg's adjusted p over all cells of any shape; NaN stays NaN."""
    p = np.asarray(p_C, dtype=float)
    found = np.full(p.shape, np.nan)
    known = ~np.isnan(p)
    if known.any():
        found[known] = stats.false_discovery_control(p[known], method="bh")
    return found


DRAWS = 1000


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
        draws_RG = np.random.default_rng(seed).integers(groups, size=(DRAWS, groups))
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
