"""From the entries of an artefact to the modules that they name; all is checked before anything is made.

`moefy.models.artefact` has checked every field by itself; here are the tables of methods and the model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moefy.errors import CheckpointError, MoefyError
from moefy.methods.base import Compensation, Router, Selection
from moefy.methods.tables import COMPENSATIONS, ROUTERS, SELECTIONS, choose
from moefy.models.artefact import META, SIDE, Artefact
from moefy.models.entries import Entry, part_of
from moefy.models.heads import HeadSite
from moefy.models.locate import Site
from moefy.models.schema import check as check_fields


def build_router(entry: Entry) -> Router:
    """The router that an entry names, without its tensors."""
    kind = choose(ROUTERS, "router", entry.router["name"])
    return kind.make(entry.width, entry.routed, entry.routed_neurons, entry.router)


def build_selection(entry: Entry) -> Selection:
    """The selection that an entry names, with its settings. Raises `CheckpointError` for wrong ones."""
    kind = choose(SELECTIONS, "selection", entry.selection["name"])
    settings = {key: value for key, value in entry.selection.items() if key != "name"}
    check_fields(settings, kind.declared(entry.routed), f"{META}: {entry.where}: selection")
    return kind(**settings)


def build_compensation(entry: Entry) -> Compensation:
    """The compensation that an entry names, without its tensors."""
    kind = choose(COMPENSATIONS, "compensation", entry.compensation["name"])
    return kind.make(entry.width, entry.routed, entry.routed_neurons, entry.compensation["rank"])


def fill(module: nn.Module, tensors: dict[str, Tensor], name: str) -> None:
    """Give a router or compensation its tensors. Raises `CheckpointError` where they do not fit."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{SIDE}: {name}: {reason}") from None


def check_artefact(
    artefact: Artefact, sites: Sequence[Site], blocks: Sequence[HeadSite] = ()
) -> None:
    """Whether an artefact describes this model: layers, sizes, methods, settings, and their tensors.

    Raises `CheckpointError` naming the layer and the field. No weight is read, and what is built to
    know the shapes of tensors takes no memory.
    """
    _check_places([(s.layer, s.neurons, s.width) for s in sites], artefact, "layers")
    if artefact.heads or blocks:
        _check_places([(s.block, s.neurons, s.width) for s in blocks], artefact, "heads")
    for site in sites:
        _check_gate(site, artefact)
    for what, entries in (("layers", artefact.layers), ("heads", artefact.heads)):
        for index, entry in enumerate(entries):
            _check_methods(entry)
            tensors = artefact.tensors_of(index, what)
            for part, module in _shapes(entry).items():
                _check_tensors(part_of(tensors, part), module, f"{what}.{index}.{part}")


def _check_places(model: list[tuple[str, int, int]], artefact: Artefact, what: str) -> None:
    entries: Sequence[Entry] = artefact.layers if what == "layers" else artefact.heads
    if len(model) != len(entries):
        raise CheckpointError(
            f"{META}: {len(entries)} {what}, the model has {len(model)}; convert the source again"
        )
    for index, (entry, (path, neurons, width)) in enumerate(zip(entries, model, strict=True)):
        where = f"{META}: {what}[{index}]"
        if entry.where != path:
            raise CheckpointError(
                f"{where}: got '{entry.where}', the model has '{path}' there; convert the source again"
            )
        shared = getattr(entry, "shared", 0)
        all_of_it = entry.routed_neurons // entry.routed * (entry.routed + shared)
        for name, got, want in (("neurons", all_of_it, neurons), ("width", entry.width, width)):
            if got != want:
                raise CheckpointError(
                    f"{where} ({path}): {name}: got {got}, the model has {want}; convert the source again"
                )


def _check_gate(site: Site, artefact: Artefact) -> None:
    """Whether the rounded matrices of a layer are those that its MLP has."""
    stored = artefact.stored(site.index)
    if stored is not None and ("gate" in stored.names) != site.gated:
        what = "is missing" if site.gated else "is there, and its MLP has no gate"
        raise CheckpointError(
            f"{SIDE}: tensor layers.{site.index}.weights.gate.codes {what}; convert the source again"
        )


def _check_methods(entry: Entry) -> None:
    """Whether the tables have what it names, and its selection is one."""
    try:
        build_selection(entry)
        router = choose(ROUTERS, "router", entry.router["name"])
        for name in entry.router.get("settings") or {}:
            if name not in router.Settings.__dataclass_fields__:
                raise MoefyError(f"router.settings: '{name}' is unknown")
        choose(COMPENSATIONS, "compensation", entry.compensation["name"])
    except CheckpointError:
        raise
    except MoefyError as error:
        raise CheckpointError(f"{META}: {entry.where}: {error}; convert the source again") from None


def _shapes(entry: Entry) -> dict[str, nn.Module]:
    """The modules of an entry without memory, to know what tensors they have."""
    try:
        with torch.device("meta"):
            return {"router": build_router(entry), "compensation": build_compensation(entry)}
    except (MoefyError, RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{META}: {entry.where}: {reason}; convert the source again"
        ) from None


def _check_tensors(tensors: dict[str, Tensor], module: nn.Module, where: str) -> None:
    """Whether these are the tensors of a module: their names, shapes and dtypes, of numbers any width."""
    expected = module.state_dict()
    for name in sorted({*expected, *tensors}):
        got, want = tensors.get(name), expected.get(name)
        if got is None or want is None:
            what = "is missing" if got is None else "is unknown"
            raise CheckpointError(f"{SIDE}: tensor {where}.{name} {what}; convert the source again")
        kinds = (got.is_floating_point(), want.is_floating_point())
        if got.shape != want.shape or (got.dtype != want.dtype and kinds != (True, True)):
            raise CheckpointError(
                f"{SIDE}: {where}.{name}: got {_said(got)}, must be {_said(want)}; convert the source again"
            )


def _said(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
