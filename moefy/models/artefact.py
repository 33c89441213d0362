"""The side files of a moefied checkpoint: `moefy.json` and `moefy.safetensors`, strictly read.

`docs/format.md` describes every field. It knows nothing of models: only names, shapes and hashes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from moefy.errors import CheckpointError
from moefy.models.checkpoint import Checkpoint, sha256

FORMAT_VERSION = 3
WITHOUT_HEADS = 2
"""The format before; it is read as one in which all attention heads run."""
META, SIDE = "moefy.json", "moefy.safetensors"
FULL, ADAPTER = "full", "adapter"

T = TypeVar("T", bound="Entry")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What `moefy.json` has of everything that is routed."""

    width: int
    experts: int
    router: dict[str, Any]
    """`name` and what that router is made with: `hidden`; of an MLP `bits`, `inputs`, `look_ahead`."""
    selection: dict[str, Any]
    """`name` and the settings of that selection."""
    compensation: dict[str, Any]
    """`name` and `rank`."""

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

    @property
    def routed_neurons(self) -> int:
        """Outputs of all heads."""
        return self.heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """Everything the side files say."""

    form: str
    """`full`: the weights are here, in expert order. `adapter`: they are in `source`, as they were."""
    source: dict[str, Any]
    """`name` as the user gave it (path or Hub id) and `sha256` of its files."""
    recipe: dict[str, Any]
    corpus: dict[str, Any]
    layers: list[LayerEntry]
    tensors: dict[str, Tensor] = field(repr=False, compare=False)
    """`layers.{i}.permutation` [N] int32, `layers.{i}.router.*`, `layers.{i}.compensation.*`; the same
    two of `heads.{i}`."""
    heads: list[HeadEntry] = field(default_factory=list)
    """Attention blocks whose heads are routed: all of them, or none."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Hashes of the weight files of the full form and of `moefy.safetensors`."""
    weights_modified: bool = False
    """True once training has changed weights: `revert` can then not give back the source."""
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT_VERSION

    def tensors_of(self, index: int, what: str = "layers") -> dict[str, Tensor]:
        """The tensors of one layer, or of one of the `heads`, by what follows `{what}.{index}.`."""
        return part_of(self.tensors, f"{what}.{index}")

    def permutation(self, index: int) -> Tensor:
        """Neurons of layer `index` in expert order `[N]`: slot `i` holds source neuron `p[i]`."""
        return self.tensors[f"layers.{index}.permutation"].long()


def part_of(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below a prefix, by what follows it and a dot."""
    cut = f"{prefix}."
    return {n.removeprefix(cut): t for n, t in tensors.items() if n.startswith(cut)}


def write_side_files(folder: Path, artefact: Artefact) -> None:
    """Write both files; equal artefacts give equal bytes."""
    tensors = {name: artefact.tensors[name].contiguous() for name in sorted(artefact.tensors)}
    (folder / SIDE).write_bytes(save(tensors))
    meta = {key: value for key, value in asdict(artefact).items() if key != "tensors"}
    meta["sha256"] = {**artefact.sha256, SIDE: sha256(folder / SIDE)}
    text = json.dumps(meta, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / META).write_text(text + "\n", encoding="utf-8")


def is_artefact(folder: str | Path) -> bool:
    """Whether this is a folder that moefy wrote."""
    return (Path(folder) / META).is_file()


def read_artefact(folder: str | Path, *, verify: bool = True) -> Artefact:
    """Read and check both files, and with `verify` the hashes of all weights.

    Raises `CheckpointError` for a newer format, unknown or missing fields, missing or misshapen
    tensors, and files whose hash is not the recorded one.
    """
    folder = Path(folder)
    meta_file = folder / META
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give one that moefy convert wrote")
    if not meta_file.is_file():
        raise CheckpointError(f"{folder}: no {META}; not a moefied model, convert it first")
    try:
        meta = json.loads(meta_file.read_text(encoding="utf-8"))
        version = meta["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{meta_file}: damaged ({error}); convert the source again") from None
    if version == WITHOUT_HEADS and "heads" not in meta:
        meta["heads"], version = [], FORMAT_VERSION
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{meta_file}: format {version}, this moefy reads {FORMAT_VERSION}; "
            + ("upgrade moefy" if version > FORMAT_VERSION else "convert the source again")
        )
    _check_fields(meta_file, "", meta, {f.name for f in fields(Artefact)} - {"tensors"})
    layers = _entries(meta_file, "layers", LayerEntry, meta["layers"])
    heads = _entries(meta_file, "heads", HeadEntry, meta["heads"])
    hashes = {**meta["sha256"]}
    names = hashes if verify else {SIDE: hashes.get(SIDE)}
    for name, expected in names.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing; copy the folder again")
        if sha256(folder / name) != expected:
            raise CheckpointError(
                f"{folder / name}: its SHA-256 is not the one in {META}; the file was changed or "
                "damaged, copy or convert it again"
            )
    try:
        tensors = load_file(folder / SIDE)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / SIDE}: damaged ({error})") from None
    values = {k: value for k, value in meta.items() if k not in ("layers", "heads", "format")}
    artefact = Artefact(**values, layers=layers, heads=heads, tensors=tensors)
    for index, entry in enumerate(layers):
        _check_permutation(folder / SIDE, artefact, index, entry)
    return artefact


def open_artefact(
    folder: str | Path, *, base: str | Path | None = None, verify: bool = True
) -> tuple[Artefact, Checkpoint]:
    """An artefact and the checkpoint that holds its weights: its own folder, or the base of an adapter.

    `base` says where the source of an adapter lies if it moved; `verify=False` skips the hashes of
    the weights. Raises `CheckpointError` for a damaged artefact, and where the base is not to be had.
    """
    artefact = read_artefact(folder, verify=verify)
    if artefact.form != ADAPTER:
        return artefact, Checkpoint.open(folder)
    try:
        checkpoint = Checkpoint.open(base or artefact.source["name"])
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: the base of this adapter cannot be opened: {error}"
        ) from None
    if verify:
        verify_source(artefact, checkpoint)
    return artefact, checkpoint


def open_folder(
    where: str | Path, *, base: str | Path | None = None, verify: bool = True
) -> tuple[Artefact | None, Checkpoint]:
    """`open_artefact` of a folder that moefy wrote; of a dense checkpoint or Hub id, None and itself."""
    if is_artefact(where):
        return open_artefact(where, base=base, verify=verify)
    return None, Checkpoint.open(where)


def verify_source(artefact: Artefact, base: Checkpoint) -> None:
    """Raise `CheckpointError` where `base` does not hold the very files of the source."""
    hashes = base.hashes()
    for name, expected in artefact.source["sha256"].items():
        if hashes.get(name) != expected:
            raise CheckpointError(
                f"{base.folder}: {name} is {'another' if name in hashes else 'missing'}, this "
                f"artefact was made from '{artefact.source['name']}' with SHA-256 {expected[:12]}…; "
                "give that checkpoint"
            )


def _entries(file: Path, where: str, kind: type[T], found: list[dict[str, Any]]) -> list[T]:
    entries = []
    for index, values in enumerate(found):
        _check_fields(file, f"{where}[{index}].", values, {f.name for f in fields(kind)})
        entries.append(kind(**values))
    return entries


def _check_fields(file: Path, where: str, got: Mapping[str, Any], expected: set[str]) -> None:
    missing, unknown = sorted(expected - set(got)), sorted(set(got) - expected)
    if missing or unknown:
        what = (
            f"'{where}{missing[0]}' is missing" if missing else f"'{where}{unknown[0]}' is unknown"
        )
        raise CheckpointError(f"{file}: field {what}; convert the source again")


def _check_permutation(file: Path, artefact: Artefact, index: int, entry: LayerEntry) -> None:
    name = f"layers.{index}.permutation"
    got = artefact.tensors.get(name)
    if got is None:
        raise CheckpointError(f"{file}: tensor {name} is missing; convert the source again")
    if got.shape != (entry.neurons,) or got.sort().values.tolist() != list(range(entry.neurons)):
        raise CheckpointError(f"{file}: {name} is not a permutation of {entry.neurons} neurons")
