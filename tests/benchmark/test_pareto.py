"""Comparisons: rows by name, those that are finished taken up, the frontier, the table, the picture."""

from pathlib import Path
from typing import Any

import pytest
from tiny_conversion import corpus_for
from tiny_models import build

from moefy.benchmark import pareto
from moefy.benchmark.pareto import (
    QUANTISED,
    ParetoRow,
    compare,
    comparison_rows,
    draw_pareto,
    frontier,
    rows_of,
)
from moefy.errors import MoefyError, RecipeError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama", tmp_path_factory.mktemp("llama") / "source")


def run(source: Path, *names: str, budgets: tuple[float, ...] = (4.0,), **others: Any) -> Any:
    return compare(
        source, list(names), list(budgets), corpus=corpus_for("llama"), documents=4, quiet=True, **others
    )  # fmt: skip


def test_names_are_recipes_roundings_or_both() -> None:
    rows = rows_of(["fast", "rtn-3", "teal@rtn-4"], [3.0, 4.0])
    assert [(row.name, row.rounding, row.budget) for row in rows] == [
        ("fast", None, 3.0),
        ("fast", None, 4.0),
        ("rtn-3", None, None),
        ("teal@rtn-4", "rtn-4", 3.0),
        ("teal@rtn-4", "rtn-4", 4.0),
    ]
    assert len(rows_of(list(QUANTISED), [4.0])) == len(QUANTISED)
    for name, what in (("teal@rtn-5", "rtn-4"), ("fast@rtn-4", "storage.bits"), ("rtn-9", "rtn-9")):
        with pytest.raises(RecipeError, match=what):
            rows_of([name], [4.0])


def test_a_rounded_model_reads_its_bits_and_sparsity_on_it_a_share_of_them(source: Path) -> None:
    record = run(source, "rtn-8", "rtn-2", "teal@rtn-4", "teal", budgets=(3.0,))
    found = {row["recipe"]: row for row in record["rows"]}
    assert found["rtn-8"]["bits_read"] == 9
    assert found["rtn-2"]["bits_read"] == 3
    assert found["rtn-8"]["active_compute"] == 1
    assert found["rtn-8"]["kl"] < 0.1 * found["rtn-2"]["kl"]
    # Thresholds drift between texts: TEAL is near its share, in bits of what it stands on.
    sparse = found["teal@rtn-4"]
    assert sparse["bits_read"] == pytest.approx(5 * sparse["active_compute"])
    assert sparse["bits_read"] == pytest.approx(3, abs=0.5)
    assert found["teal"]["bits_read"] == pytest.approx(16 * found["teal"]["active_compute"])


def test_finished_rows_are_taken_up_by_a_run_of_the_same_alone(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(source, "rtn-3", "teal", work=tmp_path)["rows"]
    assert run(source, "rtn-3", "teal", work=tmp_path)["rows"] == first
    made: list[str] = []

    def measure(row: ParetoRow, bench: Any) -> dict[str, Any]:
        made.append(row.name)
        return {"n/a": "not again"}

    monkeypatch.setattr(pareto.ParetoRow, "measure", measure)
    assert run(source, "teal", "rtn-3", "rtn-4", work=tmp_path)["rows"][:2] == first[::-1]
    assert made == ["rtn-4"]
    run(source, "rtn-3", work=tmp_path, seed=1)
    run(source, "teal", work=tmp_path, budgets=(5.0,))
    assert made == ["rtn-4", "rtn-3", "teal"]


def row(name: str, bits: float, kl: float, **others: Any) -> dict[str, Any]:
    return {"recipe": name, "bits_read": bits, "kl": kl, "active_compute": 1.0, **others}


ROWS = [
    row("worse", 5.0, 0.3), row("a", 3.0, 0.5, budget=3.0), row("b", 4.0, 0.1, budget=4.0),
    row("same bits", 4.0, 0.2), row("no better", 6.0, 0.1), {"recipe": "c", "budget": 3.0, "n/a": "why"},
]  # fmt: skip


def test_the_frontier_is_what_nothing_beats_at_as_few_bits() -> None:
    assert [best["recipe"] for best in frontier(ROWS)] == ["a", "b"]
    header, rows = comparison_rows({"rows": ROWS})
    assert [cells[0] for cells in rows] == ["a", "b", "same bits", "worse", "no better", "c"]
    assert [cells[header.index("best")] for cells in rows] == ["*", "*", "", "", "", ""]
    assert rows[-1][header.index("bits read")] == "n/a: why"
    assert "cosine" not in header


@pytest.mark.parametrize("kind", ["svg", "png"])
def test_the_picture_names_what_was_rounded_and_is_the_same_for_the_same_record(
    kind: str, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        draw_pareto({"rows": ROWS}, tmp_path / f"{name}.{kind}")
    one, two = ((tmp_path / f"{name}.{kind}").read_bytes() for name in ("one", "two"))
    assert len(one) > 5000
    if kind == "png":
        assert one == two
    with pytest.raises(MoefyError, match="picture is one of"):
        draw_pareto({"rows": ROWS}, tmp_path / "picture.pdf")
