"""What a removal does to every document, kept as it is found, and the figures that are made of it.

A point is cross-entropy and right first choices by document; one that has been measured lies in the work
folder, so that a run that was killed goes on from there. Figures say what a removal costs, how selective
it is and how it stands beside controls; their intervals are over documents (or sources), paired: the same
documents with and without the removal. `largest` finds how many units may go: the most whose removal
costs the domains to retain no more than was allowed.

Shapes: D documents, J judged tokens.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.evaluation.outputs import Outputs, ce_of, per_position, placed, run_outputs
from moefy.evaluation.statistics import Floats, ratio_interval, units
from moefy.inspection.causal.documents import Texts
from moefy.inspection.removal.removable import Gone, Removable
from moefy.inspection.removal.shards import Part
from moefy.run.stages import Stages


@dataclass(frozen=True)
class Point:
    """Sums over the tokens of every document."""

    ce_D: Floats
    """Cross-entropy, in nats."""
    right_D: Floats
    """Tokens that the model puts first."""

    def ce(self, texts: Texts) -> float:
        """Mean cross-entropy: of every domain over its tokens, then over domains."""
        return over_domains(self.ce_D, texts)

    def accuracy(self, texts: Texts) -> float:
        """Share of tokens that the model puts first, averaged likewise."""
        return over_domains(self.right_D, texts)


def by_domain(values_D: Floats, texts: Texts) -> Floats:
    """Mean over the tokens of every domain `[C]` of sums over documents."""
    domain_D = texts.documents.domain_D
    return np.bincount(domain_D, values_D) / np.bincount(domain_D, texts.tokens_D)


def over_domains(values_D: Floats, texts: Texts) -> float:
    """The mean of the domains' means."""
    return float(by_domain(values_D, texts).mean())


@torch.no_grad()
def judge(model: PreTrainedModel, texts: Texts) -> Point:
    """How a model predicts these texts."""
    ce: list[Floats] = []
    right: list[Floats] = []
    for batch in texts.batches:
        said = run_outputs(model, batch)
        for value_J, found in zip(_judgements(said), (ce, right), strict=True):
            found.append(placed(value_J.double(), said.keep_BT).sum(1).numpy())
    return Point(np.concatenate(ce), np.concatenate(right))


def _judgements(said: Outputs) -> tuple[Tensor, ...]:
    """Cross-entropy `[J]`, and whether the right token is put first."""

    def of(at: slice, logits_CV: Tensor) -> tuple[Tensor, ...]:
        assert said.targets_J is not None
        return ce_of(logits_CV, said, at), logits_CV.argmax(-1) == said.targets_J[at]

    return per_position(of, said)


class Judge:
    """Judges removals, each once."""

    def __init__(self, removable: Removable, stages: Stages) -> None:
        self.removable, self.stages = removable, stages

    def __call__(self, name: str, gone: Gone, texts: Texts) -> Point:
        """The model without these neurons on these texts; `name` says which removal and which texts."""
        if not self.stages.has(name):
            with self.removable.without(gone):
                point = judge(self.removable.model, texts)
            self.stages.keep(name, {"ce": point.ce_D.tolist(), "right": point.right_D.tolist()})
        found = self.stages.read(name)
        return Point(np.array(found["ce"]), np.array(found["right"]))


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
