"""The two passes. Every layer is read once, measured, fitted and written; then what was written is checked.

In the first all calibration tokens go through the model twice: densely, which says what experts should
have done, and through the experts fitted so far, which is what routers and thresholds will read.

The second reads the written weights layer by layer: are they the dense model, and what has sparsity cost?
Where densities were allocated, it sets thresholds and compensations on what arrives at every layer.

Shapes: B documents, T tokens, D width.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moefy.conversion.allocate import Candidate, Trial, candidates, nearest, set_density
from moefy.conversion.backward import inverse_power, squared_norms
from moefy.conversion.fit import (
    LayerTokens,
    planned_active,
    recalibrate_layer,
    refit_compensation,
    varies,
)
from moefy.conversion.layer import Fitted, LayerSample, domains_of, fit_layer
from moefy.conversion.streamed.layerwise import LayerwiseModel
from moefy.conversion.streamed.states import States, forward, inputs
from moefy.conversion.task import UNROUNDED, Conversion, Reading
from moefy.conversion.verification import AsRouted
from moefy.data.corpus import Batch, make_batches
from moefy.errors import CheckpointError, MoefyError
from moefy.evaluation.evaluate import document_sums, figures_of, summarise
from moefy.evaluation.groups import Sinks
from moefy.evaluation.outputs import Outputs, distances, judge, judged
from moefy.evaluation.routing import FfnLoad, HeadLoad, RouterQuality
from moefy.experts.loading import install
from moefy.experts.passes import listen, observing
from moefy.experts.placement import running_dtype
from moefy.experts.sparse_mlp import SparseMlp, all_experts, sparse_mlps, use_backend
from moefy.experts.stock_names import with_routing_of
from moefy.methods.base import stored
from moefy.models.answers import answer_of
from moefy.models.artefact import Artefact
from moefy.models.checkpoint import Checkpoint, copy_folder, overwrite
from moefy.models.entries import LayerEntry, part_of
from moefy.models.locate import Site, permute, read_mlp
from moefy.models.quantised import QuantisedMlp
from moefy.models.reorder import outlined, put_back, rounded_mlp, rounded_values

SOURCE = "source"
"""The states of the documents that are evaluated in the source, where the result is rounded."""


class FirstPass:
    """All states that go from layer to layer."""

    def __init__(self, task: Conversion, reading: Reading, *, follow: bool = True) -> None:
        """`reading` is what goes through the layers; `follow` lets routers be fitted on what the experts
        before them leave, in place of what the dense layers do."""
        self.task, self.todo, self.recipe, self.follow = task, task.todo, task.recipe, follow
        self.checkpoint = task.checkpoint
        self.layerwise = LayerwiseModel(self.checkpoint, running_dtype(self.checkpoint))
        recipe, probe = task.recipe, make_batches(task.evaluated[-1].samples[-1:])
        folder = task.work / "states"
        folder.mkdir(exist_ok=True)
        groups = {**reading, "probe": (probe, 0)}
        if task.rounds:
            groups[SOURCE] = (task.evaluated, 0)
        self.dense, self.sparse = (
            {
                name: States.of(
                    f"{name}-{kind}", folder, self.layerwise, *groups[name], recipe.seed
                )
                for name in names
            }
            for kind, names in (
                ("dense", groups),
                ("sparse", [n for n in groups if n not in ("partition", "probe", SOURCE)]),
            )
        )
        first = self.dense["partition"]
        self.domain_T = torch.tensor(
            domains_of(first.batches, "decoder", first.sizes, first.chosen)
        )
        self.raw: dict[str, Tensor] = {}

    @torch.no_grad()
    def run(self) -> tuple[dict[str, States], dict[str, States]]:
        """Fit and write all layers that are not there yet; the dense and the sparse states behind."""
        report = self.task.report
        written = self._prepared(self.task.finished)
        count = len(self.layerwise.sites)
        first = sum(self.task.stages.has(f"layers/{i}") for i in range(count))
        if first:
            last = self.task.stages.read(f"layers/{first - 1}")
            self.layerwise.in_tuple = last["in_tuple"]
            report.say(f"{first} of {count} layers are there already")
        else:
            for states in self._all():
                states.enter(self.layerwise)
        for site in report.track(self.layerwise.sites[first:], "stream layers"):
            self.raw = {}
            with self.layerwise.layer(site.index, self._seen(site, written)):
                self._layer(site, written)
            # Routers are kept on disk, not one beside the other in memory.
            nn.Module.to(self.layerwise.layers[site.index], torch.device("meta"))
            for states in self._all():
                states.drop(site.index)
        return self.dense, self.sparse

    def _prepared(self, finished: Path) -> Checkpoint:
        """The folder to write, with all in it that belongs to no layer."""
        if self.task.stages.has("layers/others"):
            return Checkpoint.open(finished)
        finished.mkdir(exist_ok=True)
        copy_folder(self.checkpoint.folder, finished, skip={*self.checkpoint.weights})
        written = outlined(self.checkpoint, finished)
        names = self.layerwise.names
        below = tuple(f"{site.layer}." for site in self.layerwise.sites)
        parameters = [name for name, _ in self.layerwise.model.named_parameters()]
        inside = {names[n] for n in parameters if n.startswith(below) and n in names}
        for disk in written.tensors:
            if disk not in inside:
                overwrite(written.tensors[disk], self.checkpoint.read(disk))
        self.task.stages.keep("layers/others", {})
        return written

    def _all(self) -> list[States]:
        return [*self.dense.values(), *self.sparse.values()]

    def _seen(self, site: Site, written: Checkpoint) -> Callable[[str, Tensor], None]:
        """What is done with every tensor of a layer as it is read."""

        def seen(name: str, value: Tensor) -> None:
            if not value.isfinite().all():
                raise CheckpointError(
                    f"{self.checkpoint.folder}: {name} holds NaN or infinity; the checkpoint is damaged"
                )
            if name in site.neuron_axes:
                self.raw[name] = value
            else:
                overwrite(written.tensors[self.layerwise.names[name]], value)

        return seen

    def _layer(self, site: Site, written: Checkpoint) -> None:
        """One layer, whose weights are in memory: measure, fit, write, go on."""
        seen, metric = self._measure(site)
        read = {name: inputs(self.layerwise, site.index, s) for name, s in self.sparse.items()}
        sample = self._sample(seen, read)
        fitted = self._fit(site, sample)
        if self.task.rounds:
            self._round(site, fitted)
        module = self._installed(site, fitted, written)
        rows = self._choose(module, site.index, sample, metric)
        if varies(self.recipe):
            # Thresholds hold for what arrives here, not for what the dense layers would send.
            x_TD = read["held-out"]
            planned = planned_active(self.todo, site.index, module.shared)
            recalibrate_layer(module, LayerTokens(x_TD, x_TD), planned, self.recipe)
        for states in self.sparse.values():
            states.write(site.index + 1, forward(self.layerwise, site.index, states))
        selection = {"name": self.recipe.selection.name, **module.selection.settings()}
        tensors = {
            name: value
            for name, value in fitted.tensors.items()
            if name.partition(".")[0] in ("permutation", "weights")
        }
        module.store(None)  # they are kept on disk
        result = Fitted(
            replace(fitted.entry, selection=selection),
            tensors | stored(module.router, module.compensation),
            fitted.fit,
        )
        in_tuple = self.layerwise.in_tuple
        self.task.keep(f"layers/{site.index}", result, candidates=rows, in_tuple=in_tuple)

    def _round(self, site: Site, fitted: Fitted[LayerEntry]) -> None:
        """Round the layer that is in memory, from the source's weights anew, and take through it what the result
        is compared with."""
        order_N, probe = fitted.tensors["permutation"].long(), self.dense["probe"]
        mlp = rounded_mlp(site, self._read, fitted.entry, order_N)
        put_back(self.layerwise.model, site, mlp, order_N)
        probe.write(site.index + 1, forward(self.layerwise, site.index, probe))

    def _read(self, name: str) -> Tensor:
        """A parameter of the layer that is in memory, as it is stored."""
        return self.raw[name] if name in self.raw else self._running(name)

    def _running(self, name: str) -> Tensor:
        """The same as it runs."""
        parameter: Tensor = self.layerwise.model.get_parameter(name).detach().cpu()
        return parameter

    def _installed(self, site: Site, fitted: Fitted[LayerEntry], written: Checkpoint) -> SparseMlp:
        """Write the layer in expert order, and put its experts in the place of its MLP."""
        order_N = fitted.tensors["permutation"].long()
        codes = part_of(fitted.tensors, "weights")
        values = rounded_values(lambda _: QuantisedMlp(codes, site.width) if codes else None)
        for name, value in self.raw.items():
            rounded = values(site, name)
            moved = permute(site, name, value, order_N) if rounded is None else rounded
            disk = self.layerwise.names[name]
            overwrite(written.tensors[disk], moved.to(value.dtype))
        self.raw = {}
        moves = bool((order_N.diff() < 0).any())
        module = install(self.layerwise.model, site, fitted.entry, fitted.tensors, permute=moves)
        # The faster backend of the moment would decide the last bits of all that follows.
        module.backend = "masked"
        return module

    def _measure(self, site: Site) -> tuple[dict[str, Tensor], Tensor]:
        """Take all dense states through the layer; what its MLP reads `[T, D]` by group, and what its
        output errors cost (`moefy.conversion.backward`)."""
        seen: dict[str, Tensor] = {}
        powers: list[Tensor] = []
        for name, states in self.dense.items():
            if name == "probe" and self.task.rounds:
                continue  # goes through the rounded layer (`_round`)
            rows: list[Tensor] = []
            out = forward(self.layerwise, site.index, states, rows)
            if name == "held-out":
                out = _measured(out, states, powers)
            states.write(site.index + 1, out)
            seen[name] = torch.cat(rows)
            if not seen[name].isfinite().all():
                raise MoefyError(
                    f"{site.layer}: the input of {site.module} is not finite for some document of "
                    f"{name}; the weights overflow {self.layerwise.dtype}"
                )
        return seen, inverse_power(torch.cat(powers))

    def _sample(self, seen: dict[str, Tensor], read: dict[str, Tensor]) -> LayerSample:
        """Targets are those of the dense model; what routers read may be what arrives."""
        router, held = (
            LayerTokens(seen[name], read[name] if self.follow else seen[name])
            # Where nothing is fitted on tokens for routers, there are none.
            for name in ("router" if "router" in seen else "held-out", "held-out")
        )
        return LayerSample(seen["partition"], self.domain_T, router, held)

    def _fit(self, site: Site, sample: LayerSample) -> Fitted[LayerEntry]:
        """Fit as in memory, on a CPU and in fp32; where the layer is so already nothing is copied."""
        mlp = read_mlp(site, self._read if self.task.rounds else self._running)
        return fit_layer(mlp.to(torch.float32), self.todo, site, self.recipe, sample)

    def _choose(
        self, module: SparseMlp, index: int, sample: LayerSample, metric: Tensor
    ) -> list[dict[str, Any]]:
        """What each density of this layer costs, where densities are going to be allocated; the one
        that is planned is set, and is what the next layers see."""
        if not self.recipe.allocates:
            return []
        planned = planned_active(self.todo, index, module.shared)

        def loss(module: SparseMlp, trial: Trial) -> float:
            return trial.output_error(module, metric)

        here = sample.on(module.device)
        rows = candidates(module, planned, self.recipe, here, loss)
        set_density(module, rows[nearest(rows, planned)])
        named = ((row, row.selection.settings()) for row in rows)
        return [
            {"active": row.active, "cost": row.cost, "loss": row.loss, "selection": settings}
            for row, settings in named
        ]


def _measured(behind: Iterator[Tensor], states: States, powers: list[Tensor]) -> Iterator[Tensor]:
    """The same states; adds what the residual stream's tokens measure to `powers`."""
    for batch, hidden in zip(states.batches, behind, strict=True):
        powers.append(squared_norms(hidden, batch.mask()))
        yield hidden


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
        self.check = AsRouted(task, model)
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
        with self.check.checking():
            self.layerwise.run(index, *next(self.routed.before(index)))
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

    def record(self, source: States | None) -> dict[str, Any]:
        """The evaluation, made of the last states; against those of the `source`, where the result is rounded."""
        batches, model = self.routed.batches, self.layerwise.model
        sinks_BT = [
            None if answer_of(model).pooled else row_T[None, : len(sample.inputs["input_ids"])]
            for batch, sinks in zip(batches, self.sinks, strict=True)
            for sample, row_T in zip(batch.samples, sinks.marked_BT, strict=True)
        ]
        every = judged(
            self._left(self.routed),
            _singles(batches),
            self._left(source or self.dense),
            figures_of(model),
        )
        documents, kl = document_sums(every, sinks_BT, None)
        record = summarise(documents, kl, self.load, self.quality, self.heads, seed=0)
        return record if source is None else {**record, "dense": UNROUNDED}


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
