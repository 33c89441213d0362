"""How much more an expert matters for one domain than for the others, with interval and test.

    CSI(e, d) = M[e, d] - mean of M[e, d'] over the other domains

The interval draws the units (documents, or sources) of every domain anew, domains apart, since their
numbers are fixed by design; corrected for bias and skewness (BCa, Efron 1987) below 100 units. The
test permutes the domains of documents; CSI is divided by its standard error first, so that it
holds where one domain varies more than another (Chung and Romano 2013).

Shapes: S sets, D documents, C domains, G units of a domain, R resamples, P permutations.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moefy.interpret.statistics import FEW, LEVEL, RESAMPLES, Floats, Interval

PERMUTATIONS, MORE = 2000, 50_000
RARE = 0.0025
_AT_ONCE = 50


def contrast(values_SC: Floats) -> Floats:
    """CSI of every cell from the means by domain."""
    domains = values_SC.shape[-1]
    total = values_SC.sum(-1, keepdims=True)
    return np.asarray(values_SC - (total - values_SC) / max(domains - 1, 1))


def selectivity(
    values_SD: Floats, domain_D: NDArray[np.int64], unit_D: NDArray[np.int64], *, seed: int = 0
) -> Interval:
    """CSI and its 95 % interval `[S, C]`; NaN for a single domain."""
    sets, domains = len(values_SD), int(domain_D.max(initial=-1)) + 1
    if domains < 2:
        nothing = np.full((sets, domains), np.nan)
        return Interval(nothing, nothing, nothing)
    drawn_RSC = np.empty((RESAMPLES, sets, domains))
    mean_SC = np.empty((sets, domains))
    influence = []
    for domain in range(domains):
        here = domain_D == domain
        units = np.unique(unit_D[here], return_inverse=True)[1]
        groups = int(units.max()) + 1
        member_DG = np.eye(groups)[units]
        top_SG, size_G = values_SD[:, here] @ member_DG, member_DG.sum(0)
        random = np.random.default_rng([seed, domain, groups])
        times_RG = random.multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES)
        drawn_RSC[:, :, domain] = (times_RG @ top_SG.T) / (times_RG @ size_G)[:, None]
        mean_SC[:, domain] = top_SG.sum(1) / size_G.sum()
        influence.append((top_SG - mean_SC[:, [domain]] * size_G) / size_G.sum())
    estimate_SC, drawn_RSC = contrast(mean_SC), contrast(drawn_RSC)
    total = sum(part.shape[1] for part in influence)
    level_2SC = _corrected(estimate_SC, drawn_RSC, influence) if total < FEW else None
    if level_2SC is None:
        tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
        low_SC, high_SC = np.quantile(drawn_RSC, tails, axis=0)
    else:
        drawn_RSC.sort(axis=0)
        at = np.clip((level_2SC * (RESAMPLES - 1)).round().astype(int), 0, RESAMPLES - 1)
        low_SC, high_SC = np.take_along_axis(drawn_RSC, at, axis=0)
    return Interval(estimate_SC, low_SC, high_SC)


def _corrected(estimate_SC: Floats, drawn_RSC: Floats, influence: list[Floats]) -> Floats:
    """Which quantiles of the resamples are the ends of the BCa interval `[2, S, C]`."""
    domains = len(influence)
    cube_SC = np.zeros_like(estimate_SC)
    square_SC = np.zeros_like(estimate_SC)
    for domain in range(domains):
        weight_C = np.where(np.arange(domains) == domain, 1.0, -1 / (domains - 1))
        cube_SC += (influence[domain] ** 3).sum(1)[:, None] * weight_C**3
        square_SC += (influence[domain] ** 2).sum(1)[:, None] * weight_C**2
    with np.errstate(invalid="ignore", divide="ignore"):
        skew_SC = np.where(square_SC > 0, cube_SC / (6 * square_SC**1.5), 0.0)
    below_SC = (drawn_RSC < estimate_SC).mean(0) + (drawn_RSC == estimate_SC).mean(0) / 2
    bias_SC = stats.norm.ppf(np.clip(below_SC, 1 / RESAMPLES, 1 - 1 / RESAMPLES))
    z = np.asarray(stats.norm.ppf([(1 - LEVEL) / 2, (1 + LEVEL) / 2]))[:, None, None]
    return np.asarray(
        stats.norm.cdf(bias_SC + (bias_SC + z) / (1 - skew_SC * (bias_SC + z))), dtype=float
    )


def selectivity_p(values_SD: Floats, domain_D: NDArray[np.int64], *, seed: int = 0) -> Floats:
    """Two-sided p of `CSI = 0` `[S, C]`, by permuting the domains of documents.

    Sets with a cell that few of `PERMUTATIONS` reach are tested again by `MORE` others, so that a
    single finding can stand out of some thousand cells.
    """
    domains = int(domain_D.max(initial=-1)) + 1
    if domains < 2:
        return np.full((len(values_SD), domains), np.nan)
    # CSI does not see what all documents share; scaled, so that one threshold says "does not vary".
    scaled_SD = values_SD - values_SD.mean(1, keepdims=True)
    scaled_SD = scaled_SD / (scaled_SD.std(1, keepdims=True) + 1e-300)
    p_SC = _permuted_p(scaled_SD, domain_D, domains, PERMUTATIONS, [seed, 12])
    again = p_SC.min(1) <= RARE
    if again.any():
        p_SC[again] = _permuted_p(scaled_SD[again], domain_D, domains, MORE, [seed, 15])
    return p_SC


def _permuted_p(
    values_SD: Floats, domain_D: NDArray[np.int64], domains: int, count: int, seed: list[int]
) -> Floats:
    observed_SC = np.abs(_studentised(values_SD, domain_D[None], domains))[0]
    reached_SC = np.zeros(observed_SC.shape)
    random = np.random.default_rng(seed)
    for first in range(0, count, _AT_ONCE):
        labels_PD = np.tile(domain_D, (min(_AT_ONCE, count - first), 1))
        null_PSC = np.abs(_studentised(values_SD, random.permuted(labels_PD, axis=1), domains))
        reached_SC += (null_PSC >= observed_SC - 1e-12).sum(0)
    return (1 + reached_SC) / (1 + count)


def _studentised(values_SD: Floats, labels_PD: NDArray[np.int64], domains: int) -> Floats:
    """CSI over its standard error `[P, S, C]` under each labelling; 0 where neither varies."""
    member_PDC = np.eye(domains)[labels_PD]
    size_C = member_PDC[0].sum(0)
    flat_DX = member_PDC.transpose(1, 0, 2).reshape(labels_PD.shape[1], -1)
    shape = (len(values_SD), len(labels_PD), domains)
    mean_SPC = (values_SD @ flat_DX).reshape(shape) / size_C
    square_SPC = (values_SD**2 @ flat_DX).reshape(shape) / size_C
    error_SPC = (square_SPC - mean_SPC**2).clip(0) / np.maximum(size_C - 1, 1)
    rest = (error_SPC.sum(-1, keepdims=True) - error_SPC) / (domains - 1) ** 2
    spread_SPC = np.sqrt(error_SPC + rest)
    top_SPC = contrast(mean_SPC)
    found = np.where(spread_SPC > 1e-9, top_SPC / np.maximum(spread_SPC, 1e-9), 0.0)
    return np.asarray(found.transpose(1, 0, 2))
