"""The second pass, over what was written: is it the dense model, and what has sparsity cost?

Where densities were allocated, thresholds and compensations are set here, on what arrives at every
layer. It reads the written weights layer by layer.

Shapes: B documents, T tokens, D width.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moefy.conversion.allocate import Candidate
from moefy.conversion.fit import Tokens, fit_compensation
from moefy.conversion.job import Job, Reading
from moefy.conversion.settle import settle_layer, varies
from moefy.conversion.streamed.carried import Carried, carry, reads, through
from moefy.conversion.streamed.skeleton import Skeleton
from moefy.data.corpus import Batch, make_batches
from moefy.evaluation.evaluate import document_sums, figures, summarise
from moefy.evaluation.judge import judge, judged
from moefy.evaluation.load import FfnLoad, HeadLoad
from moefy.evaluation.outputs import Outputs, distances
from moefy.evaluation.router_quality import RouterQuality
from moefy.evaluation.sinks import Sinks
from moefy.experts.loading import with_routing_of
from moefy.experts.passes import listen, observing
from moefy.experts.placement import running_dtype
from moefy.experts.sparse_mlp import SparseMlp, all_experts, sparse_mlps, use_backend
from moefy.models.artefact import Artefact
from moefy.models.checkpoint import Checkpoint


class SecondPass:
    """The written model, and the documents that are carried through it."""

    def __init__(self, job: Job, artefact: Artefact, reading: Reading) -> None:
        self.job, self.recipe, evaluated = job, job.recipe, job.evaluated
        self.skeleton = Skeleton(
            Checkpoint.open(job.finished), running_dtype(job.checkpoint), artefact
        )
        self.modules: dict[int, SparseMlp] = sparse_mlps(self.skeleton.model)
        use_backend(self.skeleton.model, "masked")
        folder = job.work / "checked"
        folder.mkdir(exist_ok=True)

        def carried(name: str, batches: list[Batch], limit: int) -> Carried:
            return carry(name, folder, self.skeleton, batches, limit, self.recipe.seed)

        self.sparse = {
            name: carried(name, *reading[name])
            for name in ("router", "held-out")
            if name in reading
        }
        self.dense, self.routed = (carried(name, evaluated, 0) for name in ("dense", "routed"))
        model = self.skeleton.model
        self.load, self.quality = FfnLoad(model), RouterQuality(model, evaluated)
        self.heads = HeadLoad(model)
        masks = [batch.mask() for batch in evaluated]
        self.sinks = [Sinks(mask) for mask in masks if mask is not None]

    @torch.no_grad()
    def run(self, active: list[float] | None) -> None:
        """Carry everything to the end; with `active`, thresholds and compensations are set anew, for so
        many routed experts of each layer."""
        everything = [*self.sparse.values(), self.dense, self.routed]
        for carried in everything:
            states = carried.states
            states.write(0, (self.skeleton.enter(batch) for batch in states.batches))
        for site in self.job.report.track(self.skeleton.sites, "verify layers"):
            with self.skeleton.layer(site.index):
                if active is not None:
                    self._settle(site.index, active[site.index])
                self._go_on(site.index)
            for carried in everything:
                carried.states.drop(site.index)

    @property
    def artefact(self) -> Artefact:
        """The artefact with the routing as it is now."""
        return with_routing_of(self.skeleton.model)

    def _settle(self, index: int, active: float) -> None:
        """Fit what depends on the density, on what arrives here: first who runs, then what stands in."""
        module = self.modules[index]
        if varies(self.recipe):
            x_TD = reads(self.skeleton, index, self.sparse["held-out"])
            settle_layer(module, Tokens(x_TD, x_TD), active, self.recipe)
        if "router" in self.sparse:
            x_TD = reads(self.skeleton, index, self.sparse["router"])
            tokens = Tokens(x_TD, x_TD, device=module.weights.down_ND.device)
            fit_compensation(
                module.compensation, module.router, module.selection, module.routed, tokens
            )

    def _go_on(self, index: int) -> None:
        """Every group through one layer."""
        model = self.skeleton.model
        for carried in self.sparse.values():
            carried.states.write(index + 1, through(self.skeleton, index, carried))
        with all_experts(model):
            self.dense.states.write(index + 1, self._watched(index))
        self.routed.states.write(index + 1, self._heard(index))

    def _watched(self, index: int) -> Iterator[Tensor]:
        """The dense states behind a layer; sinks are looked for on the way."""
        site = self.skeleton.sites[index]
        for number, (batch, hidden) in enumerate(self.dense.states.before(index)):
            read: list[Tensor] = []
            handles = listen(self.skeleton.model, [site], lambda _, x_TD, r=read: r.append(x_TD))  # type: ignore[misc]
            found = self.skeleton.run(index, batch, hidden)
            handles[0].remove()
            for values in (*read, found):
                self.sinks[number].see(values)
            yield found

    def _heard(self, index: int) -> Iterator[Tensor]:
        """The sparse states behind a layer; what ran is counted."""
        for batch, hidden in self.routed.states.before(index):
            with observing(self.skeleton.model, batch, self.load, self.quality):
                yield self.skeleton.run(index, batch, hidden)

    def distance(self, dense: Carried, sparse: Carried) -> float:
        """KL, or what stands for it, of the held-out documents' last states (`moefy.evaluation.outputs.distance`)."""
        judgement = judge(
            self._left(sparse),
            _singles(sparse.states.batches),
            self._left(dense),
            distances,
        )
        return judgement.mean("distance")

    def _left(self, carried: Carried) -> Callable[[Batch], Outputs]:
        """What the model puts out for every document alone, in turn."""
        last = len(self.skeleton.sites)
        states = (
            hidden
            for batch, hidden_BTD in carried.states.before(last)
            for hidden in _cut(batch, hidden_BTD)
        )
        return lambda one: self.skeleton.leave(one, next(states))

    def error(self, probe: Carried) -> float:
        """Relative error of the last hidden states with every expert on, against the source's: over
        the longest of the evaluated documents."""
        last = len(self.skeleton.sites)
        *_, (batch, states) = self.dense.states.before(last)
        *_, found = _cut(batch, states)
        (_, want), got = next(probe.states.before(last)), found.double()
        return float((got - want).norm() / want.double().norm())

    def record(self) -> dict[str, Any]:
        """The evaluation, made of the last states."""
        batches = self.routed.states.batches
        sinks_BT = [
            row_T[None, : len(sample.inputs["input_ids"])]
            for batch, sinks in zip(batches, self.sinks, strict=True)
            for sample, row_T in zip(batch.samples, sinks.marked_BT, strict=True)
        ]
        every = judged(self._left(self.routed), _singles(batches), self._left(self.dense), figures)
        documents, kl = document_sums(every, sinks_BT, None)
        return summarise(documents, kl, self.load, self.quality, self.heads, seed=0)


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
