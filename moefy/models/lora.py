"""LoRA adapters of peft, and which neurons their numbers belong to.

A folder that `convert` wrote in full form holds the source's neurons in expert order. An adapter that was
trained on the source belongs to neurons by their place in the source: put onto such a folder it adds to
others, and no shape tells. Here its numbers are moved as the weights were.

Of a map whose outputs are neurons (gate, up) the rows of B, the bias of B and the magnitudes of DoRA have a
neuron axis; of one that reads neurons (down) the columns of A. Weights and biases that were trained in full
are moved like those of the model.

Shapes: N neurons, R rank.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from moefy.errors import CheckpointError
from moefy.models.artefact import ADAPTER, Artefact, is_artefact, open_artefact, read_artefact
from moefy.models.checkpoint import Checkpoint, is_there, read_header
from moefy.models.config import read_config
from moefy.models.locate import Site, meta_model, permute, sites
from moefy.run.arguments import checked
from moefy.run.folder import write_whole
from moefy.run.job import Job
from moefy.run.reading import read_json, reading

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MARK = "moefy_neurons"
"""In the header of the weights: `order_of` the artefact whose neurons they belong to."""
_PREFIX = "base_model.model."
_COPIED = {".json", ".txt", ".model", ".jinja", ".tiktoken"}
"""Files beside an adapter that texts are read with. The state of an optimiser has neurons too, and stays."""
_TRAINERS = {"trainer_state.json"}
_SETTINGS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "megatron_core", "modules_to_save",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config",
    "target_modules", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
})  # fmt: skip
"""Settings of peft 0.21 that may have any value: with them neurons are moved as the head of this file says."""
_STARTS = (True, False, "gaussian", "eva", "orthogonal", None)
"""Values of `init_lora_weights` that leave the weights of the base as they are."""
_ROWS = re.compile(r"lora_B\.(weight|bias)|lora_magnitude_vector(\.weight)?")
_WHOLE = re.compile(r"(?:base_layer\.)?(weight|bias)")


@dataclass(frozen=True)
class Lora:
    """The folder of an adapter."""

    folder: Path
    settings: dict[str, Any]
    """What `adapter_config.json` holds."""
    tensors: dict[str, Tensor]
    mark: str | None
    """`order_of` the artefact that its numbers were moved for, if they were."""

    @classmethod
    def open(cls, folder: str | Path) -> "Lora":
        """Read an adapter. Raises `CheckpointError` for anything but LoRA whose numbers belong to neurons."""
        folder = Path(folder)
        file, weights = folder / CONFIG, folder / WEIGHTS
        if not file.is_file():
            raise CheckpointError(f"{folder}: no {CONFIG}; give the folder of an adapter of peft")
        settings = read_json(file)
        if not isinstance(settings, dict):
            raise CheckpointError(f"{file}: must be keys and values; save the adapter again")
        _refuse_settings(file, settings)
        if not weights.is_file():
            raise CheckpointError(
                f"{folder}: no {WEIGHTS}; save the adapter with peft's save_pretrained, which writes it"
            )
        read_header(weights)
        with reading(weights), safe_open(weights, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            mark = (opened.metadata() or {}).get(MARK)
        return cls(folder, settings, tensors, mark)

    @property
    def base(self) -> str:
        """The model that it was trained on, as it says itself; empty if it does not."""
        name = self.settings.get("base_model_name_or_path")
        return name if isinstance(name, str) else ""

    def moved(self, model: PreTrainedModel, artefact: Artefact) -> "Lora":
        """The same adapter for the neurons of `artefact`, whose stock model `model` is.

        Raises `CheckpointError` for a tensor of an MLP, or of a layer, that is not known here.
        """
        owners = _owners(model)
        _refuse_other_layers(self.folder, owners, artefact)
        layers = {name for name, _ in model.named_modules() if re.search(r"\.\d+$", name)}
        tensors = {}
        for key, tensor in self.tensors.items():
            name = key.removeprefix(_PREFIX)
            path = next((path for path in owners if name.startswith(f"{path}.")), None)
            if path is None:
                self._refuse_unknown(name, layers, model)
                tensors[key] = tensor
                continue
            site, role = owners[path]
            order_N, part = artefact.permutation(site.index), name.removeprefix(f"{path}.")
            moved = _moved(site, role, part, tensor, order_N)
            if moved is None:
                raise CheckpointError(
                    f"{self.folder / WEIGHTS}: {key} {list(tensor.shape)} is no tensor of LoRA for "
                    f"{site.neurons} neurons and width {site.width}; merge the adapter into its base and "
                    "convert the result"
                )
            tensors[key] = moved
        return replace(self, tensors=tensors, mark=order_of(artefact))

    def _refuse_unknown(self, name: str, layers: set[str], model: PreTrainedModel) -> None:
        """Raise `CheckpointError` for a numbered layer that the model does not have."""
        numbered = re.match(r".*\.\d+(?=\.)", name)
        prefix = f"{model.base_model_prefix}."
        if numbered is not None and not layers & {
            numbered.group(), prefix + numbered.group(), numbered.group().removeprefix(prefix)
        }:  # fmt: skip
            raise CheckpointError(
                f"{self.folder / WEIGHTS}: {name} is of a layer that {type(model).__name__} does not have; "
                "give an adapter of the model that the folder was made from"
            )

    def write(self, folder: Path) -> None:
        """Write both files; equal adapters give equal bytes."""
        header = {"format": "pt"} | ({} if self.mark is None else {MARK: self.mark})
        tensors = {name: self.tensors[name].contiguous() for name in sorted(self.tensors)}
        write_whole(folder / WEIGHTS, save(tensors, header))
        text = json.dumps(self.settings, indent=2, sort_keys=True)
        write_whole(folder / CONFIG, text + "\n")


def order_of(artefact: Artefact) -> str:
    """The order of an artefact's neurons as 64 hex digits."""
    orders = [artefact.permutation(index) for index in range(len(artefact.layers))]
    return hashlib.sha256(b"".join(o.to(torch.int32).numpy().tobytes() for o in orders)).hexdigest()


def mlp_paths(model: PreTrainedModel) -> tuple[str, ...]:
    """The linear maps of the MLPs by the paths that an adapter may have for them."""
    return tuple(_owners(model))


def touches(paths: Iterable[str], names: Iterable[str]) -> bool:
    """Whether any of an adapter's tensors is of one of the linear maps at `paths`."""
    starts = tuple(f"{path}." for path in paths)
    return any(name.removeprefix(_PREFIX).startswith(starts) for name in names)


def lies_as(base: str, mark: str | None, folder: Path, artefact: Artefact) -> str | None:
    """Whether an adapter's neurons lie as in the `"source"` of an artefact or as in its `"folder"`.

    `base` is the model that the adapter names and `mark` what its header says. None if they do not tell.
    Raises `CheckpointError` for an adapter of another model.
    """
    order = order_of(artefact)
    if mark is not None:
        if mark != order:
            raise CheckpointError(
                f"{folder}: the adapter was moved for another folder's neurons ({base}); run moefy "
                "permute-adapter on the adapter of the source"
            )
        return "folder"
    if base and is_there(Path(base)):
        if is_artefact(base):
            other = read_artefact(base, verify=False)
            same = other.source["sha256"] == artefact.source["sha256"]
            if same and other.form != ADAPTER and order_of(other) == order:
                return "folder"
        elif Checkpoint.open(base).hashes() == artefact.source["sha256"]:
            return "source"
        raise CheckpointError(
            f"{folder}: made from '{artefact.source['name']}', and the adapter from {base}, which holds "
            f"other files; if it is the same model all the same, write '{artefact.source['name']}' as "
            f"base_model_name_or_path into its {CONFIG}"
        )
    known = str(artefact.source["name"])
    return "source" if base and Path(base).name == Path(known).name else None


@checked
def permute_adapter(
    adapter: str | Path, model: str | Path, out: str | Path, *, overwrite: bool = False
) -> dict[str, Any]:
    """Write the LoRA adapter `adapter` of a dense model for the artefact `model` that was made from it.

    `out` is an adapter of the folder `model`: plain transformers and peft load both together, and
    `moefy.load(model, adapter=out)` merges it. Returns the record: how many tensors have a neuron axis, and
    notes. Raises `CheckpointError` for other adapters than LoRA, for what cannot be moved, for an adapter
    of another model and for one that lies so already.
    """
    adapter, folder = Path(adapter), Path(model)
    job = Job(
        "permute-adapter", out, resume=None, overwrite=overwrite, quiet=True, reads=[adapter, folder]
    )  # fmt: skip
    artefact, checkpoint = open_artefact(folder, verify=False)
    if artefact.form == ADAPTER:
        raise CheckpointError(
            f"{folder}: its weights stayed in '{artefact.source['name']}', in their order; "
            f"moefy.load({str(folder)!r}, adapter={str(adapter)!r}) takes the adapter as it is"
        )
    lora = Lora.open(adapter)
    place = lies_as(lora.base, lora.mark, folder, artefact)
    if place == "folder":
        raise CheckpointError(f"{adapter}: is an adapter of {folder} already; use it as it is")
    stock = meta_model(read_config(checkpoint))
    moved = lora.moved(stock, artefact)
    changed = sum(not torch.equal(moved.tensors[name], lora.tensors[name]) for name in lora.tensors)
    settings = lora.settings | {"base_model_name_or_path": str(folder.resolve()), "revision": None}
    notes = _notes(lora, artefact, folder, place)
    with job.running():
        job.finished.mkdir()
        for file in sorted(adapter.iterdir()):
            if file.suffix in _COPIED and file.name not in {CONFIG, *_TRAINERS} and file.is_file():
                write_whole(job.finished / file.name, file.read_bytes())
        replace(moved, settings=settings).write(job.finished)
        card = _CARD.format(base=json.dumps(folder.name), adapter=adapter.name, folder=folder.name)
        write_whole(job.finished / "README.md", card)
    job.commit()
    return {"kind": "permute-adapter", "out": str(out), "tensors": len(lora.tensors),
            "moved": changed, "notes": notes}  # fmt: skip


def _notes(lora: Lora, artefact: Artefact, folder: Path, place: str | None) -> list[str]:
    """What a user should know of an adapter that is moved all the same."""
    notes = []
    if place is None:
        notes.append(
            f"the adapter names '{lora.base}' as its base, {folder} was made from "
            f"'{artefact.source['name']}'; it was taken for the same model"
        )
    if artefact.weights_modified:
        notes.append(f"the weights of {folder} were trained since it was made from the source")
    return notes


def _refuse_settings(file: Path, settings: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for an adapter that is more, or other, than LoRA."""
    kind = settings.get("peft_type")
    again = "merge the adapter into its base and convert the result"
    if kind != "LORA":
        raise CheckpointError(f"{file}: peft_type {kind!r}, only LORA can be moved; {again}")
    for name, value in settings.items():
        if name not in _SETTINGS and value not in (None, False, 0, "", [], {}):
            raise CheckpointError(
                f"{file}: {name} is set, and where its numbers belong is not known here; {again}"
            )
    start = settings.get("init_lora_weights")
    if start not in _STARTS:
        raise CheckpointError(
            f"{file}: init_lora_weights {start!r} changes the base too; save the adapter with "
            "path_initial_model_for_weight_conversion, which makes plain LoRA of it"
        )


def _owners(model: PreTrainedModel) -> dict[str, tuple[Site, str]]:
    """The MLP and the role of every linear map of the MLPs, by the paths that an adapter may have for it:
    with the prefix of the base model and without, as it was trained on one or the other."""
    prefix = f"{model.base_model_prefix}."
    owners = {}
    for site in sites(model):
        for role in (
            ("gate", "up", "down") if site.gated and not site.family.fused else ("up", "down")
        ):
            path = site.path(role)
            for name in (path, prefix + path, path.removeprefix(prefix)):
                owners[name] = (site, role)
    return owners


def _refuse_other_layers(
    folder: Path, owners: Mapping[str, tuple[Site, str]], artefact: Artefact
) -> None:
    """Raise `CheckpointError` where an artefact has other MLPs than its own config says."""
    own = {site.index: (site.layer, site.neurons) for site, _ in owners.values()}
    if own != {i: (entry.layer, entry.neurons) for i, entry in enumerate(artefact.layers)}:
        raise CheckpointError(
            f"{folder}: config.json and moefy.json of the moefied folder are of different models; convert "
            "the source again"
        )


def _moved(site: Site, role: str, part: str, tensor: Tensor, order_N: Tensor) -> Tensor | None:
    """A tensor of one linear map in another order of neurons; None if it is none that is known."""
    neurons = site.neurons * (2 if site.family.fused and role == "up" else 1)
    inputs, outputs = (neurons, site.width) if role == "down" else (site.width, neurons)
    if whole := _WHOLE.fullmatch(part):
        shape = [inputs, outputs] if site.family.transposed else [outputs, inputs]
        name = site.parameter(role, whole[1])
        wanted = shape if whole[1] == "weight" else [outputs]
        known = name in site.parameters and list(tensor.shape) == wanted
        return permute(site, name, tensor, order_N) if known else None
    if part == "lora_A.weight" and tensor.ndim == 2 and tensor.shape[1] == inputs:
        return tensor.index_select(1, order_N) if role == "down" else tensor
    if not _ROWS.fullmatch(part) or tensor.ndim == 0 or tensor.shape[0] != outputs:
        return None
    if role == "down":
        return tensor
    if neurons != site.neurons:
        order_N = torch.cat([order_N, order_N + site.neurons])
    return tensor.index_select(0, order_N)


_CARD = """---
library_name: peft
base_model: {base}
---
# {adapter}, for {folder}

A LoRA adapter that moefy has moved to the neurons of `{folder}`, where they lie in expert order. It
belongs to that folder alone: on the model that it was trained on it is wrong.
"""
