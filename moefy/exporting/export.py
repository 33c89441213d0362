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
from dataclasses import dataclass
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
from moefy.run.job import Job

CARD, SOURCE_CARD = "README.md", "README.source.md"
_SIDE_FILES = frozenset({META, SIDE, "records.json"})
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


@dataclass(frozen=True)
class _Moefied:
    """A folder of convert, read as far as its weights."""

    folder: Path
    artefact: Artefact
    checkpoint: Checkpoint
    meta: PreTrainedModel
    sites: list[Site]

    @classmethod
    def read(cls, folder: Path) -> "_Moefied":
        artefact, checkpoint = open_artefact(folder)
        meta = meta_model(read_config(checkpoint))
        found = sites(meta)
        check_artefact(artefact, found, head_sites(meta) if artefact.heads else ())
        return cls(folder, artefact, checkpoint, meta, found)

    def check(self, target: Target) -> None:
        """Raise `RecipeError` or `UnsupportedModel` where the target cannot hold this model."""
        check(target, self.artefact, self.sites, self.meta.config)
        if not type(self.meta).__name__.endswith("ForCausalLM"):
            raise UnsupportedModel(
                f"{self.folder}: {type(self.meta).__name__}; only models with a language-model head have "
                "stock counterparts here, export --to dense"
            )


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
    job = Job("export", out, resume=None, overwrite=overwrite, quiet=True)
    target, source = find_target(to), _Moefied.read(Path(folder))
    if target is not None:
        source.check(target)
    with job.running():
        job.finished.mkdir()
        record = _dense(source, job) if target is None else _stock(source, target, job)
    job.commit()
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


def _stock(moefied: _Moefied, target: Target, job: Job) -> dict[str, Any]:
    """Write and verify a mixture of experts."""
    artefact, checkpoint, meta = moefied.artefact, moefied.checkpoint, moefied.meta
    entry, config, finished = artefact.layers[0], meta.config, job.finished
    source = Source(checkpoint, meta, moefied.sites, artefact)
    stored = _name(source.spec(f"{moefied.sites[0].path('down')}.weight")[1])
    loaded_as = _name(config.dtype) if isinstance(config.dtype, torch.dtype) else stored
    stock = stock_config(target, entry, config, tied=source.tied, dtype=loaded_as)
    planned = plan_tensors(target, source, moefied.sites, artefact, meta_model(stock))
    size = sum(tensor.bytes for tensor in planned)
    job.output.need(size)
    _copy_files(checkpoint.folder, finished)
    write_shards(finished, planned)
    text = json.dumps(config_json(stock), indent=2, sort_keys=True)
    (finished / "config.json").write_text(text + "\n", encoding="utf-8")

    k, expert_size = entry.selection["k"], entry.neurons // entry.experts
    batches = verification_batches(checkpoint, config.vocab_size)
    exact = stored == "float32" or k & (k - 1) == 0
    record = {
        "architecture": target.architecture,
        "experts": entry.experts - entry.shared,
        "shared_experts": entry.shared,
        "active": k,
        "expert_size": expert_size,
        "eps": sorted({layer.selection["eps"] for layer in artefact.layers}),
        "tied_embeddings": source.tied,
        "dtype": stored,
        "bytes": size,
        "verification": verify(
            moefied.folder, finished, batches, exact=exact, expert_size=expert_size
        ),
        "warnings": warnings(target, entry, config, stored),
    }
    (finished / CARD).write_text(export_card(artefact.source["name"], record), encoding="utf-8")
    return record


def _dense(moefied: _Moefied, job: Job) -> dict[str, Any]:
    """Write and verify the source's own architecture, its neurons in expert order."""
    checkpoint, finished = moefied.checkpoint, job.finished
    job.output.need(checkpoint.bytes)
    adapter = moefied.artefact.form == ADAPTER
    weights = {*checkpoint.weights} if adapter else {*_SIDE_FILES, CARD}
    copy_folder(checkpoint.folder, finished, skip=weights)
    if not adapter and (finished / SOURCE_CARD).exists():
        shutil.move(finished / SOURCE_CARD, finished / CARD)
    if adapter:
        reorder(checkpoint, finished, moefied.sites, moefied.artefact, job.report)
    record: dict[str, Any] = {
        "architecture": type(moefied.meta).__name__,
        "bytes": checkpoint.bytes,
        "warnings": [],
    }
    if moefied.sites[0].family.kind == "decoder":
        words = moefied.meta.config.get_text_config().vocab_size
        batches = verification_batches(checkpoint, words)
        record["relative_error"] = verify_dense(moefied.folder, finished, batches)
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
