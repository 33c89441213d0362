"""The checkpoint without the removed neurons: the source's files, zeros in the down projections."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from moefy.inspection.removal.removable import Gone, Source
from moefy.models.artefact import META, SIDE
from moefy.models.checkpoint import Checkpoint, copy_folder, overwrite
from moefy.models.config import read_config
from moefy.models.locate import disk_names, meta_model, sites
from moefy.models.reorder import reorder
from moefy.run.console import Reporter

README, SOURCE_README = "README.md", "README.source.md"


def in_source_order(source: Source, gone: Gone) -> list[Tensor]:
    """Removed neurons `[N]` by layer, as the source numbers them."""
    if not source.in_expert_order:
        return list(gone)
    found = []
    for layer, gone_N in enumerate(gone):
        order_N = source.order(layer)
        assert order_N is not None
        removed_N = torch.zeros_like(gone_N)
        removed_N[order_N[gone_N]] = True
        found.append(removed_N)
    return found


def write(source: Source, gone: Gone, folder: Path, report: Reporter) -> list[Tensor]:
    """Write the source into `folder`, the rows of the removed neurons zero; returns which those are.

    All other bytes of every tensor are the source's. One tensor is in memory at a time.
    """
    shutil.rmtree(folder, ignore_errors=True)
    checkpoint, removed = source.checkpoint, in_source_order(source, gone)
    found = sites(meta_model(read_config(checkpoint)))
    if source.in_expert_order:
        assert source.artefact is not None
        skip = {META, SIDE, "records.json", README, *checkpoint.weights}
        copy_folder(checkpoint.folder, folder, skip=skip)
        reorder(checkpoint, folder, found, source.artefact, report, inverse=True)
    else:
        copy_folder(checkpoint.folder, folder)
        if (folder / README).exists():
            (folder / README).replace(folder / SOURCE_README)
    written = Checkpoint.open(folder)
    downs = {f"{site.path('down')}.weight": site for site in found}
    for disk, name in disk_names(meta_model(read_config(written)), written.tensors).items():
        site = downs.get(name)
        if site is not None and removed[site.index].any():
            tensor, index = written.read(disk), removed[site.index].nonzero().flatten()
            zeros = torch.zeros_like(tensor.index_select(site.neuron_axes[name], index))
            tensor.index_copy_(site.neuron_axes[name], index, zeros)
            overwrite(written.tensors[disk], tensor)
    return removed
