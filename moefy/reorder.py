"""Put the neurons of a written checkpoint into expert order, or back: `convert` and `revert`."""

import shutil
from pathlib import Path

from moefy.artefact import ADAPTER, META, SIDE, Artefact, read_artefact
from moefy.checkpoint import Checkpoint, OutputFolder, copy_folder, permute_in_place
from moefy.console import Reporter
from moefy.errors import MoefyError
from moefy.inputs import read_config
from moefy.locate import Site, disk_names, meta_model, sites


def reorder(
    written: Checkpoint,
    found: list[Site],
    artefact: Artefact,
    report: Reporter,
    *,
    inverse: bool = False,
) -> None:
    """Permute every MLP tensor of a checkpoint in place, one tensor at a time."""
    names: dict[str, list[str]] = {}
    for disk, name in disk_names(meta_model(read_config(written)), written.tensors).items():
        names.setdefault(name, []).append(disk)
    for site in report.track(found, "restore layers" if inverse else "write layers"):
        order_N = artefact.permutation(site.index)
        order_N = order_N.argsort() if inverse else order_N
        for name, axis in site.neuron_axes.items():
            for disk in names[name]:
                tensor = written.tensors[disk]
                permute_in_place(tensor, order_N.numpy(), axis, tensor.shape[axis] // site.neurons)


def revert(folder: str | Path, out: str | Path, *, overwrite: bool = False) -> None:
    """Write the dense checkpoint that `folder` was made from: every tensor byte for byte.

    Raises `MoefyError` where training has changed the weights since, and for an adapter, whose
    source never changed.
    """
    folder, report = Path(folder), Reporter(quiet=True)
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
    output = OutputFolder(Path(out))
    output.begin("revert", resume=False, overwrite=overwrite)
    finished = output.work / "model"
    with output.full_disk():
        output.need(Checkpoint.open(folder).bytes)
        copy_folder(folder, finished, skip={META, SIDE, "records.json", "README.md"})
        if (finished / "README.source.md").exists():
            shutil.move(finished / "README.source.md", finished / "README.md")
        written = Checkpoint.open(finished)
        found = sites(meta_model(read_config(written)))
        reorder(written, found, artefact, report, inverse=True)
    output.commit(finished)
