"""What replacing each of many sets of neurons does to every document.

Memory: 8 bytes x S x J for the sets that are run together, J judged tokens of all texts.

Shapes: S sets, D documents, C domains, J judged tokens, N neurons, E experts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from moefy.evaluation.statistics import Floats
from moefy.inspection.causal.documents import Texts
from moefy.inspection.causal.engine import Engine, Gone
from moefy.run.console import Reporter


@dataclass(frozen=True)
class Effects:
    """Damage of S sets, by document and domain; `kl` is NaN for encoders."""

    ce_SD: Floats
    """Mean over the tokens of a document of the rise in cross-entropy, or of 1 - cosine."""
    kl_SD: Floats
    kl_p99_SC: Floats
    """Quantile over the tokens of a domain."""

    @classmethod
    def join(cls, parts: Iterable["Effects"]) -> "Effects":
        """Several runs of sets as one."""
        given = list(parts)
        return cls(
            *(
                np.concatenate([getattr(part, name) for part in given])
                for name in ("ce_SD", "kl_SD", "kl_p99_SC")
            )
        )

    def take(self, index: slice | NDArray[np.int64] | list[int]) -> "Effects":
        """Some of the sets."""
        return Effects(self.ce_SD[index], self.kl_SD[index], self.kl_p99_SC[index])

    def by_domain(self, texts: Texts) -> Floats:
        """Mean damage over the documents of every domain `[S, C]`."""
        return means(self.ce_SD, texts.documents.domain_D, len(texts.documents.domains))


def means(values_SD: Floats, domain_D: NDArray[np.int64], domains: int) -> Floats:
    """Mean of every row over the documents of each domain `[S, C]`; NaN where there is none."""
    member_DC = np.eye(domains)[domain_D]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(values_SD @ member_DC / member_DC.sum(0))


def gone(engine: Engine, layer: int, numbers: NDArray[np.int64]) -> Gone:
    """Some neurons of one layer, by their numbers."""
    gone_N = torch.zeros(engine.modules[layer].weights.neurons, dtype=torch.bool)
    gone_N[torch.from_numpy(numbers)] = True
    return {layer: gone_N}


def neurons_of(engine: Engine, layer: int, expert: int) -> NDArray[np.int64]:
    """Numbers of the neurons of an expert."""
    size = engine.modules[layer].expert_size
    return np.arange(expert * size, (expert + 1) * size)


@torch.no_grad()
def of_sets(
    engine: Engine, texts: Texts, sets: Sequence[Gone], report: Reporter, what: str
) -> Effects:
    """Effects of sets of neurons; fastest where sets of one layer stand side by side."""
    own = []
    for number in report.track(engine.processes.mine(range(len(texts.batches))), what):
        base = engine.base(texts.batches[number])
        # Damage and KL of every set, token by token.
        found_2SJ = np.full((2, len(sets), len(base.out)), np.nan, np.float32)
        for row, neurons in enumerate(sets):
            ce_J, kl_J = base.reference.compare(base.output(neurons))
            found_2SJ[0, row] = ce_J.cpu().numpy()
            if kl_J is not None:
                found_2SJ[1, row] = kl_J.cpu().numpy()
        own.append((number, found_2SJ))
    ce_SJ, kl_SJ = np.concatenate(engine.processes.in_order(own), axis=2)
    return _summed(ce_SJ, kl_SJ, texts)


def _summed(ce_SJ: NDArray[np.float32], kl_SJ: NDArray[np.float32], texts: Texts) -> Effects:
    tokens_D, domains = texts.tokens_D, len(texts.documents.domains)
    starts_D = np.concatenate([[0], np.cumsum(tokens_D)[:-1]])
    domain_J = np.repeat(texts.documents.domain_D, tokens_D)
    ce_SD, kl_SD = (
        np.add.reduceat(values.astype(np.float64), starts_D, axis=1) / tokens_D
        for values in (ce_SJ, kl_SJ)
    )
    p99_SC = np.stack(
        [np.quantile(kl_SJ[:, domain_J == c].astype(float), 0.99, axis=1) for c in range(domains)],
        axis=1,
    )
    return Effects(ce_SD, kl_SD, p99_SC)
