"""One streaming pass over the moefied model: the ledger of every layer for every token.

Memory is that of one batch and of what listens: inputs and masks of a batch are kept until its
pass is over, then every layer's ledger is made chunk by chunk and handed to the listeners.

    observe(model, reading, listeners, batches=processes.mine(range(len(reading.batches))))
    gather(listeners, layers, processes)        # the first process now knows of all batches

After `gather`, counts, records and samples are exactly those of one process; sums are in fp64 and differ
in their last digits, because they are added up in another order. Nothing goes through a file.

Shapes: B documents, T tokens of a batch without padding, D width, N neurons, E experts.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.data.corpus import IGNORED, Batch
from moefy.evaluation.outputs import first_choices, run_outputs
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.inspection.account.ledger import Ledger, bare
from moefy.inspection.account.unembedding import Unembedding, scales
from moefy.inspection.texts.reading import Reading
from moefy.inspection.texts.tokens import NONE, Tokens
from moefy.run.console import Reporter
from moefy.run.processes import Processes

_ENTRIES = 2**22
"""Most activations of a chunk, so that a ledger takes some tens of megabytes."""


class Listener(Protocol):
    """Whatever keeps sums over tokens."""

    def add(self, ledger: Ledger) -> None:
        """Take in one layer and a chunk of tokens."""


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    reading: Reading,
    listeners: Iterable[Listener],
    *,
    unembedding: Unembedding | None = None,
    batches: list[int] | None = None,
    report: Reporter | None = None,
    what: str = "observe experts",
) -> None:
    """Run the model as it is over the batches and let the listeners hear every ledger.

    `batches` are the numbers of those to read (a process's share); None is all. Inside
    `all_experts(model)` every expert runs, which is the dense model.
    """
    listeners, report = list(listeners), report or Reporter(quiet=True)
    modules = sparse_mlps(model)
    numbers = range(len(reading.batches)) if batches is None else batches
    for number in report.track(numbers, what):
        batch = reading.batches[number]
        with _recording(modules) as heard, scales(unembedding) as sigma:
            said = run_outputs(model, batch, keep_BT=batch.mask())
        with scales(unembedding) as of_head:
            predicted_T = first_choices(said) if said.is_logits else None
        tokens = tokens_of(batch, reading.first_B[number], predicted_T)
        keep_T = _kept(batch)
        scale_T = None if of_head or not sigma else sigma[-1].flatten()[keep_T]
        if of_head:  # a norm behind the last hidden states runs as logits are made, chunk by chunk
            scale_T = torch.cat([sigma_1C.flatten() for sigma_1C in of_head])
        for layer, module in modules.items():
            given = heard[layer]
            scores_TE = None if given.scores_TE is None else given.scores_TE[keep_T]
            # Of one layer at a time: in fp32 the weights of all may be twice the model.
            weights = bare(module)
            size = max(1, _ENTRIES // weights.neurons)
            x_TD, mask_TE = given.x_TD[keep_T], given.mask_TE[keep_T]
            for first in range(0, len(x_TD), size):
                at = slice(first, first + size)
                ledger = Ledger(
                    layer, module, weights, x_TD[at], mask_TE[at],
                    None if scores_TE is None else scores_TE[at],
                    tokens.take(at),
                    None if scale_T is None else scale_T[at],
                )  # fmt: skip
                for listener in listeners:
                    listener.add(ledger)


@dataclass
class _Heard:
    """What one layer read and ran, padding included."""

    x_TD: Tensor
    mask_TE: Tensor
    scores_TE: Tensor | None = None


@contextmanager
def _recording(modules: dict[int, SparseMlp]) -> Iterator[dict[int, _Heard]]:
    heard: dict[int, _Heard] = {}
    scored: dict[int, Tensor] = {}
    handles = []

    def listen(layer: int, module: SparseMlp) -> None:
        def observer(x_TD: Tensor, mask_TE: Tensor) -> None:
            heard[layer] = _Heard(x_TD, mask_TE.bool(), scored.pop(layer, None))

        def score(_: object, __: object, scores: Tensor) -> None:
            scored[layer] = scores.reshape(-1, scores.shape[-1])

        module.observer = observer
        point = module.get_submodule("hook_router_scores")
        handles.append(point.register_forward_hook(score))

    for layer, module in modules.items():
        listen(layer, module)
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
        for module in modules.values():
            module.observer = None


def _kept(batch: Batch) -> Tensor:
    """Places `[B * T]` of a batch that hold tokens (bool)."""
    mask = batch.mask()
    assert mask is not None
    return mask.flatten()


def tokens_of(batch: Batch, first: int, predicted_T: Tensor | None = None) -> Tokens:
    """The tokens of a batch whose first document has the number `first`.

    `predicted_T` is the token that is put first behind each; without it none is.
    """
    ids_BT = batch.inputs["input_ids"].numpy()
    rows, width = ids_BT.shape
    none_BT = np.full_like(ids_BT, NONE)
    previous_BT = np.concatenate([none_BT[:, :1], ids_BT[:, :-1]], axis=1)
    target_BT = none_BT
    if batch.targets_BT is not None:
        target_BT = batch.targets_BT.numpy()
        target_BT = np.where(target_BT == IGNORED, NONE, target_BT)
    position_BT = np.broadcast_to(np.arange(width), (rows, width))
    document_BT = np.broadcast_to(np.arange(first, first + rows)[:, None], (rows, width))
    keep_BT = _kept(batch).numpy().reshape(rows, width)
    grids = (ids_BT, previous_BT, target_BT, none_BT, position_BT, document_BT)
    columns = [grid[keep_BT].astype(np.int64) for grid in grids]
    if predicted_T is not None:
        columns[3] = predicted_T.cpu().numpy()
    return Tokens(*columns)


class Shared(Listener, Protocol):
    """A listener whose state can be sent and added to that of another, layer by layer."""

    def part(self, layer: int) -> Any:
        """What was heard of a layer, without model and texts; None where nothing was."""

    def merge(self, layer: int, part: Any) -> None:
        """Take in what another heard of a layer, of other documents."""


def gather(listeners: Sequence[Shared], layers: Iterable[int], processes: Processes) -> None:
    """Merge what all have heard into the listeners of the first process, one layer at a time so that no
    more is held twice. All processes call it with the same listeners and layers."""
    if processes.count == 1:
        return
    for layer in layers:
        for listener in listeners:
            parts = processes.all([listener.part(layer)])
            for part in parts[1:] if processes.main else ():
                if part is not None:
                    listener.merge(layer, part)
