"""An inspection: all that was found about the experts of one model, as tables and a quality summary.

    found = moefy.inspect("out")
    found.expert(5, 12)["domains"]              # rows of one expert, table by table
    found.causal.matrix("ce", layer=5)          # experts x domains, with intervals
    found.to_frame("experts")                   # a pandas DataFrame
    found.save("folder")                        # inspection.json

Tables are plain columns, on disk and in memory.

Shapes: E experts, C domains.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefy.errors import CheckpointError, MoefyError, OutputError, unknown_choice
from moefy.run.folder import write_whole
from moefy.run.reading import reading

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


FILE = "inspection.json"
FORMAT = 1
NOTHING = 255
"""In a window of an example: no such token. Others are 0 (nothing) to 254 (`norm_max` of the expert, or
more)."""


@dataclass
class Inspection:
    """What `moefy.inspect` returns; JSON values throughout. docs/inspection.md defines every column."""

    meta: dict[str, Any]
    """What was inspected, with what: model, layers, texts, settings, seeds, versions, machine, seconds."""
    honesty: dict[str, Any]
    """The quality summary: how good the model is and how much of what follows chance or tokens explain."""
    tables: dict[str, Table]
    texts: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)
    """By document number, `text`, and `ends`: where in it every token ends; for examples in context."""
    prompts: list[dict[str, Any]] = field(default_factory=list, repr=False)
    """Prompts that were looked at: tokens x experts of every layer."""

    @property
    def layers(self) -> list[str]:
        """Name of every layer."""
        return [layer["name"] for layer in self.meta["layers"]]

    @property
    def domains(self) -> list[str]:
        """The domains, sorted."""
        return sorted(set(self.table("documents")["domain"]))

    def table(self, name: str) -> Table:
        """One table by name; `MoefyError` with the nearest name if there is none."""
        if name not in self.tables:
            raise MoefyError(unknown_choice("table", name, self.tables))
        return self.tables[name]

    def to_frame(self, name: str) -> Any:
        """One table as a pandas DataFrame; `MoefyError` where pandas is not installed."""
        try:
            import pandas
        except ImportError:
            raise MoefyError(
                'to_frame needs pandas: pip install "moefy[frames]"; .table(name) gives plain columns'
            ) from None
        return pandas.DataFrame(self.table(name))

    def expert(self, layer: int, expert: int) -> dict[str, list[dict[str, Any]]]:
        """The rows of every table that are about one expert."""
        if not 0 <= layer < len(self.layers):
            raise MoefyError(f"layer {layer}: the model has layers 0 to {len(self.layers) - 1}")
        count = self.meta["layers"][layer]["experts"]
        if not 0 <= expert < count:
            raise MoefyError(f"layer {layer}: expert {expert}, it has experts 0 to {count - 1}")
        found = {}
        for name, given in self.tables.items():
            for layer_key, expert_key in (("layer", "expert"), ("layer_a", "expert_a")):
                if layer_key in given and expert_key in given:
                    keys = zip(given[layer_key], given[expert_key], strict=True)
                    at = [i for i, key in enumerate(keys) if key == (layer, expert)]
                    found[name] = rows(
                        {key: [column[i] for i in at] for key, column in given.items()}
                    )
        return found

    @property
    def causal(self) -> "Causal":
        """What ablation did, as matrices."""
        return Causal(self.table("causal"), self.domains)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "kind": "inspection",
            "format": FORMAT,
            "meta": self.meta,
            "honesty": self.honesty,
            "tables": self.tables,
            "texts": self.texts,
            "prompts": self.prompts,
        }

    def save(self, folder: str | Path) -> Path:
        """Write `inspection.json` into a folder; returns the file."""
        path = Path(folder) / FILE
        write_file(path, json.dumps(self.to_dict(), ensure_ascii=False))
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Inspection":
        """Read what `save` wrote, from the file or its folder.

        Raises `CheckpointError` for anything else.
        """
        path = Path(path)
        path = path / FILE if path.is_dir() else path
        with reading(path, "inspect again"):
            values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict) or values.get("kind") != "inspection":
            raise CheckpointError(f"{path}: is no inspection; give a file of `moefy inspect`")
        if values.get("format") != FORMAT:
            raise CheckpointError(
                f"{path}: format {values.get('format')}, this moefy reads {FORMAT}; inspect again"
            )
        parts = ("meta", "honesty", "tables", "texts", "prompts")
        with reading(path, "inspect again"):
            return cls(**{part: values[part] for part in parts})


def write_file(path: Path, content: bytes | str) -> None:
    """Write a file whole, its folder made; raises `OutputError` where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None


@dataclass(frozen=True)
class Causal:
    """The table `causal` as matrices."""

    table: Table
    domains: list[str]

    def matrix(
        self, figure: str = "ce", *, layer: int, mode: str = "mean", model: str = "dense"
    ) -> NDArray[np.float64]:
        """`figure` (any column: `ce`, `kl`, `csi`, `q`, `z_random` ...) of a layer's experts `[E, C]` by
        domain, in the order of `domains`; NaN where an expert was not ablated in this way."""
        if figure not in self.table:
            raise MoefyError(unknown_choice("figure", figure, self.table))
        here = [
            row
            for row in rows(self.table)
            if (row["layer"], row["mode"], row["model"]) == (layer, mode, model)
            and row["domain"] in self.domains
        ]
        experts = 1 + max(
            (row["expert"] for row in rows(self.table) if row["layer"] == layer), default=-1
        )
        found = np.full((experts, len(self.domains)), np.nan)
        for row in here:
            if row[figure] is not None:
                found[row["expert"], self.domains.index(row["domain"])] = row[figure]
        return found
