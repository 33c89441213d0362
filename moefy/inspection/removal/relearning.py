"""Is what was removed gone, or only out of reach? Train on a little of it and count the steps.

A model that has lost a domain is trained on at most 1000 tokens of it, all of them in every step, until
half of the cross-entropy that it lost on other documents of the domain is back. Beside it stands a model
that lost as much to random neurons: what comes back no faster there than here was not merely hidden.

Every weight is trained, those of the removed neurons too: that is what anybody can do who has the
checkpoint.
"""

from typing import Any

import torch

from moefy.conversion.distil import CLIP, scaled_groups
from moefy.data.corpus import Batch
from moefy.evaluation.outputs import judged_positions, language
from moefy.inspection.causal.documents import Texts
from moefy.inspection.causal.engine import Neurons
from moefy.inspection.removal import NEURON, Source, units_of
from moefy.inspection.removal.figures import Judge, largest, measured
from moefy.inspection.removal.parts import Parts
from moefy.inspection.removal.sets import random_neurons

STEPS = 40
"""Most steps that are tried."""
RATE = 0.005
"""Steps of Adam relative to the root mean square of each weight."""
HALF = 0.5
CLEAR = 1.5
"""How many times as many steps count as a difference, and not as the chance of one run."""


@torch.enable_grad()
def relearn(
    source: Source,
    removed: Neurons,
    data: list[Batch],
    texts: Texts,
    goal: float,
    most: int = STEPS,
) -> dict[str, Any]:
    """Train the model without these neurons on `data` until its cross-entropy on `texts` is `goal`.

    `steps` is None where it is not reached in `most` steps; `ce` is the way there, from before the
    first step on.
    """
    model = source.without(removed)
    model.requires_grad_(True)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(scaled_groups(parameters, RATE), weight_decay=0.0)
    objective = language(model)
    ce = [measured(model, texts).ce(texts)]
    while ce[-1] > goal and len(ce) <= most:
        for batch in data:
            (objective(model, batch)["loss"] / _tokens(data)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        ce.append(measured(model, texts).ce(texts))
    return {"goal": goal, "steps": len(ce) - 1 if ce[-1] <= goal else None, "ce": ce}


def relearning(
    source: Source, judge: Judge, removed: Neurons, parts: Parts, *, seed: int
) -> dict[str, Any]:
    """Steps to half of what was lost, of the removal and of random neurons that cost as much.

    How many random neurons those are is decided on the part `decide`, steps are counted on `measure`,
    of the domain to forget.
    """
    data, measure = parts.relearn, parts.measure.forget
    whole = judge("base-measure-forget", {}, measure).ce(measure)
    lost = judge("chosen-measure-forget", removed, measure).ce(measure) - whole
    record: dict[str, Any] = {"steps_tried": STEPS, "tokens": _tokens(data), "rate": RATE}
    record |= {"removal": None, "control": None}
    if lost <= 0:
        return record | {"verdict": "nothing was lost to be relearned"}
    record["removal"] = relearn(source, removed, data, measure, whole + HALF * lost)
    count = _as_costly(judge, removed, parts.decide.forget, seed)
    if count is not None:
        control = random_neurons(judge.engine, count, seed)
        cost = judge("control-measure-forget", control, measure).ce(measure) - whole
        if cost > 0:
            steps = relearn(source, control, data, measure, whole + HALF * cost)
            record["control"] = {"neurons": count, "ce_lost": cost, **steps}
    # Whether the data alone teach, with nothing lost.
    most = record["removal"]["steps"] or STEPS
    untouched = relearn(source, {}, data, measure, -1.0, most)["ce"]
    record["whole_model"] = {"ce": untouched, "gain": whole - untouched[-1], "steps": most}
    record["lost"] = lost
    return record | {"verdict": verdict(record)}


def _as_costly(judge: Judge, removed: Neurons, decide: Texts, seed: int) -> int | None:
    """How many random neurons cost the domain what the removal costs it; None where all do not."""
    wanted = judge("chosen-decide-forget", removed, decide).ce(decide)
    total = sum(units_of(judge.engine, NEURON).values())

    def cheaper(count: int) -> bool:
        random = random_neurons(judge.engine, count, seed)
        return judge(f"random-{count}-decide-forget", random, decide).ce(decide) <= wanted

    count = largest(total, cheaper)
    return None if count == total else count + 1


def _tokens(data: list[Batch]) -> int:
    return sum(int(judged_positions(batch).sum()) for batch in data)


def verdict(record: dict[str, Any]) -> str:
    """What the steps say, in a word: `hiding`, `removal`, `no difference`, or why nothing can be said."""
    removal, control = record["removal"], record["control"]
    if record["whole_model"]["gain"] >= HALF * record["lost"]:
        return "the same data teach the whole model as much: nothing can be told"
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
