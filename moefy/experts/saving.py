"""Write a moefied model as a folder again.

A model that has not changed gives the bytes that it was loaded from. Values that have are overwritten in
copies of the files; where tensors are new or of another shape, or other sizes of files are asked for, a
stock model without numbers writes them, as transformers does. A folder appears when it is complete.

Shapes: N neurons, D width.
"""

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.errors import MoefyError, OutputError
from moefy.experts.moefied import Moefied, of
from moefy.experts.stock_names import with_routing_of
from moefy.models.artefact import (
    ADAPTER,
    META,
    SIDE,
    is_artefact,
    read_artefact,
    write_side_files,
)
from moefy.models.checkpoint import (
    INDEX,
    SINGLE,
    Checkpoint,
    copy_folder,
    overwrite,
    visible_files,
)
from moefy.models.config import read_config
from moefy.models.locate import Site, disk_names, meta_model, permute
from moefy.models.mlp import DenseMlp
from moefy.models.quantised import QuantisedMlp
from moefy.models.reorder import rounded_values, stock_parameter

_SHARD = "50GB"
"""Size of the largest weight file, as transformers has it."""
_CONFIGS = ("config.json", "generation_config.json")
_HARMLESS = {"safe_serialization": (True,), "save_original_format": (True,), "variant": (None,),
             "distributed_checkpoint": (False,), "token": (None,), "save_peft_format": (True,)}  # fmt: skip
"""Arguments of transformers' `save_pretrained` that change nothing here, with the values that they may have."""


@dataclass
class _Saved:
    """A model that is being saved: its tensors by the names that the stock model has for them."""

    model: PreTrainedModel
    state: Mapping[str, Tensor]
    """By the names that the model in experts has."""
    folder: Path

    @cached_property
    def carried(self) -> Moefied:
        return of(self.model)

    @cached_property
    def stock(self) -> PreTrainedModel:
        """The stock model with the present config, without numbers."""
        return meta_model(copy.deepcopy(self.model.config))

    @cached_property
    def owners(self) -> dict[str, Site]:
        """The MLP that each of the stock model's parameters belongs to, where it does."""
        return {name: site for site in self.carried.sites for name in site.parameters}

    @cached_property
    def on_disk(self) -> dict[str, str]:
        """Which tensor of the stock model each tensor of the files is."""
        return disk_names(self.stock, self.carried.checkpoint.tensors)

    @property
    def adapter(self) -> bool:
        return self.carried.artefact.form == ADAPTER

    def value(self, name: str) -> Tensor:
        """A tensor of the stock model, its neurons in the order of the files."""
        site = self.owners.get(name)
        if site is None:
            return self.state[name].detach()
        now = self._rounded(site, name)
        now = stock_parameter(site, self._mlp(site), name) if now is None else now
        if self.adapter:
            order_N = self.carried.artefact.permutation(site.index)
            now = permute(site, name, now, order_N.argsort().to(now.device))
        return now

    def _mlp(self, site: Site) -> DenseMlp:
        """The weights of one MLP as they are to be saved."""
        names = self.carried.mlps[site.index].weight_names
        own: dict[str, Any] = {n: self.state[f"{site.module}.{n}"].detach() for n in names}
        return DenseMlp(activation=site.activation, **own)

    @cached_property
    def _rounded(self) -> Callable[[Site, str], Tensor | None]:
        return rounded_values(self.codes.get)

    @cached_property
    def codes(self) -> dict[int, QuantisedMlp]:
        """The matrices of layers that are rounded; what is no longer the value of its codes is rounded anew."""
        on_disk = {name: disk for disk, name in self.on_disk.items()}
        files = self.carried.checkpoint
        return {
            site.index: self.carried.mlps[site.index].rounded(
                self._mlp(site), files.dtype_of(on_disk[site.parameter("up")]), **entry.storage
            )
            for site, entry in zip(self.carried.sites, self.carried.artefact.layers, strict=True)
            if entry.storage is not None
        }

    @cached_property
    def changed_codes(self) -> dict[str, Tensor]:
        """Tensors of the side file that are not what they were."""
        tensors, before = {}, self.carried.artefact.tensors
        for index, stored in self.codes.items():
            for name, value in stored.tensors.items():
                place = f"layers.{index}.weights.{name}"
                if value is not before[place] and not torch.equal(value, before[place]):
                    tensors[place] = value
        return tensors

    def refuse_other_modules(self) -> None:
        """Raise `MoefyError` where the tensors are not those of the model as it was loaded, by name."""
        names = set(self.stock.state_dict()) - set(self.owners)
        routed = [(site.module, self.carried.mlps[site.index]) for site in self.carried.sites]
        for place, sparse in routed:
            names |= {f"{place}.{name}" for name in sparse.state_dict()}
        for block in self.carried.heads:
            names |= {n for n in self.state if n.startswith(f"{block.projection}.router.")}
            names |= {n for n in self.state if n.startswith(f"{block.projection}.compensation.")}
        missing, more = sorted(names - set(self.state)), sorted(set(self.state) - names)
        if missing or more:
            what = f"has {more[0]}, which" if more else f"has no {missing[0]}, which"
            raise MoefyError(
                f"{self.folder}: the model {what} the model that was loaded has{' not' if more else ''}; "
                "merge adapters first (merge_and_unload), or save them alone (PeftModel.save_pretrained)"
            )
        away = next((name for name, value in self.state.items() if value.is_meta), None)
        if away is not None:
            raise MoefyError(
                f"{self.folder}: {away} is offloaded; load the model without offloading to save it"
            )

    def untied(self, source: Checkpoint, on_disk: Mapping[str, str]) -> bool:
        """Whether a tensor that the files have no room for, since it was tied, is one of its own."""
        there, ties = set(on_disk.values()), ties_of(self.stock)
        before = ties_of(meta_model(read_config(source))) if self.config_changed else ties
        return any(
            (one in there) != (other in there)
            and (one not in ties or not torch.equal(self.value(one), self.value(other)))
            for one, other in before.items()
        )

    def other_layout(self, files: Checkpoint, on_disk: Mapping[str, str]) -> bool:
        """Whether the files have no room for the tensors as they are."""
        return self.untied(files, on_disk) or any(
            files.tensors[disk].shape != tuple(self.shape(name)) for disk, name in on_disk.items()
        )

    def shape(self, name: str) -> torch.Size:
        return (self.stock.state_dict() if name in self.owners else self.state)[name].shape

    @property
    def config_changed(self) -> bool:
        return self.model.config.to_dict() != self.carried.settings[0]

    @property
    def generation_changed(self) -> bool:
        return generation_settings(self.model) != self.carried.settings[1]


def ties_of(model: PreTrainedModel) -> dict[str, str]:
    """Tensors of a model by what they are tied to."""
    return getattr(model, "all_tied_weights_keys", None) or {}


def generation_settings(model: PreTrainedModel) -> dict[str, Any] | None:
    """What the generation config of a model says, if it has one."""
    found = getattr(model, "generation_config", None)
    return None if found is None else copy.deepcopy(found.to_dict())


def save(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    state: Mapping[str, Tensor] | None = None,
    max_shard_size: int | str | None = None,
) -> None:
    """Write a model that `load` gave, in the same form: `load`, `save`, `load` changes no byte.

    Tensors whose values have changed since are overwritten, and `weights_modified` then says so; matrices
    that are stored in few bits are rounded anew where they have. A changed config is written too. Where
    tensors are new or of another shape, and with `max_shard_size`, the weight files are made anew. `state`
    is what to save instead of the model's tensors, by the model's names. An adapter whose weights have
    changed is refused: convert it in full form to train it.

    Raises `MoefyError`, and leaves nothing, for a model with an adapter that is not merged and for a
    folder that holds other weights.
    """
    folder = Path(folder)
    saved = _Saved(model, model.state_dict() if state is None else state, folder)
    saved.refuse_other_modules()
    checkpoint, on_disk = saved.carried.checkpoint, saved.on_disk
    artefact, codes = with_routing_of(model, state), saved.changed_codes
    artefact = replace(artefact, tensors={**artefact.tensors, **codes})
    with _appearing(folder) as work:
        if saved.adapter:
            _refuse_changes(saved, checkpoint, on_disk)
            write_side_files(work, replace(artefact, sha256={}))
            return
        other_layout = saved.other_layout(checkpoint, on_disk)
        if other_layout or max_shard_size is not None:
            changed = _write_anew(saved, checkpoint, on_disk, work, max_shard_size) or other_layout
        else:
            changed = _write_over(saved, checkpoint, on_disk, work)
        files = Checkpoint.open(work)
        flag = artefact.weights_modified or changed or bool(codes)
        write_side_files(work, replace(artefact, weights_modified=flag, sha256=files.hashes()))


def _refuse_changes(saved: _Saved, base: Checkpoint, on_disk: Mapping[str, str]) -> None:
    """Raise `MoefyError` where an adapter is no longer one of its base."""
    why = f"{saved.folder}: {{}} has changed; an adapter cannot hold that, convert in full form"
    if saved.config_changed or saved.generation_changed:
        raise MoefyError(why.format("the config"))
    if saved.other_layout(base, on_disk):
        raise MoefyError(why.format("the shape or the tie of a tensor"))
    if saved.changed_codes:
        raise MoefyError(why.format(f"the rounding of {min(saved.changed_codes)}"))
    for disk, name in on_disk.items():
        site = saved.owners.get(name)
        if site is not None and site.index in saved.codes and name.endswith(".weight"):
            continue  # rounded: the side file holds it, not the base
        if _differs(base, disk, saved.value(name)):
            raise MoefyError(f"{saved.folder}: {name} has changed; an adapter cannot hold weights")


def _differs(files: Checkpoint, disk: str, now: Tensor) -> bool:
    before = files.read(disk)
    return not torch.equal(now.cpu().to(before.dtype), before)


def _write_over(saved: _Saved, source: Checkpoint, on_disk: Mapping[str, str], work: Path) -> bool:
    """Copy the files and overwrite the tensors that have changed; whether any has."""
    copy_folder(source.folder, work, skip=_left_behind(source.folder, saved.folder))
    _write_configs(saved, source, work)
    files, changed = Checkpoint.open(work), False
    for disk, name in on_disk.items():
        now = saved.value(name)
        if _differs(files, disk, now):
            changed = True
            overwrite(files.tensors[disk], now.cpu().to(files.dtype_of(disk)))
    return changed


def _write_anew(
    saved: _Saved,
    source: Checkpoint,
    on_disk: Mapping[str, str],
    work: Path,
    max_shard_size: int | str | None,
) -> bool:
    """Have the stock model write its files with these tensors; whether any has changed."""
    skip = {*source.weights, INDEX, SINGLE, *_CONFIGS, *_left_behind(source.folder, saved.folder)}
    copy_folder(source.folder, work, skip=skip)
    dtypes = {name: source.dtype_of(disk) for disk, name in on_disk.items()}
    stock, state = saved.stock, {}
    for name in stock.state_dict():
        if name in saved.owners or name in saved.state:
            value = saved.value(name)
            usual = getattr(stock.config, "dtype", None) or value.dtype
            dtype = dtypes.get(name, usual if value.is_floating_point() else value.dtype)
            state[name] = value.cpu().to(dtype)
    _share_ties(saved, state)
    if saved.model.can_generate():
        stock.generation_config = saved.model.generation_config
    with _saying(saved.folder):
        stock.save_pretrained(work, state_dict=state, max_shard_size=max_shard_size or _SHARD)
    pairs = on_disk.items()
    return any(
        source.tensors[disk].shape != tuple(state[name].shape)
        or _differs(source, disk, state[name])
        for disk, name in pairs
        if name in state
    )


def _share_ties(saved: _Saved, state: dict[str, Tensor]) -> None:
    """Let what is one tensor in the model be one here, so that it is written once."""
    seen: dict[tuple[int, torch.Size], str] = {}
    for name in state:
        if name in saved.state and name not in saved.owners and saved.state[name].numel():
            key = (saved.state[name].data_ptr(), saved.state[name].shape)
            state[name] = state[seen.setdefault(key, name)]


def _write_configs(saved: _Saved, source: Checkpoint, work: Path) -> None:
    """Write those of the two config files that say something else than they did."""
    with _saying(saved.folder):
        if saved.config_changed:
            config = copy.deepcopy(saved.model.config)
            config.dtype = source.config.get("dtype", source.config.get("torch_dtype"))
            config.architectures = [type(saved.model).__name__]
            config.save_pretrained(work)
        if saved.generation_changed:
            model: Any = saved.model
            model.generation_config.save_pretrained(work)


@contextmanager
def _saying(folder: Path) -> Iterator[None]:
    """One line for what transformers does not write."""
    try:
        yield
    except (ValueError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MoefyError(f"{folder}: transformers does not save this model ({reason})") from error


def _left_behind(source: Path, target: Path) -> set[str]:
    """Files in `source` that are other models: checkpoints of a training run, the target itself."""
    inner = {file.parent for file in source.rglob(META)} - {source}
    inner |= {place for place in source.glob("checkpoint-*") if place.is_dir()}
    if target.resolve() != source.resolve() and target.resolve().is_relative_to(source.resolve()):
        inner.add(source / target.resolve().relative_to(source.resolve()))
    return {
        file.relative_to(source).as_posix()
        for file in visible_files(source)
        if inner.intersection(file.parents)
    }


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A hidden folder whose files come to lie in `folder` at the end, none of them after an error."""
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: is a file; give the name of a folder")
    work = folder.absolute().parent / f".{folder.absolute().name}.moefy-saving"
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        yield work
        if folder.exists():
            _move_into(work, folder)
        else:
            work.replace(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _move_into(work: Path, folder: Path) -> None:
    """Put finished files into a folder; weights of a model that was saved there before make room."""
    new = {file.relative_to(work).as_posix() for file in visible_files(work)}
    old = {name for name in (INDEX, SINGLE, SIDE) if (folder / name).exists()} | {
        file.name for file in folder.glob("*.safetensors")
    }
    stale = old - new
    if stale:
        known: set[str] = set()
        if is_artefact(folder):
            known = {*read_artefact(folder, verify=False).sha256, INDEX, SIDE}
        if not stale <= known:
            raise OutputError(
                f"{folder}: holds weights of another model ({min(stale - known)}); choose another folder"
            )
    for name in sorted(new, key=lambda name: name == META):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).replace(folder / name)
    for name in stale:
        (folder / name).unlink()


def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str | None = None,
    **options: Any,
) -> None:
    """`save` under the name that transformers has for it, with its arguments.

    Adapters that were added to the model itself (`add_adapter`) are written alone, as transformers
    does. Nothing is uploaded: `model.push_to_hub(name)` saves and uploads.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        state = None if state_dict is None else dict(state_dict)
        PreTrainedModel.save_pretrained(
            model, save_directory, is_main_process, state, push_to_hub, **options
        )
        return
    if push_to_hub:
        raise MoefyError(
            f"{save_directory}: push_to_hub=True: nothing is uploaded here; call model.push_to_hub(name)"
        )
    for name, value in options.items():
        if value not in _HARMLESS.get(name, ()):
            raise MoefyError(
                f"{save_directory}: {name}={value!r} is not done for a model in experts; leave it out"
            )
    if is_main_process:
        save(model, save_directory, state=state_dict, max_shard_size=max_shard_size)
