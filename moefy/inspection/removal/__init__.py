"""What a removal takes neurons from, and what is written without them: the source's files, zeros in the
down projections.

To remove a neuron is to put zeros in the place of its row `d_j` of the down projection. It is measured by
the causal engine, which replaces `h_j` by zero: the very same function.

Shapes: N neurons of a layer, in expert order unless said otherwise.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.errors import MoefyError, UnsupportedModel, unknown_choice
from moefy.experts.loading import load_dense, moefied
from moefy.inspection.causal.engine import WHOLE, AblationEngine, Neurons
from moefy.models.artefact import ADAPTER, META, SIDE, Artefact, is_artefact, open_artefact
from moefy.models.checkpoint import Checkpoint, copy_folder, overwrite
from moefy.models.config import read_config
from moefy.models.entries import LayerEntry
from moefy.models.locate import Site, disk_names, meta_model, sites
from moefy.models.reorder import reorder
from moefy.run.computing import now
from moefy.run.console import Reporter

EXPERT, NEURON = "expert", "neuron"
UNITS = (EXPERT, NEURON)
README, SOURCE_README = "README.md", "README.source.md"


@dataclass(frozen=True)
class Source:
    """Where the weights come from."""

    checkpoint: Checkpoint
    artefact: Artefact
    """Of a dense checkpoint one that has all neurons of a layer in one expert, in their own order."""

    @property
    def in_expert_order(self) -> bool:
        """Whether the neurons on disk stand in expert order, not in that of the source."""
        return self.artefact.form != ADAPTER

    @property
    def name(self) -> str:
        """What the source is called."""
        return str(self.artefact.source["name"])

    @property
    def decided(self) -> list[dict[str, str]]:
        """What tells it from other sources."""
        return [self.checkpoint.all_hashes(), self.artefact.sha256]

    @property
    def sites(self) -> list[Site]:
        """Its MLPs."""
        return sites(meta_model(read_config(self.checkpoint)))

    def engine(self) -> AblationEngine:
        """The dense model in fp32, which runs with neurons at zero."""
        model = self._dense()
        moefied(model, self.artefact, permute=not self.in_expert_order)
        model.requires_grad_(False)
        return AblationEngine(model, mode="zero", start=WHOLE)

    def without(self, neurons: Neurons) -> PreTrainedModel:
        """The stock model in fp32, the rows of these neurons zero."""
        model = self._dense()
        removed = neurons if self.in_expert_order else self.in_source_order(neurons)
        for site in sites(model):
            name = f"{site.path('down')}.weight"
            if site.index in removed:
                index = removed[site.index].nonzero().flatten()
                weight = model.get_parameter(name)
                weight.index_fill_(site.neuron_axes[name], index.to(weight.device), 0.0)
        return model

    def _dense(self) -> PreTrainedModel:
        model = load_dense(self.checkpoint, dtype=torch.float32)
        model.requires_grad_(False)
        nn.Module.to(model, now().where)
        return model

    def in_source_order(self, neurons: Neurons) -> dict[int, Tensor]:
        """Removed neurons `[N]` by layer, as the source numbers them."""
        removed = {layer: torch.zeros_like(removed_N) for layer, removed_N in neurons.items()}
        for layer, removed_N in neurons.items():
            removed[layer][self.artefact.permutation(layer)[removed_N]] = True
        return removed

    def write(self, neurons: Neurons, folder: Path, report: Reporter) -> list[list[int]]:
        """Write the source into `folder`, the rows of the removed neurons zero; returns the numbers of
        those by layer, as the source counts them.

        All other bytes of every tensor are the source's. One tensor is in memory at a time.
        """
        shutil.rmtree(folder, ignore_errors=True)
        checkpoint, removed, mlps = self.checkpoint, self.in_source_order(neurons), self.sites
        if self.in_expert_order:
            skip = {META, SIDE, "records.json", README, *checkpoint.weights}
            copy_folder(checkpoint.folder, folder, skip=skip)
            reorder(checkpoint, folder, mlps, self.artefact, report, inverse=True)
        else:
            copy_folder(checkpoint.folder, folder)
            if (folder / README).exists():
                (folder / README).replace(folder / SOURCE_README)
        _put_zeros(Checkpoint.open(folder), mlps, removed)
        none = torch.zeros(0, dtype=torch.bool)
        return [removed.get(s.index, none).nonzero().flatten().tolist() for s in mlps]


def _put_zeros(written: Checkpoint, mlps: list[Site], removed: dict[int, Tensor]) -> None:
    downs = {f"{site.path('down')}.weight": site for site in mlps}
    for disk, name in disk_names(meta_model(read_config(written)), written.tensors).items():
        site = downs.get(name)
        if site is not None and site.index in removed:
            tensor, index = written.read(disk), removed[site.index].nonzero().flatten()
            overwrite(written.tensors[disk], tensor.index_fill_(site.neuron_axes[name], index, 0.0))


def open_source(model: str | Path, unit: str) -> Source:
    """Open a moefied folder, or with `unit` neuron any checkpoint of a decoder.

    Raises `MoefyError` for a unit that the folder does not have, `UnsupportedModel` for a model that
    does not predict tokens.
    """
    if unit not in UNITS:
        raise MoefyError(unknown_choice("unit", unit, UNITS))
    if is_artefact(model):
        artefact, checkpoint = open_artefact(model)
        if artefact.form == ADAPTER and artefact.rounded is not None:
            raise MoefyError(
                f"{model}: an adapter whose MLP weights are rounded, its base holds others than those that would "
                "be measured; convert without --adapter, or prune the base"
            )
    elif unit == EXPERT:
        raise MoefyError(
            f"{model}: a dense checkpoint has no experts; convert it first, or remove single neurons "
            "with --unit neuron"
        )
    else:
        checkpoint = Checkpoint.open(model)
        artefact = _one_expert_a_layer(checkpoint)
    dense = meta_model(read_config(checkpoint))
    kind = sites(dense)[0].family.kind
    if kind != "decoder":
        raise UnsupportedModel(
            f"{type(dense).__name__}: removal is judged by the next token, which a model of kind "
            f"'{kind}' does not predict; give a decoder"
        )
    return Source(checkpoint, artefact)


def _one_expert_a_layer(checkpoint: Checkpoint) -> Artefact:
    mlps = sites(meta_model(read_config(checkpoint)))
    layers = [
        LayerEntry(
            layer=site.layer, width=site.width, neurons=site.neurons, experts=1, shared=0,
            router={"name": "oracle", "hidden": 0, "bits": None, "inputs": None, "look_ahead": False},
            selection={"name": "topk", "k": 1}, compensation={"name": "none", "rank": 0},
        )
        for site in mlps
    ]  # fmt: skip
    tensors = {f"layers.{site.index}.permutation": torch.arange(site.neurons) for site in mlps}
    source = {"name": str(checkpoint.folder), "sha256": checkpoint.hashes()}
    return Artefact(
        form=ADAPTER, source=source, recipe={}, corpus={}, layers=layers, tensors=tensors
    )


def size_of(engine: AblationEngine, unit: str, layer: int) -> int:
    """Neurons of a unit."""
    return engine.modules[layer].expert_size if unit == EXPERT else 1


def units_of(engine: AblationEngine, unit: str) -> dict[int, int]:
    """Units of every layer."""
    return {
        layer: module.weights.neurons // size_of(engine, unit, layer)
        for layer, module in engine.modules.items()
    }


def neurons_of_units(engine: AblationEngine, unit: str, chosen: Tensor) -> Neurons:
    """The neurons of the units with these numbers `[n]`, which count over all layers."""
    neurons, first = {}, 0
    for layer, count in units_of(engine, unit).items():
        here = chosen[(chosen >= first) & (chosen < first + count)] - first
        if len(here):
            chosen_EF = torch.zeros(count, size_of(engine, unit, layer), dtype=torch.bool)
            chosen_EF[here] = True
            neurons[layer] = chosen_EF.flatten()
        first += count
    return neurons
