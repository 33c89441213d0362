"""What `moefy.json` says of everything that is routed: its lists `layers` and `heads`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from moefy.errors import CheckpointError
from moefy.models import schema
from moefy.models.quantised import QuantisedMlp
from moefy.models.schema import Field, check, optional, whole

AGAIN = "convert the source again"
MOST_HIDDEN = 2**20
"""Units of the widest router, and the largest rank."""
_STORAGE = {"bits": whole(1, 8), "scales": schema.one_of(8, 16)}

T = TypeVar("T", bound="Entry")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What `moefy.json` has of everything that is routed."""

    width: int
    experts: int
    router: dict[str, Any]
    """`name` and what that router is made with: `hidden`; of an MLP `bits`, `inputs`, `look_ahead`;
    and `settings`, where it has others."""
    selection: dict[str, Any]
    """`name` and the settings of that selection."""
    compensation: dict[str, Any]
    """`name` and `rank`."""

    LIST: ClassVar[str] = ""
    """The list of `moefy.json` that it stands in."""

    @property
    def where(self) -> str:
        """What an error calls it: the path of its module."""
        raise TypeError(f"{type(self).__name__} does not say where it is")

    @classmethod
    def fields(cls) -> dict[str, Field]:
        """What its fields hold, each by itself."""
        return {
            "width": whole(1), "experts": whole(1), "router": schema.table(),
            "selection": schema.table(), "compensation": schema.table(),
        }  # fmt: skip

    def router_fields(self) -> dict[str, Field]:
        """What `router` holds besides its name."""
        return {"hidden": whole(0, MOST_HIDDEN), "settings": optional(schema.scalars())}

    def contradiction(self) -> str | None:
        """What does not go together, if anything."""
        return None

    @property
    def routed(self) -> int:
        """Experts that the router scores."""
        return self.experts

    @property
    def routed_neurons(self) -> int:
        """What they have together: neurons, or outputs of heads."""
        raise TypeError(f"{type(self).__name__} does not say how many neurons it routes")


@dataclass(frozen=True, kw_only=True)
class LayerEntry(Entry):
    """One converted MLP; its experts begin with the shared ones."""

    layer: str
    """Module path of the layer in the transformers model."""
    neurons: int
    shared: int
    storage: dict[str, int] | None = None
    """`bits` and `scales` of `moefy.recipe.StorageRecipe`, where the matrices are rounded."""

    LIST: ClassVar[str] = "layers"

    @property
    def where(self) -> str:
        """The layer."""
        return self.layer

    @classmethod
    def fields(cls) -> dict[str, Field]:
        """What its fields hold, each by itself."""
        own = {"layer": schema.text(), "neurons": whole(1), "shared": whole(0)}
        return super().fields() | own | {"storage": optional(schema.table())}

    def router_fields(self) -> dict[str, Field]:
        """What `router` holds besides its name."""
        return super().router_fields() | {
            "bits": whole(0, 64), "inputs": whole(0, self.width), "look_ahead": schema.flag(),
        }  # fmt: skip

    def contradiction(self) -> str | None:
        """What does not go together, if anything."""
        if self.neurons % self.experts:
            return f"{self.experts} experts do not divide {self.neurons} neurons"
        if self.shared >= self.experts:
            return f"{self.shared} of {self.experts} experts are shared, none is left to route"
        return None

    def stored(self, tensors: Mapping[str, Tensor]) -> QuantisedMlp | None:
        """Its matrices among the side file's `tensors` of this layer; None where they are not rounded."""
        if self.storage is None:
            return None
        return QuantisedMlp(part_of(tensors, "weights"), self.width)

    @property
    def routed(self) -> int:
        """Experts that the router scores."""
        return self.experts - self.shared

    @property
    def routed_neurons(self) -> int:
        """Neurons of the experts that the router scores."""
        return self.neurons // self.experts * self.routed

    @property
    def active(self) -> int | None:
        """Experts that run for every token, shared ones included; None where it varies."""
        k = self.selection.get("k")
        return None if k is None else int(k) + self.shared


@dataclass(frozen=True, kw_only=True)
class HeadEntry(Entry):
    """One attention block whose heads are routed: experts of `heads / experts` that follow each other."""

    block: str
    """Module path of the attention module in the transformers model."""
    heads: int
    head_dim: int

    LIST: ClassVar[str] = "heads"

    @property
    def where(self) -> str:
        """The block."""
        return self.block

    @classmethod
    def fields(cls) -> dict[str, Field]:
        """What its fields hold, each by itself."""
        own = {"block": schema.text(), "heads": whole(1), "head_dim": whole(1)}
        return super().fields() | own

    def contradiction(self) -> str | None:
        """What does not go together, if anything."""
        if self.heads % self.experts:
            return f"{self.experts} experts do not divide {self.heads} heads"
        return None

    @property
    def routed_neurons(self) -> int:
        """Outputs of all heads."""
        return self.heads * self.head_dim


def read_entries(file: Path, kind: type[T], rows: list[Any], *, plugins: bool) -> list[T]:
    """The entries of one list of `file`, each checked by itself; `plugins`: methods may be names of code.

    Raises `CheckpointError` for a field that is unknown, missing or no such value, for fields that contradict
    each other, and for a place that is there twice.
    """
    entries: list[T] = []
    for index, values in enumerate(rows):
        where = f"{file}: {kind.LIST}[{index}]"
        check(values, kind.fields(), where)
        entry = kind(**values)
        if wrong := entry.contradiction():
            raise CheckpointError(f"{where} ({entry.where}): {wrong}; {AGAIN}")
        where = f"{where} ({entry.where})"
        name = {"name": schema.method_name(plugins)}
        check(entry.router, name | entry.router_fields(), f"{where}: router")
        check(entry.compensation, name | {"rank": whole(0, MOST_HIDDEN)}, f"{where}: compensation")
        values = {key: optional(schema.number()) for key in entry.selection if key != "name"}
        check(entry.selection, name | values, f"{where}: selection")
        if isinstance(entry, LayerEntry) and entry.storage is not None:
            check(entry.storage, _STORAGE, f"{where}: storage")
        entries.append(entry)
    places = [entry.where for entry in entries]
    if len(set(places)) < len(places):
        twice = next(place for place in places if places.count(place) > 1)
        raise CheckpointError(f"{file}: {kind.LIST}: {twice} is there twice; {AGAIN}")
    return entries


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, by what follows it and a dot."""
    cut = f"{prefix}."
    return {n.removeprefix(cut): t for n, t in tensors.items() if n.startswith(cut)}
