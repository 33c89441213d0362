"""What a removal does to every document, kept as it is found, and the figures that are made of it.

A point is cross-entropy and right first choices by document; one that has been measured is kept, so that a
run that was killed goes on from there. Figures say what a removal costs, how selective it is and how it
stands beside controls; their intervals are over documents (or sources), paired: the same documents with and
without the removal. `largest` finds how many units may go: the most whose removal costs the domains to
retain no more than was allowed.

Shapes: Q documents, J judged tokens, C domains.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from moefy.evaluation.judge import judge
from moefy.evaluation.outputs import run_outputs
from moefy.evaluation.statistics import Floats, ratios, units
from moefy.inspection.causal.documents import Texts
from moefy.inspection.causal.engine import AblationEngine, Neurons
from moefy.inspection.removal.parts import Part
from moefy.run.output import Stages


@dataclass(frozen=True)
class Point:
    """Sums over the tokens of every document."""

    ce_Q: Floats
    """Cross-entropy, in nats."""
    right_Q: Floats
    """Tokens that the model puts first."""

    def ce(self, texts: Texts) -> float:
        """Mean cross-entropy: of every domain over its tokens, then over domains."""
        return float(by_domain(self.ce_Q, texts).mean())

    def accuracy(self, texts: Texts) -> float:
        """Share of tokens that the model puts first, averaged likewise."""
        return float(by_domain(self.right_Q, texts).mean())


def by_domain(values_Q: Floats, texts: Texts) -> Floats:
    """Mean over the tokens of every domain `[C]` of sums over documents."""
    domain_Q = texts.documents.domain_Q
    return np.bincount(domain_Q, values_Q) / np.bincount(domain_Q, texts.tokens_Q)


def measured(model: PreTrainedModel, texts: Texts) -> Point:
    """How a model predicts these texts."""
    sums_Q = judge(partial(run_outputs, model), texts.batches).sums_Q
    return Point(sums_Q["ce"], sums_Q["right"])


@dataclass(frozen=True)
class Judge:
    """Judges removals, each once."""

    engine: AblationEngine
    stages: Stages

    def __call__(self, name: str, removed: Neurons, texts: Texts) -> Point:
        """The model without these neurons on these texts; `name` says which removal and which texts."""
        if not self.stages.has(name):
            with self.engine.without(removed):
                point = measured(self.engine.model, texts)
            self.stages.keep(name, {"ce": point.ce_Q.tolist(), "right": point.right_Q.tolist()})
        sums = self.stages.read(name)
        return Point(np.array(sums["ce"]), np.array(sums["right"]))

    def pair(self, name: str, removed: Neurons, part: Part) -> "Pair":
        """The same on both texts of the part that measures."""
        return (
            self(f"{name}-measure-forget", removed, part.forget),
            self(f"{name}-measure-retain", removed, part.retain),
        )


Pair = tuple[Point, Point]
"""A removal on the texts to forget and on those to retain."""


def rises(point: Point, base: Point, texts: Texts) -> dict[str, Any]:
    """Rise of the mean cross-entropy, in nats per token, and `loss`, as a share of what it was."""
    even_Q = texts.even_Q(texts.tokens_Q)
    rise_Q = even_Q * (point.ce_Q - base.ce_Q)
    sums = {"rise": (rise_Q, even_Q * texts.tokens_Q), "loss": (rise_Q, even_Q * base.ce_Q)}
    return ratios(sums, units(texts.documents))


def row(pair: Pair, base: Pair, part: Part) -> dict[str, Any]:
    """All figures of one removal."""
    figures: dict[str, Any] = {}
    for name, point, before, texts in zip(
        ("forget", "retain"), pair, base, (part.forget, part.retain), strict=True
    ):
        figures[f"ce_{name}"] = point.ce(texts)
        figures[f"accuracy_{name}"] = point.accuracy(texts)
        figures |= {f"{name}_{what}": v for what, v in rises(point, before, texts).items()}
    retain = pair[1]
    ce_C, right_C = (by_domain(v, part.retain) for v in (retain.ce_Q, retain.right_Q))
    figures["domains"] = {
        name: {"ce": float(ce), "accuracy": float(right)}
        for name, ce, right in zip(part.retain.documents.domains, ce_C, right_C, strict=True)
    }
    return figures


def mean_row(pairs: Sequence[Pair], base: Pair, part: Part) -> dict[str, Any]:
    """The figures of several draws: means over them, document by document."""

    def mean(points: Sequence[Point]) -> Point:
        return Point(
            np.mean([point.ce_Q for point in points], axis=0),
            np.mean([point.right_Q for point in points], axis=0),
        )

    both = mean([pair[0] for pair in pairs]), mean([pair[1] for pair in pairs])
    return row(both, base, part) | {"draws": len(pairs)}


def area(path: Sequence[tuple[float, float]]) -> float | None:
    """Area under the way of (retain, forget) accuracies from the whole model on, over `r0 f0 / 2`.

    The last point is joined with the origin; None where the whole model is never right. 1 is a removal
    that lowers both alike, 0 one that takes all of the domain and nothing else; the lower, the better
    they separate (taker's area).
    """
    (retain, forget), points = path[0], [*path, (0.0, 0.0)]
    under = sum((r - s) * (f + g) / 2 for (r, f), (s, g) in itertools.pairwise(points))
    return under / (0.5 * retain * forget) if retain * forget else None


TIMES = 3.0
"""How many times the rise of energy-matched random neurons a selective removal exceeds."""


def against(point: Point, base: Point, others: Sequence[Point], texts: Texts) -> dict[str, Any]:
    """The rise of a removal over the mean rise of others, on the same documents.

    `ratio` is None where the others do not cost anything, and its `ci95` where that is within their
    interval; `difference` then still says which is larger: it excludes 0 where the ratio excludes 1.
    `selective` is whether the rise is more than `TIMES` that of the others, beyond doubt larger.
    """
    ours_Q = point.ce_Q - base.ce_Q
    theirs_Q = np.mean([other.ce_Q for other in others], axis=0) - base.ce_Q
    tokens_Q = texts.tokens_Q.astype(float)
    sums = {
        "ratio": (ours_Q, theirs_Q),
        "rise_of_others": (theirs_Q, tokens_Q),
        "difference": (ours_Q - theirs_Q, tokens_Q),
    }
    figures: dict[str, Any] = dict(ratios(sums, units(texts.documents)))
    theirs, difference = (
        figures[name]["ci95"] or (-np.inf, np.inf) for name in ("rise_of_others", "difference")
    )
    if not theirs_Q.sum() > 0:
        figures["ratio"] = None
    elif not theirs[0] > 0:
        figures["ratio"]["ci95"] = None
    selective = ours_Q.sum() > TIMES * theirs_Q.sum() and difference[0] > 0
    return figures | {"selective": bool(selective)}


PRECISION = 0.02
"""How far the search stops from the most that fits, as a share of it."""


def largest(total: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `total` that fits, by doubling and then halving; 0 where 1 does not.

    The cost is taken to rise with the number: where it does not, this is the first number that does
    not fit, within `PRECISION`.
    """
    good = 0
    while good < total:
        probe = min(2 * good or 1, total)
        if not fits(probe):
            break
        good = probe
    else:
        return total
    bad = probe
    while bad - good > max(1, PRECISION * good):
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good
