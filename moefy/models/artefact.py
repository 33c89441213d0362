"""The side files of a moefied checkpoint: `moefy.json` and `moefy.safetensors`, strictly read.

`docs/format.md` describes every field. It knows nothing of models: only names, shapes and hashes.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from moefy import recipe as recipes
from moefy.errors import CheckpointError, RecipeError
from moefy.models import schema
from moefy.models.checkpoint import Checkpoint, sha256
from moefy.models.entries import AGAIN, HeadEntry, LayerEntry, part_of, read_entries
from moefy.models.quantised import GROUPED, QuantisedMlp, shapes
from moefy.models.schema import check, check_one, optional, whole
from moefy.run.console import Reporter
from moefy.run.reading import read_json, reading

FORMAT_VERSION = 3
WITHOUT_HEADS = 2
"""The format before; it is read as one in which all attention heads run."""
META, SIDE = "moefy.json", "moefy.safetensors"
FULL, ADAPTER = "full", "adapter"

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TENSOR = re.compile(
    r"(layers|heads)\.(\d+)\.(permutation|weights\.\w+\.\w+|(?:router|compensation)\.[\w.]+)"
)
_OF_LAYERS = ("permutation", "weights")
"""What tensors of heads have none of."""
_PLUGINS: ContextVar[bool] = ContextVar("_PLUGINS", default=False)
_BASE: ContextVar[Path | None] = ContextVar("_BASE", default=None)


@contextmanager
def allow_plugins(allowed: bool = True) -> Iterator[None]:
    """Artefacts that are read meanwhile may name code to be imported, as `package.module:Name`.

    An artefact is data otherwise: nothing that it names is imported.
    """
    before = _PLUGINS.set(allowed or _PLUGINS.get())
    try:
        yield
    finally:
        _PLUGINS.reset(before)


@contextmanager
def base_at(folder: Path) -> Iterator[None]:
    """The base of artefacts of adapter form that are opened meanwhile lies there; its hashes are compared."""
    before = _BASE.set(folder)
    try:
        yield
    finally:
        _BASE.reset(before)


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """Everything the side files say."""

    form: str
    """`full`: the weights are here, in expert order. `adapter`: they are in `source`, as they were."""
    source: dict[str, Any]
    """`name` as the user gave it (path or Hub id) and `sha256` of its files; of an adapter whose base is
    on the Hub, `revision`, the commit that it was made from."""
    recipe: dict[str, Any]
    corpus: dict[str, Any]
    layers: list[LayerEntry]
    tensors: dict[str, Tensor] = field(repr=False, compare=False)
    """`layers.{i}.permutation` [N] int32, `layers.{i}.router.*`, `layers.{i}.compensation.*`; the same
    two of `heads.{i}`; `layers.{i}.weights.*` where matrices are rounded (`QuantisedMlp`)."""
    heads: list[HeadEntry] = field(default_factory=list)
    """Attention blocks whose heads are routed: all of them, or none."""
    sha256: dict[str, str] = field(default_factory=dict)
    """Hashes of `config.json` and the weight files of the full form, and of `moefy.safetensors`."""
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

    def stored(self, index: int) -> QuantisedMlp | None:
        """The matrices of layer `index` where they are rounded: they are what is computed with."""
        return self.layers[index].stored(self.tensors_of(index))

    @property
    def rounded(self) -> int | None:
        """Bits of the codes of the layers that are rounded, None if none is."""
        return next((entry.storage["bits"] for entry in self.layers if entry.storage), None)


def write_side_files(folder: Path, artefact: Artefact) -> None:
    """Write both files; equal artefacts give equal bytes."""
    tensors = {name: artefact.tensors[name].contiguous() for name in sorted(artefact.tensors)}
    (folder / SIDE).write_bytes(save(tensors))
    meta = {key: value for key, value in asdict(artefact).items() if key != "tensors"}
    for entry in meta["layers"]:
        if entry["storage"] is None:
            del entry["storage"]
    meta["sha256"] = {**artefact.sha256, SIDE: sha256(folder / SIDE)}
    text = json.dumps(meta, indent=1, sort_keys=True, ensure_ascii=False)
    (folder / META).write_text(text + "\n", encoding="utf-8")


def is_artefact(folder: str | Path) -> bool:
    """Whether this is a folder that moefy wrote."""
    return (Path(folder) / META).is_file()


def read_artefact(folder: str | Path, *, verify: bool = True) -> Artefact:
    """Read and check both files, and with `verify` the hashes of all weights.

    Raises `CheckpointError` for another format, unknown, missing or contradictory fields, missing,
    unknown or misshapen tensors, numbers that are not finite, names of code unless `allow_plugins`, and
    files whose hash is not the recorded one or that have none.
    """
    folder = Path(folder)
    meta_file = folder / META
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give one that moefy convert wrote")
    if not meta_file.is_file():
        raise CheckpointError(f"{folder}: no {META}; not a moefied model, convert it first")
    meta = _of_this_format(meta_file, read_json(meta_file, AGAIN))
    check(meta, _META, str(meta_file))
    check(meta["source"], _SOURCE, f"{meta_file}: source")
    check(meta["corpus"], _CORPUS, f"{meta_file}: corpus")
    _check_recipe(meta_file, meta["recipe"])
    layers = read_entries(meta_file, LayerEntry, meta["layers"], plugins=_PLUGINS.get())
    heads = read_entries(meta_file, HeadEntry, meta["heads"], plugins=_PLUGINS.get())
    _check_hashes(folder, meta, verify)
    with reading(folder / SIDE, AGAIN):
        tensors = load_file(folder / SIDE)
    values = {k: value for k, value in meta.items() if k not in ("layers", "heads", "format")}
    artefact = Artefact(**values, layers=layers, heads=heads, tensors=tensors)
    _check_tensors(folder / SIDE, artefact)
    return artefact


def _of_this_format(file: Path, meta: Any) -> dict[str, Any]:
    """The fields as this format has them, of it or the one before."""
    version = meta.get("format") if isinstance(meta, dict) else None
    if type(version) is not int:
        raise CheckpointError(f"{file}: damaged (format {version!r}); {AGAIN}")
    if version == WITHOUT_HEADS and "heads" not in meta:
        return {**meta, "heads": [], "format": FORMAT_VERSION}
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file}: format {version}, this moefy reads {FORMAT_VERSION}; "
            + ("upgrade moefy" if version > FORMAT_VERSION else AGAIN)
        )
    fields: dict[str, Any] = meta
    return fields


def open_artefact(
    folder: str | Path, *, base: str | Path | None = None, verify: bool = True
) -> tuple[Artefact, Checkpoint]:
    """An artefact and the checkpoint that holds its weights: its own folder, or the base of an adapter.

    `base` says where the source of an adapter lies if it moved, and overrules `base_at`;
    `verify=False` skips the hashes of the weights. Raises `CheckpointError` for a damaged artefact, and
    for a base that is not available.
    """
    artefact = read_artefact(folder, verify=verify)
    if artefact.form != ADAPTER:
        return artefact, Checkpoint.open(folder)
    if base is None and _BASE.get() is not None:
        base, verify = _BASE.get(), True
    try:
        checkpoint = _base(Path(folder), artefact) if base is None else Checkpoint.open(base)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: the base of this adapter cannot be opened: {error}"
        ) from None
    # What came from the Hub is what the artefact was made from, or it is not used.
    if verify or (base is None and checkpoint.revision is not None):
        verify_source(artefact, checkpoint)
    return artefact, checkpoint


def _base(folder: Path, artefact: Artefact) -> Checkpoint:
    """The checkpoint that an adapter names: a path, from its own folder on, or a pinned Hub revision."""
    name, revision = str(artefact.source["name"]), artefact.source.get("revision")
    path = folder / name
    if path.exists():
        return Checkpoint.open(path)
    if not _HUB_ID.fullmatch(name):
        raise CheckpointError(f"{path}: no such folder; say where it is with base= or --base")
    if revision is None:
        # Nothing says which revision it was: only what was downloaded before is taken.
        return Checkpoint.open_hub(name, local=True)
    Reporter().say(f"{folder}: opening its base, '{name}' of the Hub at revision {revision}")
    return Checkpoint.open_hub(name, revision)


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


_SOURCE = {
    "name": schema.text(),
    "sha256": schema.hashes(),
    "revision": optional(schema.text(re.compile("[0-9a-f]{40}"), "a commit of 40 digits")),
}
_CORPUS = {"name": schema.text(), "sha256": schema.string()}
_META = {
    "form": schema.one_of(FULL, ADAPTER),
    "source": schema.table(),
    "recipe": schema.table(),
    "corpus": schema.table(),
    "layers": schema.rows(),
    "heads": schema.rows(),
    "sha256": schema.hashes(),
    "weights_modified": schema.flag(),
    "versions": schema.words(),
    "format": whole(FORMAT_VERSION, FORMAT_VERSION),
}


def _check_recipe(file: Path, recipe: dict[str, Any]) -> None:
    """Whether it is a recipe; of names of code, none is taken that is not allowed."""
    try:
        recipes.from_dict(recipe)
    except RecipeError as error:
        raise CheckpointError(f"{file}: recipe: {error}; {AGAIN}") from None
    if not _PLUGINS.get():
        for key, value in recipes.flat(recipe).items():
            if isinstance(value, str):
                check_one(value, schema.method_name(False), f"{file}: recipe: {key}")


def _check_hashes(folder: Path, meta: dict[str, Any], verify: bool) -> None:
    """Whether `moefy.safetensors`, and with `verify` everything else that is read, is what was written."""
    hashes: dict[str, str] = dict(meta["sha256"])
    needed = [SIDE]
    if verify and meta["form"] == FULL:
        # Folders of before this was written down: they have the `config.json` of the source.
        source = meta["source"]["sha256"].get("config.json")
        if source is not None:
            hashes.setdefault("config.json", source)
        needed += ["config.json", *Checkpoint.open(folder).weights]
    for name in needed:
        if name not in hashes:
            raise CheckpointError(f"{folder / META}: sha256 has no '{name}'; {AGAIN}")
    for name in hashes if verify else needed:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: {name} is missing; copy the folder again")
        if sha256(folder / name) != hashes[name]:
            raise CheckpointError(
                f"{folder / name}: its SHA-256 is not the one in {META}; the file was changed or "
                "damaged, copy or convert it again"
            )


def _check_tensors(file: Path, artefact: Artefact) -> None:
    """Whether every tensor belongs to an entry and is finite, and permutations are that.

    What the tensors of routers and compensations are is known to those: `moefy.methods.declared`.
    """
    counts = {"layers": len(artefact.layers), "heads": len(artefact.heads)}
    for name, tensor in artefact.tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None or int(match[2]) >= counts[match[1]] or str(int(match[2])) != match[2]:
            raise CheckpointError(f"{file}: tensor {name} belongs to no layer; {AGAIN}")
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{file}: {name} holds NaN or infinity; {AGAIN}")
    for index, entry in enumerate(artefact.layers):
        name = f"layers.{index}.permutation"
        if name not in artefact.tensors:
            raise CheckpointError(f"{file}: tensor {name} is missing; {AGAIN}")
        order_N = artefact.tensors[name]
        if (
            order_N.dtype != torch.int32
            or order_N.shape != (entry.neurons,)
            or not torch.equal(order_N.sort().values, torch.arange(len(order_N), dtype=torch.int32))
        ):
            raise CheckpointError(f"{file}: {name} is not a permutation of {entry.neurons} neurons")
        _check_stored(file, f"layers.{index}.weights", entry, artefact.tensors_of(index))
    for name in artefact.tensors:
        heads, _, what, *_ = name.split(".")
        if heads == "heads" and what in _OF_LAYERS:
            raise CheckpointError(f"{file}: heads have no {what}; {AGAIN}")


def _check_stored(file: Path, where: str, entry: LayerEntry, tensors: dict[str, Tensor]) -> None:
    """Whether the rounded matrices of a layer are there, whole, and as its entry says."""
    got = part_of(tensors, "weights")
    names = [name for name in GROUPED if name != "gate" or any(n.startswith("gate.") for n in got)]
    want: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    if entry.storage is not None:
        bits, scales = entry.storage["bits"], entry.storage["scales"]
        want = shapes(entry.neurons, entry.width, bits, scales, names)
    for name in sorted({*got, *want}):
        if name not in want or name not in got:
            what = "is missing" if name in want else "belongs to no rounded matrix"
            raise CheckpointError(f"{file}: tensor {where}.{name} {what}; {AGAIN}")
        shape, dtype = want[name]
        if (tuple(got[name].shape), got[name].dtype) != (shape, dtype):
            raise CheckpointError(
                f"{file}: {where}.{name}: got {list(got[name].shape)} {got[name].dtype}, must be "
                f"{list(shape)} {dtype}; {AGAIN}"
            )
        if dtype == torch.float16 and bool((got[name] < 0).any()):
            raise CheckpointError(f"{file}: {where}.{name} holds numbers below zero; {AGAIN}")
