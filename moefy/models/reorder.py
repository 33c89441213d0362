"""Put the neurons of a written checkpoint into expert order, or back: `convert` and `revert`."""

import shutil
from pathlib import Path

from moefy.errors import MoefyError
from moefy.models.artefact import ADAPTER, META, SIDE, Artefact, read_artefact
from moefy.models.checkpoint import Checkpoint, copy_folder, outline, overwrite
from moefy.models.config import read_config
from moefy.models.locate import Site, disk_names, meta_model, permute, sites
from moefy.run.arguments import checked
from moefy.run.console import Reporter
from moefy.run.job import Job


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

    One tensor is in memory at a time; each is read once and written once. Files that hold no weights
    are the caller's to copy.
    """
    written = outlined(source, target)
    names = disk_names(meta_model(read_config(source)), source.tensors)
    owners = {name: site for site in found for name in site.neuron_axes}
    for disk in report.track(source.tensors, "restore tensors" if inverse else "write tensors"):
        tensor, name = source.read(disk), names.get(disk, "")
        if site := owners.get(name):
            order_N = artefact.permutation(site.index)
            tensor = permute(site, name, tensor, order_N.argsort() if inverse else order_N)
        overwrite(written.tensors[disk], tensor)
    return written


def outlined(source: Checkpoint, target: Path) -> Checkpoint:
    """`target` with the weight files of `source`, which lack nothing but their tensors."""
    for name in source.weights:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        outline(source.folder / name, target / name)
    return Checkpoint.open(target)


@checked
def revert(folder: str | Path, out: str | Path, *, overwrite: bool = False) -> None:
    """Write the dense checkpoint that `folder` was made from: every tensor byte for byte.

    Raises `MoefyError` where training has changed the weights since, and for an adapter, whose
    source never changed.
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
    source = Checkpoint.open(folder)
    with job.running(disk=source.bytes):
        skip = {META, SIDE, "records.json", "README.md", *source.weights}
        copy_folder(folder, job.finished, skip=skip)
        if (job.finished / "README.source.md").exists():
            shutil.move(job.finished / "README.source.md", job.finished / "README.md")
        found = sites(meta_model(read_config(source)))
        reorder(source, job.finished, found, artefact, job.report, inverse=True)
    job.commit()
