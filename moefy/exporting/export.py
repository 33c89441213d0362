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

from moefy.errors import MoefyError
from moefy.experts.entries import check_artefact
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
from moefy.exporting.tensors import Exportable, plan_tensors, write_shards
from moefy.exporting.verification import verification_batches, verify, verify_dense
from moefy.models.artefact import ADAPTER, META, SIDE, open_artefact
from moefy.models.checkpoint import INDEX, copy_folder
from moefy.models.config import read_config
from moefy.models.heads import head_sites
from moefy.models.locate import meta_model
from moefy.models.reorder import reorder
from moefy.run.arguments import checked
from moefy.run.folder import OutputFolder
from moefy.run.job import Job

CARD, SOURCE_CARD = "README.md", "README.source.md"
_SIDE_FILES = frozenset({META, SIDE, "records.json"})
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx")


@checked
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
    bits, `"q4_1"` those of MLPs to 4. Returns the record: `architecture`, `out`, `warnings` and what
    was measured. Raises `RecipeError` or `UnsupportedModel` where the target cannot hold the model,
    and `MoefyError` where the result is not the same function; `out` then is as it was.
    """
    folder, out = Path(folder), Path(out)
    if to == GGUF:
        return {"kind": "export", "to": to, **_gguf(folder, out, quantize, overwrite)}
    target = find_target(to)
    if quantize is not None:
        raise MoefyError(
            f"quantize={quantize}: {to} keeps the dtype of its source; export --to gguf"
        )
    job = Job("export", out, resume=None, overwrite=overwrite, quiet=True, reads=[folder])
    artefact, checkpoint = open_artefact(folder)
    job.output.apart_from(checkpoint.folder)
    source = Exportable(checkpoint, artefact)
    check_artefact(artefact, source.sites, head_sites(source.meta) if artefact.heads else ())
    if target is not None:
        check(target, artefact, source.sites, source.meta)
    with job.running():
        job.finished.mkdir()
        if target is None:
            record = _dense(folder, source, job)
        else:
            record = _stock(folder, source, target, job)
    job.commit()
    return {"kind": "export", "to": to, "out": str(out), **record}


def _gguf(folder: Path, out: Path, quantize: str | None, overwrite: bool) -> dict[str, Any]:
    """Write a GGUF of the artefact's stock counterpart, or of a model that is stock already."""
    from moefy.exporting.gguf import check_request, write_gguf  # needs the extra `gguf`

    check_request(folder, out, quantize=quantize, overwrite=overwrite)
    options: dict[str, Any] = {"quantize": quantize, "overwrite": overwrite}
    if not (folder / META).exists():
        return write_gguf(folder, out, **options)
    artefact, checkpoint = open_artefact(folder)
    OutputFolder(out).apart_from(checkpoint.folder)
    shared = any(entry.shared for entry in artefact.layers)
    to = native_target(read_config(checkpoint), shared=shared)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
        record = export(folder, Path(work) / "stock", to=to)
        made = write_gguf(record["out"], out, name=artefact.source["name"], **options)
    cautions = [*record["warnings"], *made["warnings"]]
    return {**record, **made, "to": GGUF, "native": to, "warnings": cautions}


def _stock(folder: Path, source: Exportable, target: Target, job: Job) -> dict[str, Any]:
    """Write and verify a mixture of experts."""
    entry, config, finished = source.artefact.layers[0], source.config, job.finished
    stored = _name(source.spec(f"{source.sites[0].path('down')}.weight")[1])
    loaded_as = _name(config.dtype) if isinstance(config.dtype, torch.dtype) else stored
    stock = stock_config(target, entry, config, tied=source.tied, dtype=loaded_as)
    planned = plan_tensors(target, source, meta_model(stock))
    size = sum(tensor.bytes for tensor in planned)
    job.output.need(size)
    _copy_files(source.checkpoint.folder, finished)
    write_shards(finished, planned)
    text = json.dumps(config_json(stock), indent=2, sort_keys=True)
    (finished / "config.json").write_text(text + "\n", encoding="utf-8")

    k, neurons = entry.selection["k"], entry.neurons // entry.experts
    batches = verification_batches(source.checkpoint, config.vocab_size)
    exact = stored == "float32" or k & (k - 1) == 0
    record = {
        "architecture": target.architecture,
        "experts": entry.experts - entry.shared,
        "shared_experts": entry.shared,
        "active": k,
        "expert_size": neurons,
        "eps": sorted({layer.selection["eps"] for layer in source.artefact.layers}),
        "tied_embeddings": source.tied,
        "dtype": stored,
        "bytes": size,
        "verification": verify(folder, finished, batches, exact=exact, expert_size=neurons),
        "warnings": warnings(target, entry, config, stored),
    }
    (finished / CARD).write_text(_card(source.artefact.source["name"], record), encoding="utf-8")
    return record


def _dense(folder: Path, source: Exportable, job: Job) -> dict[str, Any]:
    """Write and verify the source's own architecture, its neurons in expert order."""
    checkpoint, artefact, finished = source.checkpoint, source.artefact, job.finished
    job.output.need(checkpoint.bytes)
    adapter = artefact.form == ADAPTER
    weights = {file.name for file in checkpoint.files} if adapter else {*_SIDE_FILES, CARD}
    copy_folder(checkpoint.folder, finished, skip=weights)
    if not adapter and (finished / SOURCE_CARD).exists():
        shutil.move(finished / SOURCE_CARD, finished / CARD)
    if adapter:
        reorder(checkpoint, finished, source.sites, artefact, job.report)
    record: dict[str, Any] = {
        "architecture": type(source.meta).__name__,
        "bytes": checkpoint.bytes,
        "warnings": [],
    }
    if source.sites[0].family.kind == "decoder":
        batches = verification_batches(checkpoint, source.config.get_text_config().vocab_size)
        record["relative_error"] = verify_dense(folder, finished, batches)
    return record


def _copy_files(source: Path, finished: Path) -> None:
    """Tokenizer, generation settings, licence: all that is neither weights nor moefy's."""
    skip = {*_SIDE_FILES, "config.json", INDEX, CARD}
    for file in source.rglob("*"):
        if file.suffix in _WEIGHTS or file.name.endswith(".index.json"):
            skip.add(str(file.relative_to(source)))
    copy_folder(source, finished, skip=skip)
    if not (source / META).exists() and (source / CARD).is_file():
        shutil.copyfile(source / CARD, finished / SOURCE_CARD)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_CARD = """---
library_name: transformers
tags: [mixture-of-experts]
---
# {name}, as {architecture}

Made from `{name}` by moefy: its MLPs are cut into experts of {expert_size} neurons, of which a linear
router chooses {active} of {experts} for each token{shared}. Nothing but transformers (or an engine
that runs {architecture}) is needed to load it.

Every expert that runs counts alike: the routers are scaled so that their softmax weights are 1/{active}
up to a relative error below 1e-4, and down projections are multiplied by {active}. Do not train the
routers without undoing this.

## Measured against moefy's own model

| arithmetic | relative error of logits | before the first flip | tokens and layers with other experts |
|---|---|---|---|
{rows}
{warnings}"""


def _card(name: str, record: dict[str, Any]) -> str:
    """The text of the card; `record` is that of the export."""
    rows = "\n".join(
        f"| {what} | {row['relative_error']:.1e} | {_error(row['relative_error_before_flips'])} | "
        f"{row['flips']} ({row['flip_rate']:.2%}) |"
        for what, row in record["verification"].items()
    )
    shared, warnings = record["shared_experts"], record["warnings"]
    mind = "".join(f"- {warning}\n" for warning in warnings)
    return _CARD.format(
        **{key: record[key] for key in ("architecture", "expert_size", "active", "experts")},
        name=name,
        shared=f" beside {shared} that always run" if shared else "",
        rows=rows,
        warnings=f"\n## Mind\n\n{mind}" if mind else "",
    )


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
