"""The one loop behind every figure: run batches, compare with the dense model, sum by document.

    judgement = judge(partial(run_outputs, model), batches, dense)
    judgement.mean("kl")                 # per token
    judgement.sums_Q["ce"]               # of every document

Both sides are functions from a batch to its `Outputs`, or the outputs of all batches where they were
kept: one full copy of the outputs is the price of not running the dense model again.

Shapes: Q documents in the order of the batches, B documents of one, T positions, J judged ones.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moefy.data.corpus import Batch
from moefy.evaluation.outputs import Outputs, compared, placed, predictions

Floats = NDArray[np.float64]
Source = Callable[[Batch], Outputs] | Sequence[Outputs]
Figures = Callable[[Outputs, Outputs], dict[str, Tensor]]
"""From what is compared with, and what was run, to figures `[J]` by name."""


@dataclass(frozen=True)
class Judged:
    """One batch and its figures."""

    batch: Batch
    keep_BT: Tensor
    """Which positions were judged (bool)."""
    figures_J: dict[str, Tensor]

    def placed(self, name: str) -> Tensor:
        """One figure `[B, T]`, zero where nothing is judged; on the CPU."""
        return placed(self.figures_J[name], self.keep_BT)


@dataclass(frozen=True)
class Judgement:
    """Sums over the judged positions of every document."""

    sums_Q: dict[str, Floats]
    tokens_Q: Floats

    def mean(self, name: str) -> float:
        """A figure per judged position."""
        return float(self.sums_Q[name].sum() / self.tokens_Q.sum())


@torch.no_grad()
def judged(
    run: Source, batches: Iterable[Batch], dense: Source | None = None, of: Figures | None = None
) -> Iterator[Judged]:
    """Figures of every batch in turn; what dense says is made first, and then let go.

    Without `dense` outputs are judged by the text alone (`predictions`), else `compared`.
    """
    of = of or (predictions if dense is None else compared)
    for number, batch in enumerate(batches):
        want = None if dense is None else _outputs(dense, number, batch)
        got = _outputs(run, number, batch)
        yield Judged(batch, got.keep_BT, of(got if want is None else want, got))


def judge(
    run: Source, batches: Iterable[Batch], dense: Source | None = None, of: Figures | None = None
) -> Judgement:
    """`judged`, summed by document."""
    rows: dict[str, list[Floats]] = {}
    tokens: list[Floats] = []
    for one in judged(run, batches, dense, of):
        tokens.append(one.keep_BT.double().sum(1).numpy())
        for name, value_J in one.figures_J.items():
            sums_B = placed(value_J.double(), one.keep_BT).sum(1)
            rows.setdefault(name, []).append(sums_B.numpy())
    sums_Q = {name: np.concatenate(parts) for name, parts in rows.items()}
    return Judgement(sums_Q, np.concatenate(tokens))


def _outputs(source: Source, number: int, batch: Batch) -> Outputs:
    return source(batch) if callable(source) else source[number]
