"""What replacing each of many sets of neurons does to every document.

Memory: 8 bytes x S x J for the sets that are run together, J judged tokens of all texts.

Shapes: S sets, Q documents, C domains, J judged tokens, N neurons, E experts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moefy.evaluation.statistics import Floats
from moefy.inspection.causal.documents import Texts
from moefy.inspection.causal.engine import Engine, Neurons, Pair
from moefy.run.console import Reporter


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
    """Mean of every row over the documents of each domain `[S, C]`; NaN where there is none."""
    member_QC = np.eye(domains)[domain_Q]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(values_SQ @ member_QC / member_QC.sum(0))


def of_layer(engine: Engine, layer: int, numbers: NDArray[np.int64]) -> Neurons:
    """Some neurons of one layer, by their numbers."""
    chosen_N = torch.zeros(engine.modules[layer].weights.neurons, dtype=torch.bool)
    chosen_N[torch.from_numpy(numbers)] = True
    return {layer: chosen_N}


def neurons_of(engine: Engine, layer: int, expert: int) -> NDArray[np.int64]:
    """Numbers of the neurons of an expert."""
    size = engine.modules[layer].expert_size
    return np.arange(expert * size, (expert + 1) * size)


def of_experts(engine: Engine, pairs: Iterable[Pair]) -> Neurons:
    """The neurons of these experts, of any layers."""
    neurons: dict[int, Tensor] = {}
    for layer, expert in pairs:
        (here_N,) = of_layer(engine, layer, neurons_of(engine, layer, expert)).values()
        neurons[layer] = neurons[layer] | here_N if layer in neurons else here_N
    return neurons


@torch.no_grad()
def of_sets(
    engine: Engine, texts: Texts, sets: Sequence[Neurons], report: Reporter, what: str
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
