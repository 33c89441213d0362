"""Routing that is planted: samples in which every answer is known by construction."""

import numpy as np

from moefy.data.corpus import Document
from moefy.data.shards import HELD_OUT, Documents
from moefy.inspection.routing import RoutingSample
from moefy.inspection.texts.tokens import NONE, Tokens


def sample_of(masks, ids_T, domain_Q, length, shared=0):
    """A sample of documents of `length` tokens; `masks` `[T, E]` of every layer, shared ones first."""
    count = len(domain_Q)
    assert len(ids_T) == count * length
    ids_BT = np.asarray(ids_T, dtype=np.int64).reshape(count, length)
    documents = [
        Document(f"domain{d}", str(i), ids=tuple(ids_BT[i].tolist()))
        for i, d in enumerate(domain_Q)
    ]
    none = np.full((count, 1), NONE)
    previous_BT = np.concatenate([none, ids_BT[:, :-1]], axis=1)
    target_BT = np.concatenate([ids_BT[:, 1:], none], axis=1)
    position_BT = np.broadcast_to(np.arange(length), ids_BT.shape)
    document_BT = np.broadcast_to(np.arange(count)[:, None], ids_BT.shape)
    columns = (ids_BT, previous_BT, target_BT, target_BT, position_BT, document_BT)
    return RoutingSample(
        Documents(documents, [HELD_OUT] * count, ["planted"] * count),
        Tokens(*(np.ascontiguousarray(column.ravel(), dtype=np.int64) for column in columns)),
        [np.packbits(mask.astype(bool), axis=1) for mask in masks],
        [mask.shape[1] for mask in masks],
        [shared] * len(masks),
    )


def top_k(scores_TE, k):
    """The k highest of every row."""
    rank_TE = np.argsort(np.argsort(-scores_TE, axis=1), axis=1)
    return rank_TE < k


class World:
    """Documents of a few domains, with Zipf tokens that each domain weighs in its own way."""

    def __init__(self, *, documents=120, length=200, domains=4, types=60, seed=0, own=1.5):
        self.random = np.random.default_rng(seed)
        self.length, self.types = length, types
        self.domain_Q = np.arange(documents) % domains
        weight_V = 1 / (1 + np.arange(types))
        self.p_MV = weight_V * np.exp(own * self.random.normal(size=(domains, types)))
        self.p_MV /= self.p_MV.sum(1, keepdims=True)
        self.domain_T = np.repeat(self.domain_Q, length)
        self.ids_T = np.concatenate(
            [self.random.choice(types, size=length, p=self.p_MV[d]) for d in self.domain_Q]
        )
        self.position_T = np.tile(np.arange(length), documents)

    def draw(self, p_TE):
        """Experts that run with these chances."""
        return self.random.random(p_TE.shape) < p_TE

    def sample(self, *masks, shared=0):
        """These masks on the world's tokens."""
        return sample_of(masks, self.ids_T, self.domain_Q, self.length, shared)


def entropy(p):
    """Bits of a yes or no of chance `p`."""
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return -(p * np.log2(p) + (1 - p) * np.log2(1 - p))


def load_matched(sample, seed=0):
    """The random router of the same loads: in every layer the sets of experts that ran are dealt anew
    to tokens that run as many. Loads, k and co-activation are the model's; nothing else is left."""
    random = np.random.default_rng(seed)
    packed = []
    for layer in range(len(sample.packed)):
        active_T = sample.mask(layer).sum(1)
        found = np.empty(len(active_T), dtype=np.int64)
        drawn_T = np.lexsort((random.random(len(active_T)), active_T))
        found[np.argsort(active_T, kind="stable")] = drawn_T
        packed.append(sample.packed[layer][found])
    return RoutingSample(sample.documents, sample.tokens, packed, sample.experts, sample.shared)
