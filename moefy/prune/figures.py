"""From points to figures: what a removal costs, how selective it is, how it stands beside controls.

Intervals are over documents (or sources), paired: the same documents with and without the removal.

Shapes: D documents.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from moefy.interpret.causal.texts import Texts
from moefy.interpret.statistics import Floats, ratio_interval, units
from moefy.prune.points import Point, by_domain
from moefy.prune.texts import Part

TIMES = 3.0
"""How many times the rise of energy-matched random neurons a selective removal exceeds."""


def interval(top_D: Floats, bottom_D: Floats, texts: Texts) -> dict[str, Any]:
    """`sum(top) / sum(bottom)` as `mean`, with `ci95`."""
    found = ratio_interval(top_D[:, None], bottom_D, units(texts.documents))
    return {
        "mean": float(found.mean_C[0]),
        "ci95": [float(found.low_C[0]), float(found.high_C[0])],
    }


def _even(texts: Texts) -> Floats:
    """Weights of documents with which every domain counts alike, whatever its tokens `[D]`."""
    domain_D = texts.documents.domain_D
    return np.asarray((1 / np.bincount(domain_D, texts.tokens_D))[domain_D])


def rise(point: Point, base: Point, texts: Texts) -> dict[str, Any]:
    """Rise of the mean cross-entropy, in nats per token."""
    even_D = _even(texts)
    return interval(even_D * (point.ce_D - base.ce_D), even_D * texts.tokens_D, texts)


def relative_rise(point: Point, base: Point, texts: Texts) -> dict[str, Any]:
    """The same as a share of the cross-entropy before."""
    even_D = _even(texts)
    return interval(even_D * (point.ce_D - base.ce_D), even_D * base.ce_D, texts)


Pair = tuple[Point, Point]
"""A removal on the texts to forget and on those to retain."""


def row(pair: Pair, base: Pair, part: Part) -> dict[str, Any]:
    """All figures of one removal."""
    (forget, retain), (forget_before, retain_before) = pair, base
    ce_C = by_domain(retain.ce_D, part.retain)
    right_C = by_domain(retain.right_D, part.retain)
    return {
        "ce_forget": forget.ce(part.forget),
        "ce_retain": retain.ce(part.retain),
        "accuracy_forget": forget.accuracy(part.forget),
        "accuracy_retain": retain.accuracy(part.retain),
        "forget_rise": rise(forget, forget_before, part.forget),
        "forget_loss": relative_rise(forget, forget_before, part.forget),
        "retain_rise": rise(retain, retain_before, part.retain),
        "retain_loss": relative_rise(retain, retain_before, part.retain),
        "domains": {
            name: {"ce": float(ce), "accuracy": float(right)}
            for name, ce, right in zip(part.retain.documents.domains, ce_C, right_C, strict=True)
        },
    }


def mean_row(pairs: Sequence[Pair], base: Pair, part: Part) -> dict[str, Any]:
    """The figures of several draws: means over them, document by document."""

    def mean(points: Sequence[Point]) -> Point:
        return Point(
            np.mean([point.ce_D for point in points], axis=0),
            np.mean([point.right_D for point in points], axis=0),
        )

    both = mean([pair[0] for pair in pairs]), mean([pair[1] for pair in pairs])
    return row(both, base, part) | {"draws": len(pairs)}


def area(path: Sequence[tuple[float, float]]) -> float | None:
    """Area under the way of (retain, forget) accuracies from the whole model on, over `r0 f0 / 2`.

    The last point is joined with the origin; None where the whole model is never right. 1 is a removal that lowers both alike, 0 one that takes
    all of the domain and nothing else; the lower, the better they separate (taker's area).
    """
    (retain, forget), points = path[0], [*path, (0.0, 0.0)]
    under = sum((r - s) * (f + g) / 2 for (r, f), (s, g) in itertools.pairwise(points))
    return under / (0.5 * retain * forget) if retain * forget else None


def against(point: Point, base: Point, others: Sequence[Point], texts: Texts) -> dict[str, Any]:
    """The rise of a removal over the mean rise of others, on the same documents.

    `ratio` is None where the others do not cost anything, and its `ci95` where that is within their
    interval; `difference` then still says which is larger: it excludes 0 where the ratio excludes 1.
    `selective` is whether the rise is more than `TIMES` that of the others, beyond doubt larger.
    """
    ours_D = point.ce_D - base.ce_D
    theirs_D = np.mean([other.ce_D for other in others], axis=0) - base.ce_D
    tokens_D = texts.tokens_D.astype(float)
    theirs = interval(theirs_D, tokens_D, texts)
    difference = interval(ours_D - theirs_D, tokens_D, texts)
    ratio = interval(ours_D, theirs_D, texts) if theirs["mean"] > 0 else None
    if ratio is not None and not theirs["ci95"][0] > 0:
        ratio["ci95"] = None
    return {
        "ratio": ratio,
        "rise_of_others": theirs,
        "difference": difference,
        "selective": bool(ours_D.sum() > TIMES * theirs_D.sum() and difference["ci95"][0] > 0),
    }
