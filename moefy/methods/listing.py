"""The tables a user may choose from, each entry with the first sentence of its documentation."""

import inspect
from collections.abc import Mapping
from typing import Any

from moefy import recipe
from moefy.errors import MoefyError, unknown_choice
from moefy.methods.partition.partition import METHODS
from moefy.methods.tables import COMPENSATIONS, ROUTERS, SELECTIONS
from moefy.models.families import FAMILIES


def listing(what: str | None = None) -> dict[str, dict[str, str]]:
    """One table, or all of them: name -> what it is."""
    tables = {
        "recipes": recipe.shipped(),
        "methods": _described(METHODS),
        "routers": _described(ROUTERS),
        "selections": _described(SELECTIONS),
        "compensations": _described(COMPENSATIONS),
        "families": {
            name: f"{row.kind}, {'gated' if row.gate or row.fused else 'plain'} MLP"
            for name, row in FAMILIES.items()
        },
    }
    if what is None:
        return tables
    if what not in tables:
        raise MoefyError(unknown_choice("table", what, tables))
    return {what: tables[what]}


def _described(table: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name, entry in table.items():
        module = inspect.getmodule(entry)
        text = (module.__doc__ if module else None) or inspect.getdoc(entry) or ""
        found[name] = " ".join(text.split("\n\n")[0].split())
    return found
