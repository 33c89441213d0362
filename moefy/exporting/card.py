"""The README.md of an exported checkpoint."""

from typing import Any

_CARD = """---
library_name: transformers
tags: [mixture-of-experts]
---
# {name}, as {architecture}

Made from `{name}` by moefy: its MLPs are cut into experts of {expert_size} neurons, of which a linear
router chooses {active} of {experts} for each token{shared}. Nothing but transformers (or an engine
that runs {architecture}) is needed to load it.

Every expert that runs counts alike: the routers are scaled so that their softmax weights are 1/{active}
up to a relative error below 1e-4, and down projections are multiplied by {active}. Do not train the
routers without undoing this.

## Measured against moefy's own model

| arithmetic | relative error of logits | before the first flip | tokens and layers with other experts |
|---|---|---|---|
{rows}
{warnings}"""


def export_card(name: str, record: dict[str, Any]) -> str:
    """The text of the card; `record` is that of the export."""
    rows = "\n".join(
        f"| {what} | {row['relative_error']:.1e} | {_error(row['relative_error_before_flips'])} | "
        f"{row['flips']} ({row['flip_rate']:.2%}) |"
        for what, row in record["verification"].items()
    )
    shared, warnings = record["shared_experts"], record["warnings"]
    mind = "".join(f"- {warning}\n" for warning in warnings)
    return _CARD.format(
        **{key: record[key] for key in ("architecture", "expert_size", "active", "experts")},
        name=name,
        shared=f" beside {shared} that always run" if shared else "",
        rows=rows,
        warnings=f"\n## Mind\n\n{mind}" if mind else "",
    )


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
