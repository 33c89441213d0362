"""Comparisons of recipes as rows."""

from typing import Any


def comparison_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a comparison of recipes, best first at every budget."""
    header = ["budget", "recipe", "KL to dense", "CE increase", "cosine", "read", "computed"]
    keys = ("kl", "ce_increase", "cosine", "active_budget", "active_compute")

    def order(row: dict[str, Any]) -> tuple[float, bool, float]:
        return row["budget"], "n/a" in row, row.get("kl", -row.get("cosine", 0.0))

    rows = []
    for row in sorted(record["rows"], key=order):
        cells = [f"{row[key]:.4f}" if key in row else "" for key in keys]
        cells = [f"n/a: {row['n/a']}", *[""] * (len(keys) - 1)] if "n/a" in row else cells
        rows.append([f"{row['budget']:.2f}", row["recipe"], *cells])
    used = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in used], [[row[i] for i in used] for row in rows]
