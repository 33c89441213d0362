"""One streaming pass over the moefied model: the ledger of every layer for every token.

Memory is that of one batch and of what listens: inputs and masks of a batch are kept until its
pass is over, then every layer's ledger is made chunk by chunk and handed to the listeners.

Shapes: B documents, T tokens of a batch without padding, D width, N neurons, E experts.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.data.corpus import IGNORED, Batch
from moefy.evaluation.outputs import first_choices, run_outputs
from moefy.experts.passes import Heard, observing
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.inspection.account.ledger import Ledger, bare
from moefy.inspection.account.unembedding import Unembedding, scales
from moefy.inspection.texts.reading import Reading
from moefy.inspection.texts.tokens import NONE, Tokens
from moefy.run.console import Reporter

_ENTRIES = 2**22
"""Most activations of a chunk, so that a ledger takes some tens of megabytes."""


class Listener(Protocol):
    """Whatever keeps sums over tokens."""

    def hear(self, ledger: Ledger) -> None:
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
    numbers = range(len(reading.batches)) if batches is None else batches
    for number in report.track(numbers, what):
        for ledger in _ledgers(model, reading, number, unembedding):
            for listener in listeners:
                listener.hear(ledger)


def _ledgers(
    model: PreTrainedModel, reading: Reading, number: int, unembedding: Unembedding | None
) -> Iterator[Ledger]:
    """The ledgers of one batch, chunk by chunk."""
    batch, layers = reading.batches[number], _Layers()
    with observing(model, batch, layers, scores=True), scales(unembedding) as sigma:
        outputs = run_outputs(model, batch, keep_BT=batch.mask())
    with scales(unembedding) as of_head:
        predicted_T = first_choices(outputs) if outputs.is_logits else None
    scale_T = None if of_head or not sigma else sigma[-1].flatten()[_kept(batch)]
    if of_head:  # a norm behind the last hidden states runs as logits are made, chunk by chunk
        scale_T = torch.cat([sigma_1C.flatten() for sigma_1C in of_head])
    tokens = tokens_of(batch, reading.first_B[number], predicted_T)
    for layer, module in sparse_mlps(model).items():
        # Of one layer at a time: in fp32 the weights of all may be twice the model.
        weights, heard = bare(module), layers.heard[layer]
        size = max(1, _ENTRIES // weights.neurons)
        for first in range(0, len(heard.x_TD), size):
            at = slice(first, first + size)
            yield Ledger(
                layer, module, weights, heard.x_TD[at], heard.mask_TE[at].bool(),
                None if heard.scores_TE is None else heard.scores_TE[at],
                tokens.take(at),
                None if scale_T is None else scale_T[at],
            )  # fmt: skip


class _Layers:
    """Keeps what every layer read and ran until its pass is over."""

    def __init__(self) -> None:
        self.heard: dict[int, Heard] = {}

    def hear(self, heard: Heard) -> None:
        self.heard[heard.layer] = heard


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
