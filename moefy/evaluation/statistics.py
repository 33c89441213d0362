"""Intervals and tests whose unit is the document, or the source where a domain has 20 or more.

Tokens of one document are alike: a test that counts tokens calls noise significant in a third of all
cases. Effect sizes come first; q-values are over all cells that are shown together.

This is the only bootstrap: `resamples` draws units anew, `ends` makes an interval of what they give. It
is the percentile interval, corrected for bias and skewness (BCa, Efron 1987) where a figure has fewer than
100 units and an acceleration, which medians and ranks have not.

Shapes: Q documents, G units (sources or documents), C cells, R resamples.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from moefy.data.corpus import MANY_SOURCES
from moefy.data.shards import Documents, Ints

RESAMPLES = 2000
FEW = 100
"""Below this many units the percentile interval is corrected for bias and skewness."""
LEVEL = 0.95
_CELLS = 512

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """Estimates and 95 % intervals `[C]`; NaN where nothing is divided by, and for the interval
    of one unit alone."""

    mean_C: Floats
    low_C: Floats
    high_C: Floats

    def columns(self, name: str) -> dict[str, Floats]:
        """Three columns of a table: `name`, `name_low`, `name_high`."""
        return {name: self.mean_C, f"{name}_low": self.low_C, f"{name}_high": self.high_C}


def units(documents: Documents, chosen_Q: NDArray[np.bool_] | None = None) -> Ints:
    """The unit of every document `[Q]`, numbered from 0: its source in domains that have 20 sources
    or more among the chosen documents, else itself. Documents that are not chosen have -1."""
    chosen = np.ones(len(documents), dtype=bool) if chosen_Q is None else chosen_Q
    domains = np.array([doc.domain for doc in documents.documents])
    unit_Q = np.full(len(documents), -1, dtype=np.int64)
    sources = [source for source, here in zip(documents.sources, chosen, strict=True) if here]
    unit_Q[chosen] = units_of(domains[chosen].tolist(), sources)
    return unit_Q


def units_of(domains: Sequence[str], sources: Sequence[Hashable]) -> Ints:
    """The same of documents of these domains and sources `[Q]`, all of them chosen."""
    many = domains_by_source(domains, sources)
    numbers: dict[Any, int] = {}
    labels = [
        (domain, source) if domain in many else index
        for index, (domain, source) in enumerate(zip(domains, sources, strict=True))
    ]
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)


def domains_by_source(domains: Sequence[str], sources: Sequence[Hashable]) -> set[str]:
    """The domains whose sources are the units."""
    by_domain: dict[str, set[Hashable]] = {}
    for domain, source in zip(domains, sources, strict=True):
        by_domain.setdefault(domain, set()).add(source)
    return {domain for domain, here in by_domain.items() if len(here) >= MANY_SOURCES}


def unit_words(domains: Sequence[str], sources: Sequence[Hashable]) -> str:
    """What is drawn anew, in words."""
    many = domains_by_source(domains, sources)
    if not many:
        return "documents (single-source)"
    return "sources" if many == set(domains) else "sources, or documents in domains of few"


def resamples(groups: int, *seed: int) -> Floats:
    """How many times each unit is drawn in every resample `[R, G]`."""
    random = np.random.default_rng([*seed, groups])
    return random.multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES).astype(float)


def resampled(groups: int, *seed: int) -> Ints:
    """The units of the same resamples by their numbers `[R, G]`, for what is no ratio of sums."""
    times_RG = resamples(groups, *seed).astype(np.int64)
    return np.repeat(np.tile(np.arange(groups), RESAMPLES), times_RG.ravel()).reshape(-1, groups)


def ends(
    estimate: Floats | float,
    drawn: Floats,
    acceleration: Floats | None = None,
    *,
    level: float = LEVEL,
) -> Floats:
    """Low and high `[2, ...]` of estimates `[...]` from what resamples gave `[R, ...]`, which are sorted
    in place; BCa with an `acceleration`, otherwise the percentile interval."""
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if acceleration is None:
        quantile = np.nanquantile if np.isnan(drawn).any() else np.quantile
        return np.asarray(quantile(drawn, tails, axis=0))
    below = (drawn < estimate).mean(0) + (drawn == estimate).mean(0) / 2
    bias = stats.norm.ppf(np.clip(below, 1 / RESAMPLES, 1 - 1 / RESAMPLES))
    z = np.asarray(stats.norm.ppf(tails)).reshape(2, *(1,) * bias.ndim)
    share = stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
    drawn.sort(axis=0)
    at = np.clip((share * (RESAMPLES - 1)).round().astype(int), 0, RESAMPLES - 1)
    return np.asarray(np.take_along_axis(drawn, at, axis=0))


def ratios(
    sums: Mapping[str, tuple[ArrayLike, ArrayLike]], unit_Q: ArrayLike, *, seed: int = 0
) -> dict[str, dict[str, Any] | None]:
    """`sum(top) / sum(bottom)` of every pair of sums by document `[Q]` as a record has it: its `mean`
    and `ci95`, which is None for one unit alone; None where the bottom is zero."""
    record: dict[str, dict[str, Any] | None] = dict.fromkeys(sums)
    known = {name: pair for name, pair in sums.items() if np.sum(pair[1])}
    if not known:
        return record
    tops, bottoms = (
        np.stack([np.asarray(pair[i], dtype=float) for pair in known.values()], axis=1)
        for i in (0, 1)
    )
    interval = ratio_interval(tops, bottoms, unit_Q, seed=seed)
    for cell, name in enumerate(known):
        low, high = float(interval.low_C[cell]), float(interval.high_C[cell])
        mean = float(tops[:, cell].sum() / bottoms[:, cell].sum())
        record[name] = {"mean": mean, "ci95": None if np.isnan(low) else [low, high]}
    return record


def ratio_interval(
    top_QC: ArrayLike, bottom_QC: ArrayLike, unit_Q: ArrayLike, *, seed: int = 0
) -> Interval:
    """`sum_Q top / sum_Q bottom` of every cell with its bootstrap interval over units.

    Top and bottom are resampled together. `bottom` may be `[Q]`. Documents with the unit -1 are left
    out. The percentile interval; corrected for bias and skewness (BCa, Efron 1987) where a cell has
    fewer than 100 units with a bottom. Each cell is resampled over the units that have one.
    """
    top, bottom = np.asarray(top_QC, dtype=float), np.asarray(bottom_QC, dtype=float)
    if bottom.ndim == 1:
        bottom = np.broadcast_to(bottom[:, None], top.shape)
    unit = np.asarray(unit_Q)
    used = unit >= 0
    units_ = np.unique(unit[used], return_inverse=True)[1]
    groups, cells = int(units_.max(initial=-1)) + 1, top.shape[1]
    top_GC, bottom_GC = (summed(values[used], units_, groups) for values in (top, bottom))
    ends_3C = np.full((3, cells), np.nan)
    # Cells that have the same units share their resamples.
    patterns = np.packbits(bottom_GC != 0, axis=0)
    _, kind_C = np.unique(patterns, axis=1, return_inverse=True)
    for kind in range(int(kind_C.max(initial=-1)) + 1):
        same_C = np.flatnonzero(kind_C == kind)
        has_G = bottom_GC[:, same_C[0]] != 0
        if not has_G.any():
            continue
        times_RG = resamples(int(has_G.sum()), seed)
        for first in range(0, len(same_C), _CELLS):
            at = same_C[first : first + _CELLS]
            ends_3C[:, at] = _interval(top_GC[has_G][:, at], bottom_GC[has_G][:, at], times_RG)
    return Interval(*ends_3C)


def summed(values_QC: Floats, unit_Q: Ints, groups: int) -> Floats:
    """Sums `[G, C]` of what belongs to every unit `[Q]`."""
    sums_GC = np.zeros((groups, values_QC.shape[1]))
    np.add.at(sums_GC, unit_Q, values_QC)
    return sums_GC


def _interval(top_GC: Floats, bottom_GC: Floats, times_RG: Floats) -> Floats:
    """Mean, low and high `[3, C]`."""
    groups = len(top_GC)
    top_C, bottom_C = top_GC.sum(0), bottom_GC.sum(0)
    mean_C = top_C / bottom_C
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn_RC = (times_RG @ top_GC) / (times_RG @ bottom_GC)
    if groups == 1:
        # One document does not say how much documents differ.
        return np.stack([mean_C, *np.full((2, len(mean_C)), np.nan)])
    if groups >= FEW or groups < 3:
        return np.stack([mean_C, *ends(mean_C, drawn_RC)])
    with np.errstate(invalid="ignore", divide="ignore"):
        left_GC = (top_C - top_GC) / (bottom_C - bottom_GC)
    skew_C = left_GC.mean(0) - left_GC
    power_C = (skew_C**2).sum(0)
    acceleration_C = np.where(power_C > 0, (skew_C**3).sum(0) / (6 * power_C**1.5 + 1e-300), 0.0)
    return np.stack([mean_C, *ends(mean_C, drawn_RC, acceleration_C)])


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
        z_C = np.where(spread > 0, away / spread, np.where(away == 0, 0.0, np.nan))
    return np.asarray(z_C, dtype=float)


def pooled_p(z_EC: Floats, null_z: Floats) -> Floats:
    """One-sided p of every z among those of all random sets; NaN if there is no z."""
    reached_EC = len(null_z) - np.searchsorted(np.sort(null_z), z_EC)
    return np.where(np.isfinite(z_EC), (1 + reached_EC) / (1 + len(null_z)), np.nan)


def q_values(p_C: ArrayLike) -> Floats:
    """Benjamini and Hochberg's adjusted p over all cells of any shape; NaN stays NaN."""
    p = np.asarray(p_C, dtype=float)
    q = np.full(p.shape, np.nan)
    known = ~np.isnan(p)
    if known.any():
        q[known] = stats.false_discovery_control(p[known], method="bh")
    return q
