"""Which documents effects are measured on: the same number of every domain, cut to their first tokens.

The unit is the document, so that many short documents tell more than a few long ones: they are cut
until every domain has `MIN_DOCUMENTS`, if it has that many.

Shapes: Q documents.
"""

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moefy.data.corpus import Batch, Sample, make_batches, sample_length
from moefy.data.documents import Documents, Ints
from moefy.evaluation.outputs import judged_positions
from moefy.evaluation.statistics import Floats
from moefy.inspection.texts import Reading

MIN_DOCUMENTS = 30
"""Below this many documents of a domain a figure is shown greyed out."""
LEAST = 16
"""Tokens that a document keeps at least."""
BATCH_TOKENS = 1024
"""Positions of a batch: what one layer makes of them stays in the processor's caches."""
_LOGITS = 2**26
_DOCUMENTS = 63


@dataclass(frozen=True)
class Texts:
    """Documents `[Q]`, numbered in the order of the batches."""

    batches: list[Batch]
    documents: Documents
    number_Q: Ints
    """Their numbers in the `Reading`."""
    length: int
    """Most tokens of a document."""

    @property
    def places_Q(self) -> Ints:
        """Tokens of every document, judged or not."""
        return np.concatenate([_tokens(batch).sum(1) for batch in self.batches])

    def even_Q(self, counts_Q: Ints) -> Floats:
        """The weight of a token of every document with which each domain counts alike, whatever its
        tokens, of which the documents have `counts_Q`; over all tokens 1."""
        domain_Q = self.documents.domain_Q
        per_C = 1 / np.bincount(domain_Q, counts_Q) / len(self.documents.domains)
        return np.asarray(per_C[domain_Q])

    @property
    def tokens_Q(self) -> Ints:
        """Tokens of every document that are judged: with a next token, or all for encoders."""
        return np.concatenate([judged_positions(batch).sum(1).numpy() for batch in self.batches])

    def counts(self) -> dict[str, Any]:
        """Columns of what a figure of a domain rests on, a row for each domain."""
        domain_Q, domains = self.documents.domain_Q, len(self.documents.domains)
        documents_C = np.bincount(domain_Q, minlength=domains)
        tokens_C = np.bincount(domain_Q, weights=self.tokens_Q, minlength=domains).astype(int)
        return {"documents": documents_C, "tokens": tokens_C, "few": documents_C < MIN_DOCUMENTS}


def _tokens(batch: Batch) -> Ints:
    mask_BT = batch.mask()
    assert mask_BT is not None
    return np.asarray(mask_BT.numpy(), dtype=np.int64)


def together(*parts: Texts) -> Texts:
    """Several texts as one."""
    return Texts(
        [batch for part in parts for batch in part.batches],
        Documents.joined([part.documents for part in parts]),
        np.concatenate([part.number_Q for part in parts]),
        max(part.length for part in parts),
    )


def draw(reading: Reading, shard: str, tokens: int, *, seed: int = 0) -> Texts:
    """About `tokens` tokens of one shard; domains in turn, each from as many sources as it has."""
    samples = [sample for batch in reading.batches for sample in batch.samples]
    chosen_Q = reading.documents.of_shard(shard)
    queues = _queues(reading.documents, chosen_Q, seed)
    count = sum(min(MIN_DOCUMENTS, len(queue)) for queue in queues)
    length = max(LEAST, tokens // max(count, 1))
    taken: list[int] = []
    left = tokens
    for turn in range(max(map(len, queues), default=0)):
        for queue in queues:
            if turn < len(queue) and left > 0:
                taken.append(queue[turn])
                left -= min(length, sample_length(samples[queue[turn]]))
    limit = min(BATCH_TOKENS, max(LEAST, _LOGITS // reading.vocabulary))
    groups = _groups(
        sorted(taken, key=lambda n: (sample_length(samples[n]), n)), samples, length, limit
    )
    cut = [
        [_cut(samples[number], min(length, _second(group, samples))) for number in group]
        for group in groups
    ]
    order = [number for group in groups for number in group]
    return Texts(
        [batch for group in cut for batch in make_batches(group, tokens=1 << 60)],
        reading.documents.take(order),
        np.array(order, dtype=np.int64),
        length,
    )


def _queues(documents: Documents, chosen_Q: np.ndarray, seed: int) -> list[list[int]]:
    """The documents of every domain in random order, those of one source as far apart as can be."""
    random, queues = np.random.default_rng([seed, 11]), []
    for domain in range(len(documents.domains)):
        numbers = random.permutation(np.flatnonzero(chosen_Q & (documents.domain_Q == domain)))
        before: dict[Hashable, int] = defaultdict(int)
        turns: list[tuple[int, int, int]] = []
        for number in numbers.tolist():
            source = documents.sources[number]
            turns.append((before[source], len(turns), number))
            before[source] += 1
        queues.append([number for _, _, number in sorted(turns)])
    return [queue for queue in queues if queue]


def _groups(order: list[int], samples: list[Sample], length: int, limit: int) -> list[list[int]]:
    """Documents of like length side by side; none alone, since `resample` takes from another."""
    groups: list[list[int]] = [[]]
    for number in order:
        size = (len(groups[-1]) + 1) * min(length, sample_length(samples[number]))
        if len(groups[-1]) > 1 and (size > limit or len(groups[-1]) >= _DOCUMENTS):
            groups.append([])
        groups[-1].append(number)
    if len(groups) > 1 and len(groups[-1]) == 1:
        groups[-2] += groups.pop()
    return groups


def _second(group: list[int], samples: list[Sample]) -> int:
    """Length of the longest document but one, so that no position belongs to one document alone."""
    lengths = sorted(sample_length(samples[number]) for number in group)
    return lengths[-2] if len(lengths) > 1 else lengths[-1]


def _cut(sample: Sample, length: int) -> Sample:
    inputs = {name: value[:length] for name, value in sample.inputs.items()}
    targets_T = None if sample.targets_T is None else sample.targets_T[:length]
    return replace(sample, inputs=inputs, targets_T=targets_T)
