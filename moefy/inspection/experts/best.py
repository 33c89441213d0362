"""The records of the largest keys for every expert, kept while tokens stream by.

One accumulator serves every panel of examples: the key is a norm, a share, a closeness to the
threshold or a random number, and what is kept is the same.

Shapes: T tokens of a chunk, E experts, N records, C candidates, W tokens of a window.
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moefy.data.documents import Ints
from moefy.evaluation.statistics import Floats
from moefy.inspection.account.ledger import Ledger
from moefy.inspection.texts.tokens import Tokens

Array = NDArray[Any]


@dataclass(frozen=True)
class Chunk:
    """A ledger's figures `[T, E]` on the CPU."""

    tokens: Tokens
    norm_TE: Array
    share_TE: Array
    margin_TE: Array
    """NaN where nothing is scored, and where all or none of the routed experts ran."""
    ran_TE: Array

    @classmethod
    def of(cls, ledger: Ledger) -> "Chunk":
        """The figures of one layer and a chunk of tokens."""
        norm_TE = ledger.norm_TE.cpu().numpy()
        margin_TE = np.full_like(norm_TE, np.nan)
        if ledger.margin_TE is not None:
            ran_TE = ledger.mask_TE[:, ledger.module.shared :]
            # A token that ran all or none of the routed experts has no threshold.
            some_T1 = ran_TE.any(1, keepdim=True) & ~ran_TE.all(1, keepdim=True)
            margin_TE[:, ledger.module.shared :] = (
                ledger.margin_TE.masked_fill(~some_T1, torch.nan).cpu().numpy()
            )
        return cls(
            ledger.tokens,
            norm_TE,
            ledger.share_TE.cpu().numpy(),
            margin_TE,
            ledger.mask_TE.cpu().numpy(),
        )


@dataclass
class Records:
    """What is known of the kept tokens of every expert `[E, N]`."""

    key_EN: Floats
    """Minus infinity where there is no record."""
    document_EN: Ints
    position_EN: Ints
    norm_EN: Array
    share_EN: Array
    margin_EN: Array
    ran_EN: Array
    window_ENW: Array
    """Norms of the tokens around, NaN where there are none or they were in another chunk."""


class Best:
    """Keeps N records of each expert: those of the largest keys, in descending order."""

    def __init__(
        self, experts: int, size: int, *, reach: int = 0, by_document: bool = False
    ) -> None:
        """`reach` tokens to either side go into the window; 0 keeps none. With `by_document` a
        document has one record at most, its best."""
        shape = (experts, size)
        self.reach, self.by_document = reach, by_document
        self.records = Records(
            np.full(shape, -np.inf),
            np.full(shape, -1),
            np.full(shape, -1),
            np.full(shape, np.nan, dtype=np.float32),
            np.full(shape, np.nan, dtype=np.float32),
            np.full(shape, np.nan, dtype=np.float32),
            np.zeros(shape, dtype=bool),
            np.full((*shape, 2 * reach + 1 if reach else 0), np.nan, dtype=np.float16),
        )

    def merge(self, other: Records) -> None:
        """Take in the records of other documents; equal keys stand in the order of their tokens."""
        both = {
            field.name: np.concatenate(
                [getattr(self.records, field.name), getattr(other, field.name)], axis=1
            )
            for field in fields(Records)
        }
        order_EN = np.lexsort((both["position_EN"], both["document_EN"], -both["key_EN"]), axis=1)
        order_EN = order_EN[:, : self.records.key_EN.shape[1]]
        window_ENW = np.take_along_axis(both.pop("window_ENW"), order_EN[..., None], axis=1)
        taken = {name: np.take_along_axis(value, order_EN, 1) for name, value in both.items()}
        self.records = Records(**taken, window_ENW=window_ENW)

    def add(self, key_CE: Floats, at_CE: Ints, chunk: Chunk) -> None:
        """Offer candidates: their keys, and the token of the chunk that each is."""
        kept = self.records
        size = kept.key_EN.shape[1]
        hopeful_C = (key_CE > kept.key_EN[:, -1]).any(1)
        if not hopeful_C.any():
            return
        key_EC, at_EC = key_CE[hopeful_C].T, at_CE[hopeful_C].T
        expert_E1 = np.arange(len(key_EC))[:, None]
        tokens = chunk.tokens
        new = Records(
            key_EC,
            tokens.document_T[at_EC],
            tokens.position_T[at_EC],
            chunk.norm_TE[at_EC, expert_E1],
            chunk.share_TE[at_EC, expert_E1],
            chunk.margin_TE[at_EC, expert_E1],
            chunk.ran_TE[at_EC, expert_E1],
            kept.window_ENW[:, :0],
        )
        both = {
            field.name: np.concatenate([getattr(kept, field.name), getattr(new, field.name)], 1)
            for field in fields(Records)
            if field.name != "window_ENW"
        }
        if self.by_document:
            _drop_repeats(both["key_EN"], both["document_EN"])
        order_EN = np.argsort(-both["key_EN"], axis=1, kind="stable")[:, :size]
        taken = {name: np.take_along_axis(value, order_EN, 1) for name, value in both.items()}
        window_ENW = kept.window_ENW
        if self.reach:
            window_ENW = np.take_along_axis(
                window_ENW, np.minimum(order_EN, size - 1)[..., None], axis=1
            )
            expert, place = np.nonzero(order_EN >= size)
            at = at_EC[expert, order_EN[expert, place] - size]
            window_ENW[expert, place] = _windows(chunk, at, expert, self.reach)
        self.records = Records(**taken, window_ENW=window_ENW)


def best_of_documents(key_CE: Floats, row_C: Ints, document_C: Ints) -> tuple[Floats, Ints]:
    """The largest key of every document `[documents, E]` and the token that has it, the first of
    equals; tokens of a document follow each other."""
    starts = np.flatnonzero(np.diff(document_C, prepend=-1))
    best = np.maximum.reduceat(key_CE, starts, axis=0)
    run_C = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, len(document_C))))
    first_CE = np.where(key_CE == best[run_C], np.arange(len(row_C))[:, None], len(row_C))
    return best, row_C[np.minimum.reduceat(first_CE, starts, axis=0)]


def _drop_repeats(key_EN: Floats, document_EN: Ints) -> None:
    """Leave each document its best record: the keys of the others become minus infinity."""
    order_EN = np.argsort(-key_EN, axis=1, kind="stable")
    document = np.take_along_axis(document_EN, order_EN, 1)
    by_document = np.argsort(document, axis=1, kind="stable")
    document = np.take_along_axis(document, by_document, 1)
    expert, place = np.nonzero(document[:, 1:] == document[:, :-1])
    key_EN[expert, order_EN[expert, by_document[expert, place + 1]]] = -np.inf


def _windows(chunk: Chunk, at_R: Ints, expert_R: Ints, reach: int) -> Array:
    """Norms `[R, W]` of the tokens around, NaN outside the document or the chunk."""
    at_RW = at_R[:, None] + np.arange(-reach, reach + 1)
    inside_RW = (at_RW >= 0) & (at_RW < len(chunk.tokens))
    at_RW = np.where(inside_RW, at_RW, at_R[:, None])
    document_T = chunk.tokens.document_T
    inside_RW &= document_T[at_RW] == document_T[at_R][:, None]
    return np.where(inside_RW, chunk.norm_TE[at_RW, expert_R[:, None]], np.nan)
