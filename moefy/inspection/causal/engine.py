"""The exact effect of replacing neurons, without running again what they cannot change.

A batch is run once; the output of every block, and the input and mask of every MLP, are kept. What a
set of neurons of layer l changes is `sum_j m_j (c_j - v_j) d_j`, with `v_j = r_e h_j` as in
`moefy.experts.interventions`, which also says what c_j is. The run is then taken up as late as it can be:

    after    block l hands on its output plus that change, and the blocks behind it run
    within   the blocks before l hand on what they gave, block l and those behind it run
    whole    everything runs

Which of these gives the result of a whole run is measured on the model, never assumed: `after` does
where the block adds the MLP to its output last, which a norm behind the MLP undoes.

Memory of `of_sets`: 8 bytes x S x J for the sets that are run together, J judged tokens of all texts.

Shapes: T positions of a batch, N neurons in expert order, D width; S sets of neurons, Q documents, C domains.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.data.corpus import Batch
from moefy.evaluation.outputs import Outputs, difference
from moefy.evaluation.statistics import Floats
from moefy.experts.interventions import ExpertStatistics, experts
from moefy.experts.moefied import of
from moefy.experts.passes import watching
from moefy.experts.sparse_mlp import all_experts, sparse_mlps
from moefy.inspection.causal.documents import Texts
from moefy.inspection.causal.token_losses import Reference, output
from moefy.methods.partition.canonical import canonical_order
from moefy.models.mlp import DenseMlp
from moefy.run.console import Reporter
from moefy.run.processes import ALONE, Processes

Neurons = Mapping[int, Tensor]
"""Neurons that are replaced, bool `[N]` by layer; a layer that is not named keeps all of its own."""
Pair = tuple[int, int]
"""Layer and expert."""
DENSE, MOEFIED = "dense", "moefied"
AFTER, WITHIN, WHOLE = "after", "within", "whole"
_CLOSE, _ROUNDINGS = 1e-3, 8
"""Largest error of a shortcut, as a share of the change that it computes; in 16 bits, rounding errors."""


class AblationEngine:
    """Runs batches of a model with neurons replaced, as the dense model or as the moefied one."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        which: str = DENSE,
        mode: str = "mean",
        means: ExpertStatistics | None = None,
        start: str = "",
        processes: Processes = ALONE,
    ) -> None:
        """`means` are those of `moefy.experts.interventions.statistics` of the same `which`, for the modes
        `mean` and `peak`. `start` is where runs are taken up; left out, `shortcut` finds it.
        `processes` share out the batches of `of_sets` and `attribution`, and need a `start`."""
        self.model, self.which, self.mode, self.means = model, which, mode, means
        self.modules = sparse_mlps(model)
        self.blocks = [model.get_submodule(site.layer) for site in of(model).sites]
        self.start, self.processes = start, processes

    @property
    def experts(self) -> list[Pair]:
        """All experts of the model, layer by layer."""
        return [(at, expert) for at, m in self.modules.items() for expert in range(m.experts)]

    def running(self) -> AbstractContextManager[None]:
        """The model as this engine runs it."""
        return self._densely() if self.which == DENSE else nullcontext()

    @contextmanager
    def _densely(self) -> Iterator[None]:
        """Every expert on, and computed without looking at a mask that hides nothing."""
        modules = list(self.modules.values())
        for module in modules:
            vars(module)["compute"] = _all
        try:
            with all_experts(self.model):
                yield
        finally:
            for module in modules:
                del vars(module)["compute"]

    def replacing(self, neurons: Neurons) -> AbstractContextManager[None]:
        """The model with these neurons, bool `[N]` by layer, replaced."""
        masks = [
            neurons.get(layer, torch.zeros(module.weights.neurons, dtype=torch.bool))
            for layer, module in self.modules.items()
        ]
        return experts(self.model, ablate=masks, mode=self.mode, means=self.means)

    def canonical_order(self, layer: int) -> NDArray[np.int64]:
        """Neurons of a layer in an order that neither a permutation nor a rescale changes."""
        return np.asarray(canonical_order(self.modules[layer].weights.on_cpu()).numpy())

    @contextmanager
    def without(self, neurons: Neurons) -> Iterator[None]:
        """The model as this engine runs it, with these neurons replaced."""
        with self.running(), self.replacing(neurons):
            yield

    @torch.no_grad()
    def changes(
        self, batches: Iterable[Batch], layers: Iterable[int]
    ) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """What replacing all neurons of these layers changes: layer, `c_j - v_j` `[T, N]` of the tokens
        of a batch, `d` `[N, D]`, and the document of every token `[T]`, numbered over all batches."""
        first = 0
        for batch in batches:
            base, mask_BT = self.base(batch), batch.mask()
            assert mask_BT is not None
            row_BT = torch.arange(first, first + len(mask_BT))[:, None].expand(mask_BT.shape)
            first += len(mask_BT)
            for layer in layers:
                change_TN, down_ND = base.change(layer)
                keep_T = mask_BT.flatten().to(change_TN.device)
                document_T = row_BT.flatten().to(keep_T.device)[keep_T]
                yield layer, change_TN[keep_T], down_ND, document_T

    @torch.no_grad()
    def base(self, batch: Batch) -> "Base":
        """The run that effects are counted from."""
        if not self.start:
            self.start = self.shortcut(batch)
        return Base(self, batch)

    @torch.no_grad()
    def shortcut(self, batch: Batch) -> str:
        """How late a run may be taken up, from the effect of half of the first and the last layer."""
        if self.which == MOEFIED and any(m.look_ahead for m in self.modules.values()):
            return WHOLE  # a router reads the layer before, which would not have run
        trial = AblationEngine(self.model, which=DENSE, mode="zero", start=WHOLE)
        base = Base(trial, batch)
        for start in (AFTER, WITHIN):
            trial.start = start
            if all(self._agrees(trial, base, layer) for layer in (0, len(self.blocks) - 1)):
                return start
        return WHOLE

    def _agrees(self, trial: "AblationEngine", base: "Base", layer: int) -> bool:
        half_N = torch.zeros(self.modules[layer].weights.neurons, dtype=torch.bool)
        half_N[: len(half_N) // 2] = True
        with trial.without({layer: half_N}):
            whole = output(self.model, base.batch)
        short = base.output({layer: half_N})
        error, size = difference(short, whole)[0], difference(whole, base.out)[0]
        eps = torch.finfo(self.model.dtype).eps
        return error <= max(_CLOSE, _ROUNDINGS * eps) * size


class Base:
    """One batch as it runs with nothing replaced, and what it becomes when neurons are."""

    def __init__(self, engine: AblationEngine, batch: Batch) -> None:
        self.engine, self.batch = engine, batch
        self.outputs: list[Any] = [None] * len(engine.blocks)
        """What every block gave."""
        self.x: dict[int, Tensor] = {}
        self.mask: dict[int, Tensor] = {}
        with engine.running(), self._keeping():
            self.out = output(engine.model, batch)
        self.reference = Reference(self.out)
        self._change: tuple[int, Tensor, Tensor] | None = None

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        def keep_output(layer: int, _: nn.Module, __: Any, output: Any) -> None:
            self.outputs[layer] = output

        def keep_input(layer: int, x_TD: Tensor, mask_TE: Tensor) -> None:
            self.x[layer], self.mask[layer] = x_TD, mask_TE

        with ExitStack() as hooks:
            for layer, block in enumerate(self.engine.blocks):
                hooks.enter_context(block.register_forward_hook(partial(keep_output, layer)))
            hooks.enter_context(watching(self.engine.modules, keep_input))
            yield

    @torch.no_grad()
    def change(self, layer: int) -> tuple[Tensor, Tensor]:
        """What replacing all neurons of a layer changes, `c_j - v_j` `[T, N]`, and `d` `[N, D]`."""
        if self._change is None or self._change[0] != layer:
            self._change = (layer, *self._changed(layer))
        return self._change[1:]

    def _changed(self, layer: int) -> tuple[Tensor, Tensor]:
        engine, module = self.engine, self.engine.modules[layer]
        x_TD, mask_TE = self.x[layer], self.mask[layer]
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        with engine.running():
            mlp = (module.weights if module.all_on else module.running).to(wide)
            run_TN = mlp.hidden(x_TD.to(wide))
            if not module.all_on:
                run_TN = run_TN * mask_TE.repeat_interleave(module.expert_size, dim=1)
            every_N = torch.ones(module.weights.neurons, dtype=torch.bool)
            places_BT = self.batch.mask()
            assert places_BT is not None
            with engine.replacing({layer: every_N}):
                assert module.intervention is not None
                replaced_TN = module.intervention(run_TN, places_BT.to(run_TN.device))
        return replaced_TN - run_TN, mlp.down_ND

    @torch.no_grad()
    def output(self, neurons: Neurons) -> Outputs:
        """What the model gives with these neurons replaced, bool `[N]` by layer."""
        engine, first = self.engine, min(neurons, default=0)
        if engine.start == AFTER and len(neurons) == 1:
            change_TN, down_ND = self.change(first)
            numbers = neurons[first].nonzero().flatten().to(change_TN.device)
            change_TD = change_TN[:, numbers] @ down_ND[numbers]
            with engine.running(), self._skipping(first + 1, change_TD):
                return output(engine.model, self.batch)
        skipped = first if engine.start != WHOLE else 0
        with engine.running(), self._skipping(skipped), engine.replacing(neurons):
            return output(engine.model, self.batch)

    @contextmanager
    def _skipping(self, count: int, change_TD: Tensor | None = None) -> Iterator[None]:
        """The first `count` blocks hand on what they gave, the last of them plus a change."""
        blocks = self.engine.blocks[:count]
        before = [vars(block).get("forward") for block in blocks]
        for number, block in enumerate(blocks):
            output = self.outputs[number]
            if change_TD is not None and number == count - 1:
                output = _plus(output, change_TD)
            block.forward = _giving(output)
        try:
            yield
        finally:
            for block, own in zip(blocks, before, strict=True):
                del block.forward
                if own is not None:
                    block.forward = own


def _all(x_TD: Tensor, _: Tensor, weights: DenseMlp) -> Tensor:
    return weights(x_TD)


def _plus(output: Any, change_TD: Tensor) -> Any:
    """What a block gave, with a change of its hidden state; some give a tuple that it heads."""
    if isinstance(output, Tensor):
        return output + change_TD.view(output.shape).to(output.dtype)
    return (_plus(output[0], change_TD), *output[1:])


def _giving(output: Any) -> Any:
    return lambda *_, **__: output


@dataclass(frozen=True)
class Effects:
    """Loss increase of S sets, by document and domain; `kl` is NaN for encoders."""

    ce_SQ: Floats
    """Mean over the tokens of a document of the rise in cross-entropy, or of 1 - cosine."""
    kl_SQ: Floats
    kl_p99_SC: Floats
    """Quantile over the tokens of a domain."""

    @classmethod
    def join(cls, parts: Iterable["Effects"]) -> "Effects":
        """Several runs of sets as one."""
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*map(np.concatenate, columns))

    def take(self, index: slice | NDArray[np.int64] | list[int]) -> "Effects":
        """Some of the sets."""
        return Effects(self.ce_SQ[index], self.kl_SQ[index], self.kl_p99_SC[index])

    def by_domain(self, texts: Texts) -> Floats:
        """Mean loss increase over the documents of every domain `[S, C]`."""
        return means(self.ce_SQ, texts.documents.domain_Q, len(texts.documents.domains))


def means(values_SQ: Floats, domain_Q: NDArray[np.int64], domains: int) -> Floats:
    """Mean of every row over the documents of each domain `[S, C]`; NaN if there is none."""
    member_QC = np.eye(domains)[domain_Q]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(values_SQ @ member_QC / member_QC.sum(0))


def of_layer(engine: AblationEngine, layer: int, numbers: NDArray[np.int64]) -> Neurons:
    """Some neurons of one layer, by their numbers."""
    chosen_N = torch.zeros(engine.modules[layer].weights.neurons, dtype=torch.bool)
    chosen_N[torch.from_numpy(numbers)] = True
    return {layer: chosen_N}


def neurons_of(engine: AblationEngine, layer: int, expert: int) -> NDArray[np.int64]:
    """Numbers of the neurons of an expert."""
    size = engine.modules[layer].expert_size
    return np.arange(expert * size, (expert + 1) * size)


def of_experts(engine: AblationEngine, pairs: Iterable[Pair]) -> Neurons:
    """The neurons of these experts, of any layers."""
    neurons: dict[int, Tensor] = {}
    for layer, expert in pairs:
        (here_N,) = of_layer(engine, layer, neurons_of(engine, layer, expert)).values()
        neurons[layer] = neurons[layer] | here_N if layer in neurons else here_N
    return neurons


@torch.no_grad()
def of_sets(
    engine: AblationEngine, texts: Texts, sets: Sequence[Neurons], report: Reporter, what: str
) -> Effects:
    """Effects of sets of neurons; fastest where sets of one layer stand side by side."""
    own = []
    for number in report.track(engine.processes.mine(range(len(texts.batches))), what):
        base = engine.base(texts.batches[number])
        # Loss increase and KL of every set, token by token.
        values_2SJ = np.full((2, len(sets), len(base.out)), np.nan, np.float32)
        for row, neurons in enumerate(sets):
            ce_J, kl_J = base.reference.compare(base.output(neurons))
            values_2SJ[0, row] = ce_J.cpu().numpy()
            if kl_J is not None:
                values_2SJ[1, row] = kl_J.cpu().numpy()
        own.append((number, values_2SJ))
    ce_SJ, kl_SJ = np.concatenate(engine.processes.in_order(own), axis=2)
    return _summed(ce_SJ, kl_SJ, texts)


def _summed(ce_SJ: NDArray[np.float32], kl_SJ: NDArray[np.float32], texts: Texts) -> Effects:
    tokens_Q, domains = texts.tokens_Q, len(texts.documents.domains)
    starts_Q = np.concatenate([[0], np.cumsum(tokens_Q)[:-1]])
    domain_J = np.repeat(texts.documents.domain_Q, tokens_Q)
    ce_SQ, kl_SQ = (
        np.add.reduceat(values.astype(np.float64), starts_Q, axis=1) / tokens_Q
        for values in (ce_SJ, kl_SJ)
    )
    p99_SC = np.stack(
        [np.quantile(kl_SJ[:, domain_J == c].astype(float), 0.99, axis=1) for c in range(domains)],
        axis=1,
    )
    return Effects(ce_SQ, kl_SQ, p99_SC)
