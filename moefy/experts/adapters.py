"""LoRA adapters of peft and models that were made of a moefied folder.

    model = load("out", adapter="lora")      # an adapter of the source, or of the folder: merged

An adapter is put onto the stock model before its MLPs become experts, its numbers moved to where the neurons
lie if it was trained on the source, and merged. Routers stay as they were fitted, on the weights without it.
"""

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moefy.errors import CheckpointError, MoefyError
from moefy.models.artefact import ADAPTER, Artefact
from moefy.models.lora import CONFIG, Lora, lies_as, mlp_paths, touches
from moefy.run.reading import reason

_LEARNT = ("lora_", "modules_to_save", "trainable_tokens")
"""What names of an adapter's own parameters have in them."""


def merge_adapter(
    model: PreTrainedModel, artefact: Artefact, folder: Path, adapter: str | Path
) -> PreTrainedModel:
    """Merge an adapter into the stock model of the artefact `folder`, its neurons as they lie there.

    Gives back the model. Raises `CheckpointError` for an adapter that is not LoRA or that was trained on
    another model, and `MoefyError` for a model whose weights are not all in memory, and where it changes
    weights that are rounded.
    """
    away = next((name for name, value in model.named_parameters() if value.is_meta), None)
    if away is not None:
        raise MoefyError(
            f"{adapter}: {away} is offloaded by device_map, and an adapter is merged into weights that are in "
            "memory; give a device_map that keeps every layer on a device"
        )
    lora = Lora.open(adapter)
    if touches(mlp_paths(model), lora.tensors):
        if artefact.rounded is not None:
            raise MoefyError(
                f"{adapter}: changes the weights of MLPs, and {folder} holds them in {artefact.rounded} bits; "
                "merge it into the source with peft and convert that"
            )
        place = lies_as(lora.base, lora.mark, folder, artefact)
        in_source, source = artefact.form == ADAPTER, artefact.source["name"]
        if place is None:
            raise CheckpointError(
                f"{adapter}: names '{lora.base}' as its base, {folder} was made from '{source}', so where its "
                f"neurons lie is not known; if that is the same model, write '{source}' as "
                f"base_model_name_or_path into its {CONFIG}"
            )
        if in_source and place != "source":
            raise CheckpointError(
                f"{adapter}: is for a folder whose neurons lie in expert order ({lora.base}); those of "
                f"{folder} lie as in '{source}': give the adapter of that model"
            )
        if place == "source" and not in_source:
            lora = lora.moved(model, artefact)
    return _merged(model, lora)


def _merged(model: PreTrainedModel, lora: Lora) -> PreTrainedModel:
    """The model with the adapter in its weights, as peft puts it there."""
    try:
        import peft
    except ImportError:
        raise MoefyError("adapter: adapters need peft: pip install moefy[train]") from None
    names = [field.name for field in fields(peft.LoraConfig)]
    settings = {name: lora.settings[name] for name in names if name in lora.settings}
    try:
        wrapped: Any = peft.PeftModel(model, peft.LoraConfig(**settings))
        result: Any = peft.set_peft_model_state_dict(wrapped, dict(lora.tensors))
        missing = [n for n in result.missing_keys if any(part in n for part in _LEARNT)]
        if missing or result.unexpected_keys:
            raise ValueError(f"keys: {[*missing, *result.unexpected_keys][0]} is on one side alone")
        merged: PreTrainedModel = wrapped.merge_and_unload(safe_merge=True)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{lora.folder}: peft does not merge this adapter ({reason(error)}); put it onto the stock model "
            "as peft does, moefy.open_model(folder, dense=True)"
        ) from error
    vars(merged).pop("peft_config", None)
    merged.requires_grad_(True)
    return merged


def guard(model: PreTrainedModel, artefact: Artefact, folder: Path) -> None:
    """Have the stock model of the artefact `folder` refuse adapters whose neurons lie otherwise."""
    if artefact.form != ADAPTER:
        hook = partial(_refuse_foreign, artefact, folder, mlp_paths(model))
        model.register_load_state_dict_pre_hook(hook)


def _refuse_foreign(
    artefact: Artefact,
    folder: Path,
    paths: tuple[str, ...],
    model: nn.Module,
    state: dict[str, Any],
    prefix: str,
    *_: Any,
) -> None:
    """Before tensors are loaded: raise `CheckpointError` where they are of an adapter of other neurons."""
    for name, config in getattr(model, "peft_config", {}).items():
        own = [key.removeprefix(prefix) for key in state if f".{name}" in key]
        base = getattr(config, "base_model_name_or_path", None) or ""
        if touches(paths, own) and lies_as(base, None, folder, artefact) != "folder":
            raise CheckpointError(
                f"adapter '{name}': was trained on '{base}', and the neurons of {folder} lie otherwise than "
                f"there; run moefy permute-adapter ADAPTER {folder} NEW and put NEW onto it (for an adapter of "
                "this very folder that has moved: write where it is as base_model_name_or_path into its "
                f"{CONFIG})"
            )
