"""Which tokens a figure is over: all of them, or some that deserve a look of their own.

    positions   all tokens; without position 0; without position 0 and the attention sinks
    strata      by how far down a bigram ranks the right token: first, 2 to 10, or below 10

A token stands at the position that is read; what it is judged by is the prediction made there. `tail`
says how unevenly the loss increase is spread over tokens: a mean hides the few that are ruined.

A token is a sink if in any layer of the dense pass the norm of its hidden state (the layer's output)
or of the MLP's input is more than 10 times the median over the tokens of its document. Such tokens
attract attention whatever they are, and a few of them decide every mean over squared activations
(massive activations, Sun et al. 2024).

Shapes: B documents, T tokens.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from moefy.data.corpus import Batch
from moefy.data.shards import Ints
from moefy.evaluation.statistics import ratios
from moefy.experts.passes import listen
from moefy.models.locate import Site, side_of

ALL, AFTER_FIRST, PLAIN, SINKS = "all", "without_first", "without_first_and_sinks", "sinks"
STRATA = {"rank_1": (1, 1), "rank_2_to_10": (2, 10), "rank_over_10": (11, 1 << 62)}
_SHOWN = ("kl", "cosine")

Sums = dict[str, dict[str, float]]
"""For one document, sums of every value over every group, and its number of `tokens`."""


def groups(keep_BT: Tensor, sinks_BT: Tensor | None, rank_BT: Tensor | None) -> dict[str, Tensor]:
    """The groups as marks `[B, T]` (bool); `keep_BT` marks the tokens that count at all.

    Without sinks, as for images, there are no positions; without ranks no strata.
    """
    found = {ALL: keep_BT}
    if sinks_BT is not None:
        first_BT = torch.zeros_like(keep_BT)
        first_BT[:, 0] = True
        found[AFTER_FIRST] = keep_BT & ~first_BT
        found[PLAIN] = keep_BT & ~first_BT & ~sinks_BT
        found[SINKS] = keep_BT & sinks_BT
    if rank_BT is not None:
        for name, (low, high) in STRATA.items():
            found[name] = keep_BT & (rank_BT >= low) & (rank_BT <= high)
    return found


def sums_of(values: dict[str, Tensor], marks: dict[str, Tensor]) -> list[Sums]:
    """For each document the sums of every value `[B, T]` over every group."""
    values = {**values, "tokens": torch.ones_like(marks[ALL], dtype=torch.float64)}
    table = {
        (group, name): torch.where(mark_BT, value_BT.double(), 0.0).sum(1).tolist()
        for group, mark_BT in marks.items()
        for name, value_BT in values.items()
    }
    return [
        {group: {name: table[group, name][row] for name in values} for group in marks}
        for row in range(len(marks[ALL]))
    ]


def group_record(documents: list[Sums], group: str, unit_Q: Ints, seed: int) -> dict[str, Any]:
    """One group: its tokens, its share of all tokens and of all KL, and its loss increase."""

    def column(name: str, of: str = group) -> Any:
        return np.array([doc[of][name] for doc in documents])

    tokens = column("tokens")
    sums = {"share": (tokens, column("tokens", ALL))}
    names = documents[0][group]
    sums |= {name: (column(name), tokens) for name in _SHOWN if name in names}
    if "kl" in names:
        sums["share_of_kl"] = column("kl"), column("kl", ALL)
    if "ce" in names:
        sums["ce_dense"] = column("ce_dense"), tokens
        sums["ce_increase"] = column("ce") - column("ce_dense"), tokens
    return {"tokens": int(tokens.sum()), **ratios(sums, unit_Q, seed=seed)}


TOP = 0.01
_QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}


def tail(values_T: NDArray[Any]) -> dict[str, float]:
    """Quantiles of a quantity over tokens, and the share of its sum in the top 1 % of tokens.

    The quantiles are interpolated linearly; the top 1 % is rounded up to whole tokens. The share
    is zero where the sum is.
    """
    top = np.sort(values_T)[-math.ceil(TOP * len(values_T)) :].sum(dtype=float)
    total = values_T.sum(dtype=float)
    found = {name: float(np.quantile(values_T, q)) for name, q in _QUANTILES.items()}
    return {**found, "top_1_percent_share": float(top / total) if total else 0.0}


TIMES_MEDIAN = 10.0


class Sinks:
    """Marks the sinks of one batch while a dense model runs it."""

    def __init__(self, keep_BT: Tensor) -> None:
        """`keep_BT` marks the real tokens."""
        self.keep_BT = keep_BT
        self.marked_BT = torch.zeros_like(keep_BT)

    def see(self, values: Tensor) -> None:
        """Mark by the norms of `[..., D]`, whose leading sizes are those of the batch."""
        norms = values.detach().float().norm(dim=-1).view(self.keep_BT.shape).cpu()
        median_B1 = norms.masked_fill(~self.keep_BT, torch.nan).nanmedian(1, keepdim=True).values
        self.marked_BT |= self.keep_BT & (norms > TIMES_MEDIAN * median_B1)


@contextmanager
def finding_sinks(model: PreTrainedModel, found: list[Site], batch: Batch) -> Iterator[Sinks]:
    """Mark sinks while this batch is run; in a model with an encoder too, those of the decoder."""
    keep_BT = batch.mask()
    assert keep_BT is not None
    sinks = Sinks(keep_BT)
    last = side_of(found[-1])
    here = [site for site in found if side_of(site) == last]

    def after(_: Any, __: Any, output: Any) -> None:
        sinks.see(output[0] if isinstance(output, tuple) else output)

    handles = listen(model, here, lambda _, x_TD: sinks.see(x_TD))
    handles += [model.get_submodule(s.layer).register_forward_hook(after) for s in here]
    try:
        yield sinks
    finally:
        for handle in handles:
            handle.remove()
