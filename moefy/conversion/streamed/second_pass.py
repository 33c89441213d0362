"""The second pass, over what was written: is it the dense model, and what has sparsity cost?

Where densities were allocated, thresholds and compensations are set here, on what arrives at every
layer. It reads the written weights layer by layer.

Shapes: B documents, T tokens, D width.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moefy.conversion.allocate import Candidate
from moefy.conversion.fit import LayerTokens, recalibrate_layer, refit_compensation, varies
from moefy.conversion.streamed.layerwise import LayerwiseModel
from moefy.conversion.streamed.states import States, forward, inputs
from moefy.conversion.task import Conversion, Reading
from moefy.data.corpus import Batch, make_batches
from moefy.evaluation.evaluate import document_sums, figures, summarise
from moefy.evaluation.groups import Sinks
from moefy.evaluation.judge import judge, judged
from moefy.evaluation.load import FfnLoad, HeadLoad
from moefy.evaluation.outputs import Outputs, distances
from moefy.evaluation.router_quality import RouterQuality
from moefy.experts.passes import listen, observing
from moefy.experts.placement import running_dtype
from moefy.experts.sparse_mlp import SparseMlp, all_experts, sparse_mlps, use_backend
from moefy.experts.stock_names import with_routing_of
from moefy.models.artefact import Artefact
from moefy.models.checkpoint import Checkpoint
from moefy.models.locate import Site


class SecondPass:
    """The written model, and the documents that go through it."""

    def __init__(self, task: Conversion, artefact: Artefact, reading: Reading) -> None:
        self.task, self.recipe, evaluated = task, task.recipe, task.evaluated
        self.layerwise = LayerwiseModel(
            Checkpoint.open(task.finished), running_dtype(task.checkpoint), artefact
        )
        self.modules: dict[int, SparseMlp] = sparse_mlps(self.layerwise.model)
        use_backend(self.layerwise.model, "masked")
        folder = task.work / "checked"
        folder.mkdir(exist_ok=True)

        def states(name: str, batches: list[Batch], limit: int) -> States:
            return States.of(name, folder, self.layerwise, batches, limit, self.recipe.seed)

        self.sparse = {
            name: states(name, *reading[name]) for name in ("router", "held-out") if name in reading
        }
        self.dense, self.routed = (states(name, evaluated, 0) for name in ("dense", "routed"))
        model = self.layerwise.model
        self.load, self.quality = FfnLoad(model), RouterQuality(model, evaluated)
        self.heads = HeadLoad(model)
        masks = [batch.mask() for batch in evaluated]
        self.sinks = [Sinks(mask) for mask in masks if mask is not None]

    @torch.no_grad()
    def run(self, active: list[float] | None) -> None:
        """Carry everything to the end; with `active`, thresholds and compensations are set anew, for so
        many routed experts of each layer."""
        everything = [*self.sparse.values(), self.dense, self.routed]
        for states in everything:
            states.enter(self.layerwise)
        for site in self.task.report.track(self.layerwise.sites, "verify layers"):
            with self.layerwise.layer(site.index):
                if active is not None:
                    self._recalibrate(site.index, active[site.index])
                self._go_on(site.index)
            for states in everything:
                states.drop(site.index)

    @property
    def artefact(self) -> Artefact:
        """The artefact with the routing as it is now."""
        return with_routing_of(self.layerwise.model)

    def _recalibrate(self, index: int, active: float) -> None:
        """Fit what depends on the density, on what arrives here: first who runs, then what stands in."""
        module = self.modules[index]
        if varies(self.recipe):
            x_TD = inputs(self.layerwise, index, self.sparse["held-out"])
            recalibrate_layer(module, LayerTokens(x_TD, x_TD), active, self.recipe)
        if "router" in self.sparse:
            x_TD = inputs(self.layerwise, index, self.sparse["router"])
            device = module.device
            refit_compensation(module, LayerTokens(x_TD, x_TD, device=device))

    def _go_on(self, index: int) -> None:
        """Every group through one layer."""
        model = self.layerwise.model
        for states in self.sparse.values():
            states.write(index + 1, forward(self.layerwise, index, states))
        with all_experts(model):
            self.dense.write(index + 1, self._watched(index))
        self.routed.write(index + 1, self._heard(index))

    def _watched(self, index: int) -> Iterator[Tensor]:
        """The dense states behind a layer; sinks are looked for on the way."""
        site = self.layerwise.sites[index]
        for number, (batch, hidden) in enumerate(self.dense.before(index)):
            sinks = self.sinks[number]
            handles = listen(self.layerwise.model, [site], partial(_see, sinks))
            behind = self.layerwise.run(index, batch, hidden)
            handles[0].remove()
            sinks.see(behind)
            yield behind

    def _heard(self, index: int) -> Iterator[Tensor]:
        """The sparse states behind a layer; what ran is counted."""
        for batch, hidden in self.routed.before(index):
            with observing(self.layerwise.model, batch, self.load, self.quality):
                yield self.layerwise.run(index, batch, hidden)

    def distance(self, dense: States, sparse: States) -> float:
        """KL, or what stands for it, of the held-out documents' last states (`moefy.evaluation.outputs.distance`)."""
        judgement = judge(
            self._left(sparse),
            _singles(sparse.batches),
            self._left(dense),
            distances,
        )
        return judgement.mean("distance")

    def _left(self, states: States) -> Callable[[Batch], Outputs]:
        """What the model puts out for every document alone, in turn."""
        last = len(self.layerwise.sites)
        singles = (one for pair in states.before(last) for one in _cut(*pair))
        return lambda one: self.layerwise.leave(one, next(singles))

    def error(self, probe: States) -> float:
        """Relative error of the last hidden states with every expert on, against the source's: over
        the longest of the evaluated documents."""
        last = len(self.layerwise.sites)
        *_, (batch, states) = self.dense.before(last)
        *_, found = _cut(batch, states)
        (_, want), got = next(probe.before(last)), found.double()
        return float((got - want).norm() / want.double().norm())

    def record(self) -> dict[str, Any]:
        """The evaluation, made of the last states."""
        batches = self.routed.batches
        sinks_BT = [
            row_T[None, : len(sample.inputs["input_ids"])]
            for batch, sinks in zip(batches, self.sinks, strict=True)
            for sample, row_T in zip(batch.samples, sinks.marked_BT, strict=True)
        ]
        every = judged(self._left(self.routed), _singles(batches), self._left(self.dense), figures)
        documents, kl = document_sums(every, sinks_BT, None)
        return summarise(documents, kl, self.load, self.quality, self.heads, seed=0)


def _see(sinks: Sinks, _: Site, x_TD: Tensor) -> None:
    sinks.see(x_TD)


def _singles(batches: list[Batch]) -> list[Batch]:
    """Every document alone, so that logits of one are in memory at a time."""
    return [make_batches([sample])[0] for batch in batches for sample in batch.samples]


def _cut(batch: Batch, hidden: Tensor) -> Iterator[Tensor]:
    """The states of every document alone `[1, T, D]`, without padding."""
    for row, sample in enumerate(batch.samples):
        yield hidden[row : row + 1, : len(sample.inputs["input_ids"])]


def with_density(artefact: Artefact, chosen: list[Candidate]) -> Artefact:
    """The artefact with one candidate's selection in every layer."""
    layers = [
        replace(entry, selection={"name": entry.selection["name"], **one.selection.settings()})
        for entry, one in zip(artefact.layers, chosen, strict=True)
    ]
    return replace(artefact, layers=layers)
