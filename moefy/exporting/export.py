"""Write a moefied checkpoint so that nothing needs moefy any more.

    export("moefied", "out", to="mixtral")

`mixtral`, `qwen2_moe` and `qwen3_moe` are stock mixture-of-experts architectures, which serving
engines run; `dense` is the source's own architecture with its neurons in expert order. The result
is loaded with stock transformers and compared before it appears under its name. `gguf` is the first
of these that fits, as one file.

Shapes: E routed experts, F neurons per expert, K experts that run.
"""

import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel

from moefy.errors import MoefyError, UnsupportedModel
from moefy.experts.entries import check_artefact
from moefy.exporting.card import export_card
from moefy.exporting.targets import (
    GGUF,
    Target,
    check,
    config_json,
    find_target,
    native_target,
    stock_config,
    warnings,
)
from moefy.exporting.tensors import Source, plan_tensors
from moefy.exporting.verification import verification_batches, verify, verify_dense
from moefy.exporting.writer import write_shards
from moefy.models.artefact import ADAPTER, META, SIDE, Artefact, open_artefact
from moefy.models.checkpoint import INDEX, Checkpoint, copy_folder
from moefy.models.config import read_config
from moefy.models.heads import head_sites
from moefy.models.locate import Site, meta_model, sites
from moefy.models.reorder import reorder
from moefy.run.console import Reporter
from moefy.run.output import OutputFolder

CARD, SOURCE_CARD = "README.md", "README.source.md"
_SIDE_FILES = frozenset({META, SIDE, "records.json"})
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


def export(
    folder: str | Path,
    out: str | Path,
    *,
    to: str,
    overwrite: bool = False,
    quantize: str | None = None,
) -> dict[str, Any]:
    """Write the artefact `folder` into `out` as the stock architecture `to`, as `dense` or `gguf`.

    `gguf` writes a file, takes stock models too, and `quantize="q8_0"` rounds its matrices to 8
    bits. Returns the record: `architecture`, `out`, `warnings` and what was measured. Raises
    `RecipeError` or `UnsupportedModel` where the target cannot hold the model, and `MoefyError`
    where the result is not the same function; `out` then is as it was.
    """
    if to == GGUF:
        return _gguf(Path(folder), Path(out), quantize, overwrite)
    if quantize is not None:
        raise MoefyError(
            f"quantize={quantize}: {to} keeps the dtype of its source; export --to gguf"
        )
    folder, target = Path(folder), find_target(to)
    artefact, checkpoint = open_artefact(folder)
    config = read_config(checkpoint)
    meta = meta_model(config)
    found = sites(meta)
    check_artefact(artefact, found, head_sites(meta) if artefact.heads else ())
    if target is not None:
        check(target, artefact, found, config)
        if not type(meta).__name__.endswith("ForCausalLM"):
            raise UnsupportedModel(
                f"{folder}: {type(meta).__name__}; only models with a language-model head have "
                "stock counterparts here, export --to dense"
            )
    output = OutputFolder(Path(out))
    # What a killed export left behind is worth nothing: start again over it.
    if output.begin(f"export {to}", resume=not overwrite, overwrite=overwrite):
        shutil.rmtree(output.work / "model", ignore_errors=True)
    finished = output.work / "model"
    finished.mkdir()
    try:
        with output.full_disk():
            if target is None:
                record = _dense(folder, artefact, checkpoint, found, output, finished)
            else:
                record = _stock(folder, artefact, checkpoint, meta, found, target, output, finished)
    except BaseException:
        shutil.rmtree(output.work, ignore_errors=True)
        raise
    output.commit(finished)
    return {"kind": "export", "to": to, "out": str(out), **record}


def _gguf(folder: Path, out: Path, quantize: str | None, overwrite: bool) -> dict[str, Any]:
    """Write a GGUF of the artefact's stock counterpart, or of a model that is stock already."""
    from moefy.exporting.gguf.write import check_request, write_gguf  # needs the extra `gguf`

    check_request(out, quantize=quantize, overwrite=overwrite)
    options: dict[str, Any] = {"quantize": quantize, "overwrite": overwrite}
    if not (folder / META).exists():
        return {"kind": "export", "to": GGUF, **write_gguf(folder, out, **options)}
    artefact, checkpoint = open_artefact(folder)
    config = read_config(checkpoint)
    to = native_target(config, shared=any(entry.shared for entry in artefact.layers))
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
        record = export(folder, Path(work) / "stock", to=to)
        made = write_gguf(record["out"], out, name=artefact.source["name"], **options)
    said = [*record["warnings"], *made["warnings"]]
    return {**record, **made, "to": GGUF, "native": to, "warnings": said}


def _stock(
    folder: Path,
    artefact: Artefact,
    checkpoint: Checkpoint,
    meta: PreTrainedModel,
    found: list[Site],
    target: Target,
    output: OutputFolder,
    finished: Path,
) -> dict[str, Any]:
    """Write and verify a mixture of experts."""
    entry, config = artefact.layers[0], meta.config
    source = Source(checkpoint, meta, found, artefact)
    stored = _name(source.spec(f"{found[0].path('down')}.weight")[1])
    loaded_as = _name(config.dtype) if isinstance(config.dtype, torch.dtype) else stored
    stock = stock_config(target, entry, config, tied=source.tied, dtype=loaded_as)
    planned = plan_tensors(target, source, found, artefact, meta_model(stock))
    output.need(sum(tensor.bytes for tensor in planned))
    _copy_files(checkpoint.folder, finished)
    write_shards(finished, planned)
    text = json.dumps(config_json(stock), indent=2, sort_keys=True)
    (finished / "config.json").write_text(text + "\n", encoding="utf-8")

    k, size = entry.selection["k"], entry.neurons // entry.experts
    batches = verification_batches(checkpoint, config.vocab_size)
    exact = stored == "float32" or k & (k - 1) == 0
    record = {
        "architecture": target.architecture,
        "experts": entry.experts - entry.shared,
        "shared_experts": entry.shared,
        "active": k,
        "expert_size": size,
        "eps": sorted({layer.selection["eps"] for layer in artefact.layers}),
        "tied_embeddings": source.tied,
        "dtype": stored,
        "bytes": sum(tensor.bytes for tensor in planned),
        "verification": verify(folder, finished, batches, exact=exact, expert_size=size),
        "warnings": warnings(target, entry, config, stored),
    }
    (finished / CARD).write_text(export_card(artefact.source["name"], record), encoding="utf-8")
    return record


def _dense(
    folder: Path,
    artefact: Artefact,
    checkpoint: Checkpoint,
    found: list[Site],
    output: OutputFolder,
    finished: Path,
) -> dict[str, Any]:
    """Write and verify the source's own architecture, its neurons in expert order."""
    output.need(checkpoint.bytes)
    adapter = artefact.form == ADAPTER
    weights = {*checkpoint.weights} if adapter else {*_SIDE_FILES, CARD}
    copy_folder(checkpoint.folder, finished, skip=weights)
    if not adapter and (finished / SOURCE_CARD).exists():
        shutil.move(finished / SOURCE_CARD, finished / CARD)
    if adapter:
        reorder(checkpoint, finished, found, artefact, Reporter(quiet=True))
    config = read_config(checkpoint)
    record: dict[str, Any] = {
        "architecture": type(meta_model(config)).__name__,
        "bytes": checkpoint.bytes,
        "warnings": [],
    }
    if found[0].family.kind == "decoder":
        batches = verification_batches(checkpoint, config.get_text_config().vocab_size)
        record["relative_error"] = verify_dense(folder, finished, batches)
    return record


def _copy_files(source: Path, finished: Path) -> None:
    """Tokenizer, generation settings, licence: all that is neither weights nor moefy's."""
    skip = {*_SIDE_FILES, "config.json", INDEX, CARD}
    for file in source.rglob("*"):
        if file.suffix in _WEIGHTS or file.name.endswith(".index.json"):
            skip.add(file.relative_to(source).as_posix())
    copy_folder(source, finished, skip=skip)
    if not (source / META).exists() and (source / CARD).is_file():
        shutil.copyfile(source / CARD, finished / SOURCE_CARD)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
