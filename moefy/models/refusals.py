"""Model folders that would convert into something else than they are: refused before a weight is read.

What a folder says about itself in its files, its `config.json` and the headers of its weights is enough to
tell. Every refusal names the folder, what was found there and the remedy.
"""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel

from moefy.errors import CheckpointError, UnsupportedModel
from moefy.models.answers import answer_of
from moefy.models.families import FAMILIES

logger = logging.getLogger(__name__)

POINTER = b"version https://git-lfs"
_ADAPTER = "adapter_config.json"
_MERGE = "merge it first (peft: AutoPeftModel.from_pretrained, merge_and_unload, save_pretrained)"
_QUANTIZED_FILES = ("quant_config.json", "quantize_config.json")
_CODES = (
    ".qweight", ".qzeros", ".g_idx", ".weight_packed", ".weight_scale", ".weight_scale_inv",
    ".weight_zero_point", ".absmax", ".quant_map", ".SCB",
)  # fmt: skip
"""How the names of tensors end that hold codes, or what turns codes into numbers."""
_NUMBERS = ("F64", "F32", "F16", "BF16")


def refuse_adapter(folder: Path) -> None:
    """Raise `CheckpointError` for an adapter, alone or in one folder with its base.

    transformers would put the second onto whatever it loads from there.
    """
    file = folder / _ADAPTER
    if not file.is_file():
        return
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        base, kind = settings.get("base_model_name_or_path"), settings.get("peft_type", "peft")
    except (ValueError, AttributeError, RecursionError):
        base, kind = None, "peft"
    of = (
        f"a {str(kind)[:40]} adapter of {str(base)[:200] or 'a model'}"
        if base
        else f"a {kind} adapter"
    )
    if (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: holds a model and {of} ({_ADAPTER}), which would be put onto it; {_MERGE}, or "
            "move the adapter to a folder of its own to convert the model without it"
        )
    raise CheckpointError(f"{folder}: {of}, no model; {_MERGE} and give the result")


def refuse_adapted(model: nn.Module) -> None:
    """Raise `CheckpointError` for a model in memory that has adapters beside its weights."""
    if getattr(model, "peft_config", None):
        raise CheckpointError(
            f"{type(model).__name__}: has adapters beside its weights; merge them first "
            "(model.merge_and_unload()) and give what that returns"
        )


def refuse_pointer(file: Path) -> None:
    """Raise `CheckpointError` for a git-lfs pointer that lies where a file should be."""
    try:
        with file.open("rb") as stream:
            start = stream.read(len(POINTER))
    except OSError:
        return  # whoever reads it says so
    if start == POINTER:
        raise CheckpointError(
            f"{file}: is a git-lfs pointer, not the file itself; fetch it, with git lfs pull in "
            f"{file.parent}"
        )


def refuse_quantized(folder: Path, config: Mapping[str, Any], tensors: Iterable[str]) -> None:
    """Raise `CheckpointError` for a checkpoint whose weights are codes."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    keys = ("quantization_config", "compression_config")
    found = next((part[key] for part in parts for key in keys if part.get(key)), None)
    how = "quantized"
    if isinstance(found, dict):
        how = str(found.get("quant_method") or found.get("format") or how)[:40]
        how += next((f", {found[k]} bits" for k in ("bits", "w_bit") if k in found), "")
    elif found is None:
        where = next((name for name in _QUANTIZED_FILES if (folder / name).is_file()), None)
        where = where or next((name for name in tensors if name.endswith(_CODES)), None)
        if where is None:
            return
        how = f"by {where}"
    raise CheckpointError(
        f"{folder}: its weights are quantized ({how}), and experts are not fitted on codes; give the "
        "checkpoint before quantization, or dequantize it (transformers: model.dequantize(), "
        "save_pretrained)"
    )


def refuse_codes(folder: Path, stored: Mapping[str, str], wanted: Iterable[str]) -> None:
    """Raise `CheckpointError` where one of the `wanted` tensors is not `stored` as numbers.

    `stored` gives the dtype of every tensor on disk as its header names it.
    """
    for name in wanted:
        if stored.get(name, "F32") not in _NUMBERS:
            raise CheckpointError(
                f"{folder}: {name} is stored as {stored[name]}, whose scales are not known here; give "
                "a checkpoint in float32, bfloat16 or float16"
            )


def refuse_foreign(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise `UnsupportedModel` for a type of model that only code of the folder knows."""
    kind = config.get("model_type")
    if config.get("auto_map") and not (isinstance(kind, str) and kind in CONFIG_MAPPING):
        raise UnsupportedModel(
            f"{folder}: model_type {kind!r} is one that only the folder's own code knows (auto_map: "
            f"{_code(config)}), and no code of a folder is run; give a model that transformers has"
        )


def notes(config: Mapping[str, Any], model: PreTrainedModel) -> list[str]:
    """What a plan should say of a folder that is converted all the same."""
    if not config.get("auto_map"):
        return []
    return [
        f"note: the folder brings code of its own (auto_map: {_code(config)}), which is not run; "
        f"it is converted as {type(model).__name__} of transformers, and where that code computes "
        "anything else, such as another activation, the result is another model"
    ]


def _code(config: Mapping[str, Any]) -> str:
    """The files of code that a config names, without their endings."""
    names = {str(v).split("--")[-1].split(".")[0] for v in _values(config["auto_map"])}
    return ", ".join(sorted(names))[:200]


def _values(value: Any) -> Iterator[Any]:
    """All values of nested JSON that are neither list, table nor null."""
    open_ = [value]
    while open_:
        one = open_.pop()
        if isinstance(one, dict | list):
            open_ += one.values() if isinstance(one, dict) else one
        elif one is not None:
            yield one


def refuse_pooling(model: PreTrainedModel, folder: Path) -> None:
    """Raise `UnsupportedModel` where a class judges a text by its last token and cannot know which that is."""
    answer = answer_of(model)
    texts = answer.form in ("labels", "values") and model.main_input_name == "input_ids"
    if texts and model.config.get_text_config().pad_token_id is None:
        raise UnsupportedModel(
            f"{folder}: {type(model).__name__} without a pad_token_id in config.json takes one text at a "
            "time; set it to the id of the tokenizer's padding token, or to one that no text has"
        )


def refuse_outputs(model: PreTrainedModel, layers: Iterable[str]) -> None:
    """Raise `UnsupportedModel` where the layers of a model on the meta device, of a type that has no row
    in `FAMILIES`, hand on anything but one stream of hidden states `[B, T, D]`.

    Where it does not run without numbers nothing is known, and nothing refused.
    """
    if model.config.model_type in FAMILIES or model.main_input_name != "input_ids":
        return
    given: dict[str, Any] = {}

    def note(name: str) -> Any:
        return lambda _, __, output: given.setdefault(name, output)

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in layers]
    try:
        ids = torch.zeros(2, 3, dtype=torch.int64, device="meta")
        more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            model(input_ids=ids, **more)
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        # Some models look at numbers, which there are none of; layers that ran are known.
        logger.info("%s does not run without numbers: %s", type(model).__name__, error)
    finally:
        for handle in handles:
            handle.remove()
    for name, output in given.items():
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, Tensor) or first.shape[:-1] != (2, 3):
            what = list(first.shape) if isinstance(first, Tensor) else f"a {type(first).__name__}"
            raise UnsupportedModel(
                f"model_type '{model.config.model_type}': {name} hands on {what}, not one stream of "
                "hidden states [B, T, D]; models of this type cannot be converted"
            )
