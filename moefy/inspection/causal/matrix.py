"""The causal matrix: what taking an expert away costs in every domain.

    M[e, d] = mean over the documents of d of the mean over their tokens of CE_ablated - CE_base
    CSI(e, d) = M[e, d] - mean of M[e, d'] over the other domains

in nats per token, and KL(base || ablated) averaged in the same way. Intervals draw documents (or
sources) anew, base and ablated run together. docs/inspection.md defines every column.

The interval of CSI, how much more an expert matters for one domain than for the others, draws the units
(documents, or sources) of every domain anew, domains apart, since their numbers are fixed by design;
corrected for bias and skewness (BCa, Efron 1987) below 100 units. Its test permutes the domains of
documents; CSI is divided by its standard error first, so that it holds where one domain varies more than
another (Chung and Romano 2013).

Shapes: E experts that were run, S (random) sets, C domains, Q documents, G units of a domain, R resamples,
P permutations.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefy.evaluation.statistics import (
    FEW,
    RESAMPLES,
    Floats,
    Interval,
    ends,
    pooled_p,
    q_values,
    ratio_interval,
    resamples,
    units,
)
from moefy.inspection.causal.documents import Texts
from moefy.inspection.causal.engine import Effects, Pair, means
from moefy.inspection.causal.nulls import RandomSets, against_null
from moefy.inspection.causal.token_losses import COSINE, NATS
from moefy.inspection.record import Table, table


@dataclass(frozen=True)
class Measured:
    """Experts of one layer that were run, and the random sets beside them."""

    experts: list[Pair]
    effects: Effects
    sets: RandomSets | None = None
    null: Effects | None = None


@dataclass(frozen=True)
class Matrix:
    """M and CSI of the experts that were run `[E, C]`."""

    experts: list[Pair]
    ce: Interval
    csi: Interval


def intervals(values_SQ: Floats, texts: Texts, *, seed: int = 0) -> Interval:
    """Mean over the documents of every domain with its interval `[S, C]`, flattened."""
    domain_Q, domains = texts.documents.domain_Q, len(texts.documents.domains)
    member_QC = np.eye(domains)[domain_Q]
    top_QX = (values_SQ.T[:, :, None] * member_QC[:, None]).reshape(len(domain_Q), -1)
    bottom_QX = np.tile(member_QC, (1, len(values_SQ)))
    return ratio_interval(top_QX, bottom_QX, units(texts.documents), seed=seed)


def matrix(measured: Sequence[Measured], texts: Texts, *, seed: int = 0) -> tuple[Matrix, Table]:
    """The figures of the experts that were run, as arrays and as rows of table `causal`, expert by
    expert and domain by domain, without `q`, which is over all that is shown."""
    experts = [expert for part in measured for expert in part.experts]
    effects = Effects.join(part.effects for part in measured)
    domain_Q, domains = texts.documents.domain_Q, texts.documents.domains
    shape = (len(experts), len(domains))
    ce = intervals(effects.ce_SQ, texts, seed=seed)
    csi = selectivity(effects.ce_SQ, domain_Q, units(texts.documents), seed=seed)
    kl = np.isfinite(effects.kl_SQ).all()
    nothing = np.full(shape, np.nan)
    columns: dict[str, Any] = {
        **cells(experts, domains),
        **ce.columns("ce"),
        "kl": (means(effects.kl_SQ, domain_Q, len(domains)) if kl else nothing).ravel(),
        "kl_p99": (effects.kl_p99_SC if kl else nothing).ravel(),
        **{name: values.ravel() for name, values in csi.columns("csi").items()},
        "csi_p": selectivity_p(effects.ce_SQ, domain_Q, seed=seed).ravel(),
        **{name: values.ravel() for name, values in _null_columns(measured, texts, shape).items()},
        **{name: np.tile(values, len(experts)) for name, values in texts.counts().items()},
        "damage": [NATS if kl else COSINE] * (len(experts) * len(domains)),
    }
    square = Interval(*(v.reshape(shape) for v in (ce.mean_C, ce.low_C, ce.high_C)))
    return Matrix(experts, square, csi), table(columns)


def cells(experts: Sequence[Pair], domains: list[str]) -> dict[str, Any]:
    """Columns that name a row for every expert and domain."""
    return {
        "layer": np.repeat([layer for layer, _ in experts], len(domains)),
        "expert": np.repeat([expert for _, expert in experts], len(domains)),
        "domain": domains * len(experts),
    }


def _null_columns(
    measured: Sequence[Measured], texts: Texts, shape: tuple[int, int]
) -> dict[str, Floats]:
    """Where every expert stands among the random sets of its bin; NaN without random sets."""
    names = ("z_random", "percentile", "p", "null_sets", "null_energy_low", "null_energy_high",
             "null_slope", "null_slope_error")  # fmt: skip
    columns = {name: np.full(shape, np.nan) for name in names}
    null_z: list[Floats] = []
    first = 0
    for part in measured:
        at = slice(first, first + len(part.experts))
        first = at.stop
        if part.sets is None or part.null is None:
            continue
        sets = part.sets
        against = against_null(part.effects.by_domain(texts), part.null.by_domain(texts), sets)
        null_z.append(against.null_z_SC.ravel())
        columns["z_random"][at], columns["percentile"][at] = against.z_EC, against.percentile_EC
        columns["null_slope"][at], columns["null_slope_error"][at] = against.slope
        for row, (number, energy) in enumerate(
            zip(sets.bin_E, sets.energy_E, strict=True), at.start
        ):
            ratio = sets.energy_S[sets.bin_S == number] / max(energy, 1e-300)
            figures = (len(ratio), ratio.min(), ratio.max())
            for name, value in zip(names[3:6], figures, strict=True):
                columns[name][row] = value
    if null_z:
        null = np.concatenate(null_z)
        columns["p"] = pooled_p(columns["z_random"], null[np.isfinite(null)])
    return columns


def labelled(rows: Table, *, which: str, mode: str, how: str) -> Table:
    """The same rows with what they were made by."""
    count = len(rows["layer"])
    front = {name: rows[name] for name in ("layer", "expert", "domain")}
    rest = {name: values for name, values in rows.items() if name not in front}
    made = {"model": [which] * count, "mode": [mode] * count, "how": [how] * count}
    return front | made | rest


def with_q(rows: Table) -> Table:
    """The same rows with `q` and `csi_q`, over all of them."""
    shown = dict(rows)
    for p, q in (("p", "q"), ("csi_p", "csi_q")):
        values = np.array([np.nan if v is None else v for v in rows[p]], dtype=float)
        shown[q] = table({q: q_values(values)})[q]
    return shown


def strongest(square: Matrix, count: int) -> NDArray[np.int64]:
    """Rows of the experts with the largest selectivity in any domain, the largest first."""
    top_E = np.where(np.isnan(square.csi.mean_C), square.ce.mean_C, square.csi.mean_C).max(1)
    return np.argsort(-top_E, kind="stable")[:count]


PERMUTATIONS, MORE = 2000, 50_000
RARE = 0.0025
_AT_ONCE = 50


def contrast(values_SC: Floats) -> Floats:
    """CSI of every cell from the means by domain."""
    domains = values_SC.shape[-1]
    total = values_SC.sum(-1, keepdims=True)
    return np.asarray(values_SC - (total - values_SC) / max(domains - 1, 1))


def selectivity(
    values_SQ: Floats, domain_Q: NDArray[np.int64], unit_Q: NDArray[np.int64], *, seed: int = 0
) -> Interval:
    """CSI and its 95 % interval `[S, C]`; NaN for a single domain."""
    sets, domains = len(values_SQ), int(domain_Q.max(initial=-1)) + 1
    if domains < 2:
        nothing = np.full((sets, domains), np.nan)
        return Interval(nothing, nothing, nothing)
    drawn_RSC = np.empty((RESAMPLES, sets, domains))
    mean_SC = np.empty((sets, domains))
    influence = []
    for domain in range(domains):
        here = domain_Q == domain
        units = np.unique(unit_Q[here], return_inverse=True)[1]
        groups = int(units.max()) + 1
        member_QG = np.eye(groups)[units]
        top_SG, size_G = values_SQ[:, here] @ member_QG, member_QG.sum(0)
        times_RG = resamples(groups, seed, domain)
        drawn_RSC[:, :, domain] = (times_RG @ top_SG.T) / (times_RG @ size_G)[:, None]
        mean_SC[:, domain] = top_SG.sum(1) / size_G.sum()
        influence.append((top_SG - mean_SC[:, [domain]] * size_G) / size_G.sum())
    estimate_SC, drawn_RSC = contrast(mean_SC), contrast(drawn_RSC)
    total = sum(part.shape[1] for part in influence)
    acceleration_SC = _acceleration(estimate_SC, influence) if total < FEW else None
    return Interval(estimate_SC, *ends(estimate_SC, drawn_RSC, acceleration_SC))


def _acceleration(estimate_SC: Floats, influence: list[Floats]) -> Floats:
    """How the error of CSI changes with CSI (Efron 1987), from the influence of every unit."""
    domains = len(influence)
    cube_SC = np.zeros_like(estimate_SC)
    square_SC = np.zeros_like(estimate_SC)
    for domain in range(domains):
        weight_C = np.where(np.arange(domains) == domain, 1.0, -1 / (domains - 1))
        cube_SC += (influence[domain] ** 3).sum(1)[:, None] * weight_C**3
        square_SC += (influence[domain] ** 2).sum(1)[:, None] * weight_C**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(square_SC > 0, cube_SC / (6 * square_SC**1.5), 0.0)


def selectivity_p(values_SQ: Floats, domain_Q: NDArray[np.int64], *, seed: int = 0) -> Floats:
    """Two-sided p of `CSI = 0` `[S, C]`, by permuting the domains of documents.

    Sets with a cell that few of `PERMUTATIONS` reach are tested again by `MORE` others, so that a
    single finding can stand out of some thousand cells.
    """
    domains = int(domain_Q.max(initial=-1)) + 1
    if domains < 2:
        return np.full((len(values_SQ), domains), np.nan)
    # CSI does not see what all documents share; scaled, so that one threshold says "does not vary".
    scaled_SQ = values_SQ - values_SQ.mean(1, keepdims=True)
    scaled_SQ = scaled_SQ / (scaled_SQ.std(1, keepdims=True) + 1e-300)
    p_SC = _permuted_p(scaled_SQ, domain_Q, domains, PERMUTATIONS, [seed, 12])
    again = p_SC.min(1) <= RARE
    if again.any():
        p_SC[again] = _permuted_p(scaled_SQ[again], domain_Q, domains, MORE, [seed, 15])
    return p_SC


def _permuted_p(
    values_SQ: Floats, domain_Q: NDArray[np.int64], domains: int, count: int, seed: list[int]
) -> Floats:
    observed_SC = np.abs(_studentised(values_SQ, domain_Q[None], domains))[0]
    reached_SC = np.zeros(observed_SC.shape)
    random = np.random.default_rng(seed)
    for first in range(0, count, _AT_ONCE):
        labels_PQ = np.tile(domain_Q, (min(_AT_ONCE, count - first), 1))
        null_PSC = np.abs(_studentised(values_SQ, random.permuted(labels_PQ, axis=1), domains))
        reached_SC += (null_PSC >= observed_SC - 1e-12).sum(0)
    return (1 + reached_SC) / (1 + count)


def _studentised(values_SQ: Floats, labels_PQ: NDArray[np.int64], domains: int) -> Floats:
    """CSI over its standard error `[P, S, C]` under each labelling; 0 where neither varies."""
    member_PQC = np.eye(domains)[labels_PQ]
    size_C = member_PQC[0].sum(0)
    flat_QX = member_PQC.transpose(1, 0, 2).reshape(labels_PQ.shape[1], -1)
    shape = (len(values_SQ), len(labels_PQ), domains)
    mean_SPC = (values_SQ @ flat_QX).reshape(shape) / size_C
    square_SPC = (values_SQ**2 @ flat_QX).reshape(shape) / size_C
    error_SPC = (square_SPC - mean_SPC**2).clip(0) / np.maximum(size_C - 1, 1)
    rest = (error_SPC.sum(-1, keepdims=True) - error_SPC) / (domains - 1) ** 2
    spread_SPC = np.sqrt(error_SPC + rest)
    top_SPC = contrast(mean_SPC)
    ratio_SPC = np.where(spread_SPC > 1e-9, top_SPC / np.maximum(spread_SPC, 1e-9), 0.0)
    return np.asarray(ratio_SPC.transpose(1, 0, 2))
