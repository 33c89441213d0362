"""How well each neuron tells a concept apart: AUROC of its contribution norm, while tokens stream by.

The score of neuron j is `|h_j| ||d_j||`, which no rescale of the neuron changes. Scores are counted in
bins of a quarter of an octave around the layer's mean; the AUROC is that of the binned score, ties counted
half (Zhang et al. 2023 use average precision and the better of both signs, which is inflated where
a concept is rare; one sign alone is not).

Concepts are the domains of documents and the classes of tokens. First tokens are left out.

Shapes: T tokens, N neurons, C concepts, B bins.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moefy.interpret.ledger import Ledger
from moefy.interpret.reading import Reading
from moefy.interpret.statistics import Floats
from moefy.interpret.token_classes import classes_of, token_classes
from moefy.interpret.token_draw import uniforms
from moefy.interpret.tokens import HELD_OUT, SELECT, Ints, Tokens

TOKENS = 20_000
"""About the most tokens of each layer and shard."""
BINS = 48
_OCTAVE = 4
_LOWEST = -8
"""Bin 0 holds all below about 2^-8 of the layer's mean score; the last begins at 2^3.75 of it."""


Part = tuple[tuple[int, int] | None, dict[str, NDArray[Any]], dict[str, NDArray[np.bool_]]]


class Scales:
    """Mean score of every layer over the first tokens that are heard: what bins are set around.

    Where several processes listen, all are to have heard the same batch first.
    """

    def __init__(self) -> None:
        self.mean: dict[int, float] = {}

    def add(self, ledger: Ledger) -> None:
        """Take in one layer and a chunk of tokens."""
        later_T = torch.from_numpy(ledger.tokens.position_T > 0).to(ledger.x_TD.device)
        if ledger.layer not in self.mean and bool(later_T.any()):
            score_TN = ledger.h_TN[later_T].abs() * ledger.mlp.down_ND.norm(dim=1)
            self.mean[ledger.layer] = float(score_TN.mean()) or 1.0


class Predictivity:
    """Listens to ledgers; memory is `2 L 2 (C + 1) N B` bytes."""

    def __init__(self, reading: Reading, *, tokens: int = TOKENS, seed: int = 0) -> None:
        documents = reading.documents
        self.classes = token_classes(reading.tokenizer, reading.vocabulary)
        self.domain_D, self.seed = documents.domain_D, seed
        self.names = [*documents.domains, *self.classes]
        self.kinds = ["domain"] * len(documents.domains) + ["class"] * len(self.classes)
        self.domains = len(documents.domains)
        self.shard_D = {SELECT: documents.of_shard(SELECT), HELD_OUT: documents.of_shard(HELD_OUT)}
        self.share = {
            shard: tokens / max(1, int(reading.tokens_D[here].sum()))
            for shard, here in self.shard_D.items()
        }
        # The draw may give some tokens more than was asked for, never twice as many.
        self.dtype: np.dtype[Any] = np.dtype(np.uint16 if 2 * tokens < 2**16 else np.uint32)
        self.counts: dict[tuple[int, str], NDArray[Any]] = {}
        """By layer and shard `[C + 1, N, B]`; the last row counts all tokens."""
        self.scales = Scales()
        self.neurons: dict[int, tuple[int, int]] = {}
        self.seen = {
            shard: np.zeros((len(self.names), len(documents)), dtype=bool) for shard in self.share
        }

    def add(self, ledger: Ledger) -> None:
        """Take in one layer and a chunk of tokens."""
        tokens, layer = ledger.tokens, ledger.layer
        self.scales.add(ledger)
        drawn_T, later_T = uniforms(tokens, self.seed), tokens.position_T > 0
        for shard, here_D in self.shard_D.items():
            here_T = here_D[tokens.document_T] & later_T & (drawn_T < self.share[shard])
            if here_T.any():
                at_T = torch.from_numpy(here_T).to(ledger.x_TD.device)
                self._count(ledger, layer, shard, ledger.h_TN[at_T], tokens.take(here_T))

    def _count(
        self, ledger: Ledger, layer: int, shard: str, h_TN: torch.Tensor, tokens: Tokens
    ) -> None:
        score_TN = h_TN.abs() * ledger.mlp.down_ND.norm(dim=1)
        neurons = score_TN.shape[1]
        self.neurons[layer] = (neurons, ledger.experts)
        if (layer, shard) not in self.counts:
            shape = (len(self.names) + 1, neurons, BINS)
            self.counts[layer, shard] = np.zeros(shape, dtype=self.dtype)
        level_TN = score_TN.div_(self.scales.mean[layer]).log2_().sub_(_LOWEST).mul_(_OCTAVE)
        level_TN.clamp_(0, BINS - 1)
        cell_TN = (level_TN.int() + torch.arange(neurons, device=h_TN.device) * BINS).cpu().numpy()
        member_CT = self.members(tokens)
        counts = self.counts[layer, shard]
        for concept, member_T in enumerate(member_CT):
            if member_T.any():
                cells = np.bincount(cell_TN[member_T].ravel(), minlength=neurons * BINS)
                counts[concept] += cells.reshape(neurons, BINS).astype(self.dtype)
                self.seen[shard][concept, tokens.document_T[member_T]] = True
        cells = np.bincount(cell_TN.ravel(), minlength=neurons * BINS)
        counts[-1] += cells.reshape(neurons, BINS).astype(self.dtype)

    def part(self, layer: int) -> Part | None:
        """What was heard of a layer, and which documents: what `merge` takes."""
        counts = {shard: self.counts[at, shard] for at, shard in self.counts if at == layer}
        return self.neurons.get(layer), counts, self.seen

    def merge(self, layer: int, part: Part) -> None:
        """Take in what was heard of other documents, with the same `scales`."""
        neurons, counts, seen = part
        if neurons is not None:
            self.neurons[layer] = neurons
        for shard, counts_CNB in counts.items():
            if (layer, shard) in self.counts:
                self.counts[layer, shard] += counts_CNB
            else:
                self.counts[layer, shard] = counts_CNB
        for shard, seen_CD in seen.items():
            self.seen[shard] |= seen_CD

    def members(self, tokens: Tokens) -> NDArray[np.bool_]:
        """Which tokens `[C, T]` are of each concept."""
        domain_T = self.domain_D[tokens.document_T]
        domains = domain_T == np.arange(self.domains)[:, None]
        return np.concatenate([domains, classes_of(tokens.ids_T, self.classes)])

    def positives(self, layer: int, shard: str) -> Ints:
        """Tokens of each concept `[C]` that were counted."""
        return np.asarray(self.counts[layer, shard][:-1, 0].sum(1, dtype=np.int64))

    def auroc(self, layer: int, shard: str) -> Floats:
        """AUROC `[C, N]` of every neuron for every concept against all other tokens; NaN where a concept
        has no tokens, or all."""
        counts = self.counts[layer, shard]
        found = np.full((len(self.names), counts.shape[1]), np.nan)
        for concept, inside_NB in enumerate(counts[:-1].astype(float)):
            outside_NB = counts[-1] - inside_NB
            below_NB = outside_NB.cumsum(1) - outside_NB / 2
            pairs = inside_NB[0].sum() * outside_NB[0].sum()
            if pairs:
                found[concept] = (inside_NB * below_NB).sum(1) / pairs
        return found
