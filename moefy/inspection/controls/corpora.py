"""Does what one text says of the experts hold on another (control C8)?

A figure replicates where the order of the experts of a layer by it is much the same on two corpora,
or, with one corpus, on two halves of its sources. On one corpus alone many a thing looks monosemantic
(the BERT illusion, Bolukbasi et al. 2021).

Shapes: T tokens, Q documents, E experts.
"""

from collections.abc import Callable, Mapping
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from moefy.data.documents import Documents
from moefy.evaluation.statistics import q_values, units
from moefy.inspection.record import Table, table
from moefy.inspection.routing import RoutingSample, drawn_documents

Q = 0.05
TOKENS = 60_000
"""Most tokens of a text that figures are made from."""
LEAST_EXPERTS = 5
"""Fewer experts than this have no order worth a correlation."""

Tables = Mapping[str, Table]


def replication(
    sample: RoutingSample, describe: Callable[[RoutingSample], Tables], *, seed: int = 0
) -> dict[str, Table]:
    """Table `replication`: figure, layer, the two texts, experts, rank correlation, p, q, `replicates`.

    `describe` makes tables of a sample; every column of numbers of its table `experts` is a figure,
    intervals, p and q aside. p is one-sided (Spearman); `replicates` is q < .05 over the table.
    """
    parts = texts(sample.documents, seed)
    made = {
        name: describe(sample.take(some_T))["experts"]
        for name, chosen_Q in parts.items()
        if (some_T := _some(sample, chosen_Q, seed)).any()
    }
    rows: list[dict[str, Any]] = []
    for first, second in combinations(made, 2):
        for figure in figures(made[first]):
            if figure in made[second]:
                rows += _correlations(made[first], made[second], figure, (first, second))
    names = ("figure", "layer", "text_a", "text_b", "experts", "correlation", "p")
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in names}
    q = q_values(np.array(columns["p"], dtype=float))
    for name in ("correlation", "p"):
        columns[name] = np.array(columns[name], dtype=float)
    columns["q"] = q
    columns["replicates"] = [None if np.isnan(value) else bool(value < Q) for value in q]
    return {"replication": table(columns)}


def _some(sample: RoutingSample, chosen_Q: NDArray[np.bool_], seed: int) -> NDArray[np.bool_]:
    """Tokens `[T]` of the sample in documents drawn from the chosen ones."""
    document_T = sample.tokens.document_T
    tokens_Q = np.bincount(document_T, minlength=len(chosen_Q))
    return drawn_documents(tokens_Q, TOKENS, seed, chosen_Q & (tokens_Q > 0))[document_T]


def texts(documents: Documents, seed: int) -> dict[str, NDArray[np.bool_]]:
    """Which documents `[D]` each corpus has; of one corpus two halves, of the sources of every domain,
    or of its documents where there are few sources."""
    names = sorted(set(documents.corpora))
    if len(names) > 1:
        return {name: np.array([c == name for c in documents.corpora]) for name in names}
    unit_Q = units(documents)
    order_G = np.random.default_rng(seed).permutation(int(unit_Q.max()) + 1)
    first_Q = np.zeros(len(documents), dtype=bool)
    for domain in range(len(documents.domains)):
        here_Q = documents.domain_Q == domain
        mine_G = order_G[np.isin(order_G, unit_Q[here_Q])]
        first_Q |= here_Q & np.isin(unit_Q, mine_G[::2])
    name = names[0]
    return {f"{name}, one half": first_Q, f"{name}, other half": ~first_Q}


def figures(experts: Table) -> list[str]:
    """Columns of a table that are figures: numbers, no keys, intervals, p or q, and neither what a figure
    is compared with nor out of how many it is counted."""
    beside = (
        "_low", "_high", "_p", "_q", "_z", "_percentile", "_documents", "_tokens", "_draws", "_random",
        "_chance", "_null", "_of", "_types", "_compared",
    )  # fmt: skip
    keys = (
        "layer", "expert", "documents", "tokens", "p", "q", "units", "routed_experts", "active",
        "chance_recall", "constant_recall", "load_recall", "share_sum_error",
    )  # fmt: skip
    return [
        name
        for name, column in experts.items()
        if name not in keys
        and not name.endswith(beside)
        and all(v is None or (isinstance(v, int | float) and type(v) is not bool) for v in column)
    ]


def _correlations(
    first: Table, second: Table, figure: str, of: tuple[str, str]
) -> list[dict[str, Any]]:
    layer = np.array(first["layer"])
    a, b = (np.array(t[figure], dtype=float) for t in (first, second))
    rows = []
    for number in np.unique(layer):
        known = (layer == number) & ~np.isnan(a) & ~np.isnan(b)
        row: dict[str, Any] = {"figure": figure, "layer": int(number), "experts": int(known.sum())}
        row |= {"text_a": of[0], "text_b": of[1], "correlation": np.nan, "p": np.nan}
        varied = known.sum() >= LEAST_EXPERTS and all(len(set(v[known])) > 1 for v in (a, b))
        if varied:
            rank = stats.spearmanr(a[known], b[known], alternative="greater")
            row |= {"correlation": float(rank.statistic), "p": float(rank.pvalue)}
        rows.append(row)
    return rows
