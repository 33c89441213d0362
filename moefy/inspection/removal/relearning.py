"""Is what was removed gone, or only out of reach? Train on a little of it and count the steps.

A model that has lost a domain is trained on at most 1000 tokens of it, all of them in every step, until
half of the cross-entropy that it lost on other documents of the domain is back. Beside it stands a model
that lost as much to random neurons: what comes back no faster there than here was not merely hidden.

Every weight is trained, those of the removed neurons too: that is what anybody can do who has the
checkpoint.
"""

from copy import deepcopy
from typing import Any

import torch

from moefy.conversion.optimise import CLIP, matched
from moefy.data.corpus import Batch
from moefy.evaluation.outputs import judged_positions, language
from moefy.inspection.causal.documents import Texts
from moefy.inspection.removal.matched import random_neurons
from moefy.inspection.removal.points import Judge, judge, largest
from moefy.inspection.removal.removable import Gone, Removable

STEPS = 40
"""Most steps that are tried."""
RATE = 0.005
"""Steps of Adam relative to the root mean square of each weight."""
HALF = 0.5
CLEAR = 1.5
"""How many times as many steps count as a difference, and not as the chance of one run."""


@torch.enable_grad()
def relearn(
    removable: Removable,
    gone: Gone,
    lesson: list[Batch],
    texts: Texts,
    goal: float,
    most: int = STEPS,
) -> dict[str, Any]:
    """Train the model without these neurons until its cross-entropy on `texts` is `goal`.

    `steps` is None where it is not reached in `most` steps; `ce` is the way there, from before the
    first step on.
    """
    with removable.without(gone):
        model = deepcopy(removable.model)
    model.requires_grad_(True)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(matched(parameters, RATE), weight_decay=0.0)
    objective = language(model)
    tokens = sum(int(judged_positions(batch).sum()) for batch in lesson)
    ce = [judge(model, texts).ce(texts)]
    while ce[-1] > goal and len(ce) <= most:
        for batch in lesson:
            (objective(model, batch)["loss"] / tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        ce.append(judge(model, texts).ce(texts))
    return {"goal": goal, "steps": len(ce) - 1 if ce[-1] <= goal else None, "ce": ce}


def relearning(
    removable: Removable,
    judge_: Judge,
    gone: Gone,
    lesson: list[Batch],
    *,
    decide: Texts,
    measure: Texts,
    seed: int,
) -> dict[str, Any]:
    """Steps to half of what was lost, of the removal and of random neurons that cost as much.

    How many random neurons those are is decided on `decide`, steps are counted on `measure`; both are
    of the domain to forget.
    """
    if judge_.stages.has("relearning"):
        return dict(judge_.stages.read("relearning"))
    whole = judge_("base-measure-forget", removable.nothing(), measure).ce(measure)
    lost = judge_("chosen-measure-forget", gone, measure).ce(measure)
    found: dict[str, Any] = {"steps_tried": STEPS, "tokens": _tokens(lesson), "rate": RATE}
    if lost <= whole:
        found |= {"removal": None, "control": None, "verdict": "nothing was lost to be relearned"}
        judge_.stages.keep("relearning", found)
        return found
    found["removal"] = relearn(removable, gone, lesson, measure, whole + HALF * (lost - whole))
    found["control"] = None
    count = _as_costly(removable, judge_, gone, decide, seed)
    if count is not None:
        control = random_neurons(removable, count, seed)
        cost = judge_("control-measure-forget", control, measure).ce(measure)
        if cost > whole:
            goal = whole + HALF * (cost - whole)
            found["control"] = {
                "neurons": count,
                "ce_lost": cost - whole,
                **relearn(removable, control, lesson, measure, goal),
            }
    # Whether the lesson alone teaches, with nothing lost.
    steps = found["removal"]["steps"] or STEPS
    untouched = relearn(removable, removable.nothing(), lesson, measure, -1.0, steps)["ce"]
    found["whole_model"] = {"ce": untouched, "gain": whole - untouched[-1], "steps": steps}
    found["lost"] = lost - whole
    found["verdict"] = verdict(found)
    judge_.stages.keep("relearning", found)
    return found


def _as_costly(
    removable: Removable, judge_: Judge, gone: Gone, decide: Texts, seed: int
) -> int | None:
    """How many random neurons cost the domain what the removal costs it; None where all do not."""
    wanted = judge_("chosen-decide-forget", gone, decide).ce(decide)
    total = sum(site.neurons for site in removable.sites)

    def cheaper(count: int) -> bool:
        random = random_neurons(removable, count, seed)
        return judge_(f"random-{count}-decide-forget", random, decide).ce(decide) <= wanted

    count = largest(total, cheaper)
    return None if count == total else count + 1


def _tokens(lesson: list[Batch]) -> int:
    return sum(int(judged_positions(batch).sum()) for batch in lesson)


def verdict(found: dict[str, Any]) -> str:
    """What the steps say, in a word: `hiding`, `removal`, `no difference`, or why nothing can be said."""
    removal, control = found["removal"], found["control"]
    if found["whole_model"]["gain"] >= HALF * found["lost"]:
        return "the lesson teaches the whole model as much: nothing can be told"
    if control is None:
        return "no random removal costs the domain as much: nothing to compare with"
    first, second = removal["steps"], control["steps"]
    if first is None and second is None:
        return f"neither came back in {STEPS} steps"
    ours, theirs = first or STEPS, second or STEPS
    if second is None or ours * CLEAR < theirs:
        return "hiding"
    if first is None or theirs * CLEAR < ours:
        return "removal"
    return "no difference"
