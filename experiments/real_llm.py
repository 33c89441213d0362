"""The table and the picture of docs/real_llm.md, from the record of the comparison on SmolLM2.

SMOLLM2=path/to/SmolLM2-135M-Instruct
python -m moefy compare $SMOLLM2 --quantised --budgets 2.5,3,3.5,4 --documents 12 --work runs/pareto_smollm2 \\
    -o benchmarks/records/pareto_smollm2.json
python experiments/real_llm.py
"""

import json
from pathlib import Path
from typing import Any

from pages import fill

from moefy.benchmark.pareto import comparison_rows, draw_pareto
from moefy.run.tables import markdown

RECORD = Path("benchmarks/records/pareto_smollm2.json")
PAGE, PICTURE = Path("docs/real_llm.md"), Path("docs/pareto_smollm2.png")


BARS = {4.0: 0.045, 3.5: 0.10, 3.0: 0.28, 2.5: 0.50}
"""KL that a conversion without training was to reach, by bits read."""


def bars(rows: list[dict[str, Any]]) -> str:
    """The default recipe at each budget, the bar, and the best other row that reads as many bits or fewer."""
    cells = []
    for budget, bar in BARS.items():
        for row in rows:
            if row["recipe"] != "default" or row.get("budget") != budget:
                continue
            rest = [
                r for r in rows
                if "kl" in r and r["recipe"] != "default" and r["bits_read"] <= budget + 0.05
            ]  # fmt: skip
            best = min(rest, key=lambda r: r["kl"], default=None)
            cells.append(
                [
                    f"{row['bits_read']:.2f}", f"{row['kl']:.4f}", f"{bar:g}", f"{row['agreement']:.3f}",
                    "none" if best is None else f"{best['kl']:.4f} ({best['recipe']})",
                ]
            )  # fmt: skip
    header = ["bits read", "KL of `default`", "asked", "first choice kept", "best of the others"]
    return markdown(header, cells)


def main() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    fill(PAGE, "bars", bars(record["rows"]))
    fill(PAGE, "pareto", markdown(*comparison_rows(record)))
    whole = [
        [row["recipe"], f"{row['bits_read']:.2f}", f"{row['whole_bits']:.2f}"]
        for row in record["rows"]
        if "whole_bits" in row
    ]
    fill(PAGE, "files", markdown(["", "MLPs, bits a weight", "whole file, bits a weight"], whole))
    tokens = max(row.get("tokens", 0) for row in record["rows"])
    fill(PAGE, "measured", f"Measured on {record['documents']} documents, {tokens} tokens.")
    draw_pareto(record, PICTURE)


if __name__ == "__main__":
    main()
