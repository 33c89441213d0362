"""A dense model from which neurons can be taken, and the units that they are taken in.

To remove a neuron is to put zeros in the place of its row `d_j` of the down projection: that is what is
written, and what is measured is the very same.

Shapes: N neurons of a layer in the order of the loaded weights, E units of a layer, F neurons each.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.errors import MoefyError, UnsupportedModel, unknown_choice
from moefy.experts.loading import load_dense
from moefy.models.artefact import ADAPTER, Artefact, is_artefact, open_artefact
from moefy.models.checkpoint import Checkpoint
from moefy.models.locate import Site, read_mlp, sites
from moefy.models.mlp import DenseMlp

EXPERT, NEURON = "expert", "neuron"
UNITS = (EXPERT, NEURON)

Gone = Sequence[Tensor]
"""Neurons that are removed: bool `[N]` of every layer."""


@dataclass(frozen=True)
class Source:
    """Where the weights come from."""

    checkpoint: Checkpoint
    artefact: Artefact | None
    """None for a dense checkpoint."""

    @property
    def in_expert_order(self) -> bool:
        """Whether the neurons on disk stand in expert order, not in that of the source."""
        return self.artefact is not None and self.artefact.form != ADAPTER

    @property
    def name(self) -> str:
        """What the source is called."""
        return str(self.artefact.source["name"] if self.artefact else self.checkpoint.folder)

    def order(self, layer: int) -> Tensor | None:
        """Source neurons of a layer in expert order `[N]`; None without experts."""
        return None if self.artefact is None else self.artefact.permutation(layer)


def open_source(model: str | Path, unit: str) -> Source:
    """Open a moefied folder, or with `unit` neuron any checkpoint.

    Raises `MoefyError` for a unit that the folder does not have.
    """
    if unit not in UNITS:
        raise MoefyError(unknown_choice("unit", unit, UNITS))
    if is_artefact(model):
        artefact, checkpoint = open_artefact(model)
        return Source(checkpoint, artefact)
    checkpoint = Checkpoint.open(model)
    if unit == EXPERT:
        raise MoefyError(
            f"{model}: a dense checkpoint has no experts; convert it first, or remove single neurons "
            "with --unit neuron"
        )
    return Source(checkpoint, None)


@dataclass(frozen=True)
class Removable:
    """The dense model in fp32."""

    model: PreTrainedModel
    sites: list[Site]
    experts: list[Tensor] | None
    """Neurons `[E, F]` of every expert, by layer; None without experts."""

    @classmethod
    def load(cls, source: Source) -> "Removable":
        """The model of a source. Raises `UnsupportedModel` where it does not predict tokens."""
        model = load_dense(source.checkpoint, dtype=torch.float32)
        found = sites(model)
        if found[0].family.kind != "decoder":
            raise UnsupportedModel(
                f"{type(model).__name__}: removal is judged by the next token, which a model of kind "
                f"'{found[0].family.kind}' does not predict; give a decoder"
            )
        model.requires_grad_(False)
        if torch.cuda.is_available():
            nn.Module.to(model, torch.device("cuda"))
        experts = None
        if source.artefact is not None:
            experts = []
            for site, entry in zip(found, source.artefact.layers, strict=True):
                order_N = source.artefact.permutation(site.index)
                if source.in_expert_order:
                    order_N = torch.arange(site.neurons)
                experts.append(order_N.view(entry.experts, -1))
        return cls(model, found, experts)

    @cached_property
    def mlps(self) -> list[DenseMlp]:
        """The MLPs, which share their weights with the model."""
        return [
            read_mlp(site, lambda name: self.model.get_parameter(name).detach())
            for site in self.sites
        ]

    def units(self, unit: str) -> list[Tensor]:
        """Neurons `[E, F]` of every unit, by layer."""
        if unit == EXPERT:
            assert self.experts is not None, "open_source refuses experts that are not there"
            return self.experts
        return [torch.arange(site.neurons)[:, None] for site in self.sites]

    def nothing(self) -> list[Tensor]:
        """No neuron of any layer."""
        return [torch.zeros(site.neurons, dtype=torch.bool) for site in self.sites]

    @contextmanager
    def without(self, gone: Gone) -> Iterator[None]:
        """The model with these neurons removed."""
        kept = []
        with torch.no_grad():
            for site, gone_N in zip(self.sites, gone, strict=True):
                name = f"{site.path('down')}.weight"
                weight, axis = self.model.get_parameter(name), site.neuron_axes[name]
                index = gone_N.nonzero().flatten().to(weight.device)
                kept.append((weight, axis, index, weight.index_select(axis, index)))
                weight.index_fill_(axis, index, 0.0)
        try:
            yield
        finally:
            with torch.no_grad():
                for weight, axis, index, before in kept:
                    weight.index_copy_(axis, index, before)


def gone_of(units: list[Tensor], chosen: Tensor, neurons: list[int]) -> list[Tensor]:
    """The neurons of the units with these numbers `[n]`, which count over all layers."""
    found, first = [], 0
    for units_EF, count in zip(units, neurons, strict=True):
        here = chosen[(chosen >= first) & (chosen < first + len(units_EF))] - first
        gone_N = torch.zeros(count, dtype=torch.bool)
        gone_N[units_EF[here].flatten()] = True
        found.append(gone_N)
        first += len(units_EF)
    return found
