"""Put the neurons of a written checkpoint into expert order, or back: `convert` and `revert`."""

import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.errors import MoefyError
from moefy.models.artefact import ADAPTER, META, SIDE, Artefact, read_artefact
from moefy.models.checkpoint import Checkpoint, copy_folder, outline, overwrite
from moefy.models.config import read_config
from moefy.models.entries import LayerEntry
from moefy.models.locate import Site, disk_names, meta_model, permute, read_mlp, sites
from moefy.models.mlp import DenseMlp
from moefy.models.quantised import QuantisedMlp
from moefy.run.arguments import checked
from moefy.run.console import Reporter
from moefy.run.job import Job


def stock_parameter(site: Site, mlp: DenseMlp, name: str) -> Tensor:
    """The weights of an MLP in experts as the dense parameter called `name`, in its stored layout."""
    role = "down" if name.startswith(site.path("down") + ".") else "up"
    if site.gated and not site.family.fused and name.startswith(site.path("gate") + "."):
        role = "gate"
    kind = "bias" if name.endswith(".bias") else "weight"
    if role == "down":
        value = mlp.down_bias_D if kind == "bias" else mlp.down_ND.T
    else:
        pick = {"weight": ("gate_ND", "up_ND"), "bias": ("gate_bias_N", "up_bias_N")}[kind]
        gate, up = getattr(mlp, pick[0]), getattr(mlp, pick[1])
        fused = site.family.fused and gate is not None
        value = torch.cat([gate, up]) if fused else (gate if role == "gate" else up)
    assert value is not None
    return value.T if kind == "weight" and site.family.transposed else value


def reorder(
    source: Checkpoint,
    target: Path,
    found: list[Site],
    artefact: Artefact,
    report: Reporter,
    *,
    inverse: bool = False,
) -> Checkpoint:
    """Write the weights of `source` into the folder `target`, the neurons of every MLP in expert order.

    Matrices that the artefact has rounded are its values, in the dtype of `source`; those of an `inverse`
    are so already. One tensor is in memory at a time, of rounded ones a layer; each is read once and written
    once. Files that hold no weights are the caller's to copy.
    """
    written = outlined(source, target)
    names = disk_names(meta_model(read_config(source)), source.tensors)
    owners = {name: site for site in found for name in site.neuron_axes}
    values = rounded_values(artefact.stored)
    for disk in report.track(source.tensors, "restore tensors" if inverse else "write tensors"):
        tensor, name = source.read(disk), names.get(disk, "")
        if site := owners.get(name):
            order_N = artefact.permutation(site.index)
            rounded = None if inverse else values(site, name)
            if rounded is None:
                tensor = permute(site, name, tensor, order_N.argsort() if inverse else order_N)
            else:
                tensor = rounded.to(tensor.dtype)
        overwrite(written.tensors[disk], tensor)
    return written


def rounded_values(
    stored: Callable[[int], QuantisedMlp | None],
) -> Callable[[Site, str], Tensor | None]:
    """How to get a weight of an MLP in expert order and fp32, by the name it has in the model; None for biases,
    and where nothing is rounded.

    `stored` gives the matrices of a layer; the layer that was asked for last is kept.
    """

    @lru_cache(maxsize=1)
    def mlp_of(index: int) -> DenseMlp | None:
        matrices = stored(index)
        none_ND = torch.empty(0, 0)
        empty = DenseMlp(up_ND=none_ND, down_ND=none_ND, activation="linear")
        return None if matrices is None else empty.holding(matrices)

    def get(site: Site, name: str) -> Tensor | None:
        mlp = mlp_of(site.index) if name.endswith(".weight") else None
        return None if mlp is None else stock_parameter(site, mlp, name)

    return get


def rounded_mlp(
    site: Site, get: Callable[[str], Tensor], entry: LayerEntry, order_N: Tensor
) -> DenseMlp:
    """The MLP of a layer in expert order and fp32, made of the source's weights anew: rounded if its entry says so."""
    mlp = read_mlp(site, lambda name: get(name).float())
    mlp = mlp.take(order_N.to(mlp.up_ND.device))
    storage = entry.storage
    return mlp if storage is None else mlp.quantised(storage["bits"], storage["scales"])


@torch.no_grad()
def put_back(model: PreTrainedModel, site: Site, mlp: DenseMlp, order_N: Tensor) -> None:
    """Give the dense `model` the weights of an MLP in expert order, where they lie in the source."""
    stored = mlp.take(order_N.argsort().to(mlp.up_ND.device))
    for name in site.neuron_axes:
        model.get_parameter(name).copy_(stock_parameter(site, stored, name))


def outlined(source: Checkpoint, target: Path) -> Checkpoint:
    """`target` with the weight files of `source`, which lack nothing but their tensors."""
    for name in source.weights:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        outline(source.folder / name, target / name)
    return Checkpoint.open(target)


@checked
def revert(folder: str | Path, out: str | Path, *, overwrite: bool = False) -> None:
    """Write the dense checkpoint that `folder` was made from: every tensor byte for byte.

    Raises `MoefyError` where training has changed the weights since, where they were rounded, and for an
    adapter, whose source never changed.
    """
    folder = Path(folder)
    job = Job("revert", out, resume=None, overwrite=overwrite, quiet=True, reads=[folder])
    artefact = read_artefact(folder)
    if artefact.form == ADAPTER:
        raise MoefyError(
            f"{folder}: an adapter; its source '{artefact.source['name']}' is unchanged, use that"
        )
    if artefact.weights_modified:
        raise MoefyError(
            f"{folder}: training has changed the weights, the source cannot be had back from it; "
            f"export it with --to dense, or use '{artefact.source['name']}'"
        )
    if artefact.rounded is not None:
        raise MoefyError(
            f"{folder}: its MLP weights were rounded to {artefact.rounded} bits, the source cannot be had back "
            f"from it; export it with --to dense, or use '{artefact.source['name']}'"
        )
    source = Checkpoint.open(folder)
    with job.running(disk=source.bytes):
        skip = {META, SIDE, "records.json", "README.md", *source.weights}
        copy_folder(folder, job.finished, skip=skip)
        if (job.finished / "README.source.md").exists():
            shutil.move(job.finished / "README.source.md", job.finished / "README.md")
        found = sites(meta_model(read_config(source)))
        reorder(source, job.finished, found, artefact, job.report, inverse=True)
    job.commit()
