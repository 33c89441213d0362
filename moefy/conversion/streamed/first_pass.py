"""The first pass: every layer is read once, measured, fitted and written.

All calibration tokens go through the model twice: densely, which says what experts should
have done, and through the experts fitted so far, which is what routers and thresholds will read.

Shapes: B documents, T tokens, D width.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moefy.conversion.allocate import Trial, candidates, nearest, set_density
from moefy.conversion.capture import domains_of
from moefy.conversion.fit import LayerTokens, planned_active, recalibrate_layer, varies
from moefy.conversion.layer import Fitted, LayerSample, fit_layer
from moefy.conversion.sensitivity import inverse_power, squared_norms
from moefy.conversion.streamed.layerwise import LayerwiseModel
from moefy.conversion.streamed.states import States, forward, inputs
from moefy.conversion.task import Conversion, Reading
from moefy.data.corpus import make_batches
from moefy.errors import CheckpointError, MoefyError
from moefy.experts.loading import install
from moefy.experts.placement import running_dtype
from moefy.experts.sparse_mlp import SparseMlp
from moefy.methods.base import stored
from moefy.models.artefact import LayerEntry
from moefy.models.checkpoint import Checkpoint, copy_folder, overwrite
from moefy.models.locate import Site, permute, read_mlp
from moefy.models.reorder import outlined


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
        self.dense, self.sparse = (
            {
                name: States.of(
                    f"{name}-{kind}", folder, self.layerwise, *groups[name], recipe.seed
                )
                for name in names
            }
            for kind, names in (
                ("dense", groups),
                ("sparse", [n for n in groups if n not in ("partition", "probe")]),
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
        tensors = {"permutation": fitted.tensors["permutation"]}
        result = Fitted(
            replace(fitted.entry, selection=selection),
            tensors | stored(module.router, module.compensation),
            fitted.fit,
        )
        in_tuple = self.layerwise.in_tuple
        self.task.keep(f"layers/{site.index}", result, candidates=rows, in_tuple=in_tuple)

    def _installed(self, site: Site, fitted: Fitted[LayerEntry], written: Checkpoint) -> SparseMlp:
        """Write the layer in expert order, and put its experts in the place of its MLP."""
        order_N = fitted.tensors["permutation"].long()
        for name, value in self.raw.items():
            disk = self.layerwise.names[name]
            overwrite(written.tensors[disk], permute(site, name, value, order_N))
        self.raw = {}
        moved = bool((order_N.diff() < 0).any())
        module = install(self.layerwise.model, site, fitted.entry, fitted.tensors, permute=moved)
        # The faster backend of the moment would decide the last bits of all that follows.
        module.backend = "masked"
        return module

    def _measure(self, site: Site) -> tuple[dict[str, Tensor], Tensor]:
        """Take all dense states through the layer; what its MLP reads `[T, D]` by group, and what its
        output errors cost (`moefy.conversion.sensitivity`)."""
        seen: dict[str, Tensor] = {}
        powers: list[Tensor] = []
        for name, states in self.dense.items():
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
        parameter = self.layerwise.model.get_parameter
        mlp = read_mlp(site, lambda name: parameter(name).detach().cpu())
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
