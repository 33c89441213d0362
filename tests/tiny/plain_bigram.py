"""The bigram as its formula reads, in plain loops over documents of token ids."""

import math
from collections import Counter
from itertools import pairwise


def plain_bigram(documents, vocabulary, k, m):
    """A function of a context that gives the probability of every token."""
    pairs, contexts, tokens = Counter(), Counter(), Counter()
    for ids in documents:
        for a, b in pairwise(ids):
            pairs[a, b] += 1
            contexts[a] += 1
            tokens[b] += 1
    n = sum(tokens.values())
    unigram = [(tokens[b] + k) / (n + k * vocabulary) for b in range(vocabulary)]

    def given(a):
        return [(pairs[a, b] + m * unigram[b]) / (contexts[a] + m) for b in range(vocabulary)]

    return given


def plain_score(given, ids):
    """Nats and rank of every predicted token of a document."""
    found = []
    for a, b in pairwise(ids):
        p = given(a)
        # A hair's breadth, so that equal counts stay ties whatever their last bit is.
        found.append((-math.log(p[b]), 1 + sum(q > p[b] * (1 + 1e-12) for q in p)))
    return found
