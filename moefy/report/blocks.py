"""An inspection cut into the blocks that a page inflates when it needs them.

    index     meta, page one, prompts, and the tables that the first screens show
    texts     the documents in which something is shown, each once
    layer_XX  the rows of one layer of the tables of experts
    layer_XX.windows  how the tokens around its examples are coloured, a byte each

Figures have the three digits that are shown, and of the examples only the shown ones are here:
`inspection.json` has everything.
"""

import base64
import gzip
import json
from collections import Counter
from typing import Any

import numpy as np

from moefy.interpret.inspection import Inspection
from moefy.interpret.table import Table

FIRST = ("experts", "causal")
"""Tables of experts that the first screens show for all layers together."""
SHOWN = {
    ("top", "select"): 10, ("top", "held_out"): 6, ("spectrum", "select"): 2,
    ("spectrum", "held_out"): 1, ("random", "select"): 6, ("near", "select"): 6,
    ("negative", "select"): 4,
}  # fmt: skip
"""Examples of an expert by panel and shard; of `spectrum` those of every bin. Others: all."""
UNSHOWN = {
    "tokens": ("precision", "total", "end"), "logits": ("rank", "direct_only"),
    "documents": ("sha256", "source"), "examples": ("margin",), "energy": ("energy", "energy_low", "energy_high"),
}  # fmt: skip
"""Columns of large tables that no screen shows."""
_DIGITS = 3
_WINDOW = "window"


def pack(block: bytes) -> bytes:
    """One block in gzip's format; the same bytes for the same block."""
    return gzip.compress(block, 9, mtime=0)


def blocks(inspection: Inspection) -> dict[str, bytes]:
    """The blocks by name, not yet compressed. Tables of experts go by layer, all others into the index."""
    tables = {name: _shown(name, given) for name, given in inspection.tables.items() if given}
    by_layer = {name for name, given in tables.items() if {"layer", "expert"} <= given.keys()}
    by_layer -= set(FIRST)
    index = {
        "meta": inspection.meta,
        "honesty": inspection.honesty,
        "prompts": [_short(prompt) for prompt in inspection.prompts],
        "tables": {name: _short(tables[name]) for name in tables if name not in by_layer},
        "by_layer": sorted(by_layer),
    }
    shown = [given for name, given in tables.items() if name != "documents"]
    wanted = {str(number) for given in shown for number in given.get("document", ())}
    texts = {
        str(number): {"text": text["text"], "lengths": np.diff(text["ends"], prepend=0).tolist()}
        for number, text in inspection.texts.items()
        if str(number) in wanted
    }
    found = {"index": _json(index), "texts": _json(texts)}
    for layer in range(len(inspection.meta["layers"])):
        cut = {name: _of_layer(tables[name], layer) for name in sorted(by_layer)}
        windows = cut.get("examples", {}).pop(_WINDOW, [])
        bytes_ = [base64.b64decode(window or "") for window in windows]
        lengths = [len(window) for window in bytes_]
        name = f"layer_{layer:02d}"
        found[name] = _json({"tables": _short(cut), "windows": lengths})
        found[f"{name}.windows"] = b"".join(bytes_)
    return found


def _shown(name: str, given: Table) -> Table:
    """The columns of a table that are shown, and of the examples the first of every panel."""
    kept = {key: column for key, column in given.items() if key not in UNSHOWN.get(name, ())}
    if name != "examples":
        return kept
    seen: Counter[tuple[Any, ...]] = Counter()
    at = []
    for i, (panel, shard) in enumerate(zip(given["panel"], given["shard"], strict=True)):
        group = given["bin"][i] if panel == "spectrum" else None
        key = (given["layer"][i], given["expert"][i], panel, shard, group)
        if seen[key] < SHOWN.get((panel, shard), len(given["panel"])):
            at.append(i)
        seen[key] += 1
    return {key: [column[i] for i in at] for key, column in kept.items()}


def _of_layer(given: Table, layer: int) -> Table:
    at = np.flatnonzero(np.array(given["layer"]) == layer).tolist()
    return {name: [column[i] for i in at] for name, column in given.items() if name != "layer"}


def _short(value: Any) -> Any:
    """The same JSON values with the digits that are shown."""
    if isinstance(value, float):
        return (
            int(value) if value.is_integer() and abs(value) < 1e9 else float(f"{value:.{_DIGITS}g}")
        )
    if isinstance(value, list):
        return [_short(item) if isinstance(item, float | list | dict) else item for item in value]
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    return value


def _json(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Half of a surrogate pair is no UTF-8, but what it is replaced by here is JSON's escape of it.
    return text.encode("utf-8", errors="backslashreplace")
