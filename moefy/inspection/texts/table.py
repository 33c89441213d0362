"""Tables as plain columns: what an inspection is made of, on disk and in memory."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

Table = dict[str, list[Any]]
"""Columns of equal length by name; values are JSON values."""


def table(columns: Mapping[str, Any]) -> Table:
    """Columns from lists or arrays of one length; numbers that are not finite become None."""
    found = {name: _values(column) for name, column in columns.items()}
    lengths = {name: len(column) for name, column in found.items()}
    assert len(set(lengths.values())) <= 1, lengths
    return found


def of_experts(layer: int, columns: Mapping[str, Any]) -> Table:
    """A row for every expert of a layer, from 0."""
    count = len(next(iter(columns.values())))
    return table({"layer": [layer] * count, "expert": list(range(count)), **columns})


def joined(tables: Iterable[Table]) -> Table:
    """Tables of the same columns, one below the other."""
    parts = [part for part in tables if part]
    if not parts:
        return {}
    assert all(part.keys() == parts[0].keys() for part in parts), [list(p) for p in parts]
    return {name: [value for part in parts for value in part[name]] for name in parts[0]}


def rows(given: Table) -> list[dict[str, Any]]:
    """The rows of a table."""
    return [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=True)]


def _values(column: Any) -> list[Any]:
    if isinstance(column, np.ndarray):
        if column.dtype.kind == "f":
            # Six digits hold all that a figure means, at half the size on disk.
            return [float(f"{v:.6g}") if np.isfinite(v) else None for v in column.tolist()]
        return list(column.tolist())
    return list(column)
