"""The causal matrix: what taking an expert away costs in every domain.

    M[e, d] = mean over the documents of d of the mean over their tokens of CE_ablated - CE_base

in nats per token, and KL(base || ablated) averaged in the same way. Intervals draw documents (or
sources) anew, base and ablated run together. docs/inspection.md defines every column.

Shapes: E experts that were run, S random sets, C domains, D documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefy.interpret.causal.damage import COSINE, NATS
from moefy.interpret.causal.effects import Effects, means
from moefy.interpret.causal.nulls import AgainstNull, RandomSets, against_null
from moefy.interpret.causal.selectivity import selectivity, selectivity_p
from moefy.interpret.causal.texts import MIN_DOCUMENTS, Texts
from moefy.interpret.statistics import Floats, Interval, q_values, ratio_interval, units
from moefy.interpret.table import Table, table

Pair = tuple[int, int]
"""Layer and expert."""


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


def intervals(values_SD: Floats, texts: Texts, *, seed: int = 0) -> Interval:
    """Mean over the documents of every domain with its interval `[S, C]`, flattened."""
    domain_D, domains = texts.documents.domain_D, len(texts.documents.domains)
    member_DC = np.eye(domains)[domain_D]
    top_DX = (values_SD.T[:, :, None] * member_DC[:, None]).reshape(len(domain_D), -1)
    bottom_DX = np.tile(member_DC, (1, len(values_SD)))
    return ratio_interval(top_DX, bottom_DX, units(texts.documents), seed=seed)


def matrix(measured: Sequence[Measured], texts: Texts, *, seed: int = 0) -> tuple[Matrix, Table]:
    """The figures of the experts that were run, as arrays and as rows of table `causal`, expert by
    expert and domain by domain, without `q`, which is over all that is shown."""
    experts = [expert for part in measured for expert in part.experts]
    effects = Effects.join(part.effects for part in measured)
    domain_D, domains = texts.documents.domain_D, texts.documents.domains
    shape = (len(experts), len(domains))
    ce = intervals(effects.ce_SD, texts, seed=seed)
    csi = selectivity(effects.ce_SD, domain_D, units(texts.documents), seed=seed)
    kl = np.isfinite(effects.kl_SD).all()
    nothing = np.full(shape, np.nan)
    documents_C = np.bincount(domain_D, minlength=len(domains))
    tokens_C = np.bincount(domain_D, weights=texts.tokens_D, minlength=len(domains)).astype(int)
    columns: dict[str, Any] = {
        "layer": np.repeat([layer for layer, _ in experts], len(domains)),
        "expert": np.repeat([expert for _, expert in experts], len(domains)),
        "domain": domains * len(experts),
        **ce.columns("ce"),
        "kl": (means(effects.kl_SD, domain_D, len(domains)) if kl else nothing).ravel(),
        "kl_p99": (effects.kl_p99_SC if kl else nothing).ravel(),
        **{name: values.ravel() for name, values in csi.columns("csi").items()},
        "csi_p": selectivity_p(effects.ce_SD, domain_D, seed=seed).ravel(),
        **{name: values.ravel() for name, values in _null_columns(measured, texts, shape).items()},
        "documents": np.tile(documents_C, len(experts)),
        "tokens": np.tile(tokens_C, len(experts)),
        "few": np.tile(documents_C < MIN_DOCUMENTS, len(experts)),
        "damage": [NATS if kl else COSINE] * (len(experts) * len(domains)),
    }
    square = Interval(*(v.reshape(shape) for v in (ce.mean_C, ce.low_C, ce.high_C)))
    return Matrix(experts, square, csi), table(columns)


def _null_columns(
    measured: Sequence[Measured], texts: Texts, shape: tuple[int, int]
) -> dict[str, Floats]:
    """Where every expert stands among the random sets of its bin; NaN without random sets."""
    names = ("z_random", "percentile", "p", "null_sets", "null_energy_low", "null_energy_high",
             "null_slope", "null_slope_error")  # fmt: skip
    found = {name: np.full(shape, np.nan) for name in names}
    parts: list[AgainstNull] = []
    first = 0
    for part in measured:
        at = slice(first, first + len(part.experts))
        first = at.stop
        if part.sets is None or part.null is None:
            continue
        against = against_null(part.effects.by_domain(texts), part.null.by_domain(texts), part.sets)
        parts.append(against)
        found["z_random"][at], found["percentile"][at] = against.z_EC, against.percentile_EC
        found["null_slope"][at], found["null_slope_error"][at] = against.slope, against.slope_error
        for row, (number, energy) in enumerate(
            zip(part.sets.bin_E, part.sets.energy_E, strict=True), start=at.start
        ):
            ratio = part.sets.energy_S[part.sets.bin_S == number] / max(energy, 1e-300)
            found["null_sets"][row] = len(ratio)
            found["null_energy_low"][row], found["null_energy_high"][row] = ratio.min(), ratio.max()
    if parts:
        null = np.concatenate([part.null_z_SC.ravel() for part in parts])
        found["p"] = pooled_p(found["z_random"], null[np.isfinite(null)])
    return found


def pooled_p(z_EC: Floats, null_z: Floats) -> Floats:
    """One-sided p of every z among those of all random sets; NaN where there is no z."""
    reached_EC = len(null_z) - np.searchsorted(np.sort(null_z), z_EC)
    return np.where(np.isfinite(z_EC), (1 + reached_EC) / (1 + len(null_z)), np.nan)


def labelled(given: Table, *, which: str, mode: str, how: str) -> Table:
    """The same rows with what they were made by."""
    count = len(given["layer"])
    front = {name: given[name] for name in ("layer", "expert", "domain")}
    rest = {name: values for name, values in given.items() if name not in front}
    made = {"model": [which] * count, "mode": [mode] * count, "how": [how] * count}
    return front | made | rest


def with_q(given: Table) -> Table:
    """The same rows with `q` and `csi_q`, over all of them."""
    found = dict(given)
    for p, q in (("p", "q"), ("csi_p", "csi_q")):
        values = np.array([np.nan if v is None else v for v in given[p]], dtype=float)
        found[q] = table({q: q_values(values)})[q]
    return found


def strongest(found: Matrix, count: int) -> NDArray[np.int64]:
    """Rows of the experts with the largest selectivity in any domain, the largest first."""
    top_E = np.where(np.isnan(found.csi.mean_C), found.ce.mean_C, found.csi.mean_C).max(1)
    return np.argsort(-top_E, kind="stable")[:count]
