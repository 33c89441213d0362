"""Level `model`: tokens per second of a prompt and of cached decoding, dense and moefied beside each other.

Ids are given, not chosen, so that all engines do the same work. A sample is the prompt and then every
token behind it, each timed by itself.

How far an engine's logits may be off is measured. Where a router cuts, rounding changes which experts run, and
so the logits, whatever the engine. No bound follows from dtype and shapes; but how much it is can be measured:
by the dense model in its own dtype against itself in fp32, and by the moefied one, computed by `masked`. Another
engine rounds elsewhere and as much. So its median KL may be `TIMES` the larger of both: the KL grows as the
square of the error, so that is not three times the error, and the median of a few tokens with heavy tails varies
by that much. Below `LEAST` there is nothing to tell apart: a conversion costs a hundred times more.

An fp32 copy has to fit into memory. If it does not, the model in its own dtype stands for it, nothing
is known of rounding, and only what is off by more than `ELSEWHERE` is refused.

Shapes: B sequences, T tokens, E experts, V vocabulary, C positions, G generated tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.benchmark import costs
from moefy.benchmark.checks import (
    Fidelity,
    check_layers,
    compare,
    judge,
    no_copy,
    recording,
    widened,
)
from moefy.benchmark.costs import Run, read_bandwidth, side_by_side
from moefy.benchmark.engines import EAGER, backend
from moefy.benchmark.engines.base import (
    AUTO,
    MASKED,
    Engine,
    Models,
    Session,
    TransformersSession,
    Unavailable,
    keeping,
)
from moefy.benchmark.layers import Prompt
from moefy.benchmark.levels import Sweep, admit
from moefy.benchmark.record import Facts, cell, record
from moefy.errors import MoefyError
from moefy.experts.passes import watching
from moefy.experts.placement import device_of
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.methods.base import Context, Selection

CHECKED = 8
"""Decoded tokens whose layers and logits are compared."""
TIMES = 8.0
"""Times the KL of rounding that an engine's may be."""
LEAST = 1e-4
"""Nats that are nothing in any dtype."""
ELSEWHERE = 0.1
"""Nats of files with rounded or quantised weights, and of any engine without an fp32 run."""
NEARER = 0.5
"""Files of experts choose for themselves; theirs may be this share of what other experts would cost."""
PREFILL, DECODE = "prefill", "decode"


@dataclass
class Phase:
    """What the reference run of a batch says of one phase."""

    masks: list[list[Tensor]]
    """`[T, E]` of each layer, for each pass."""
    cache: float
    """Bytes of keys and values that a pass reads."""

    @property
    def tokens(self) -> int:
        """Tokens of a pass, all sequences together."""
        return len(self.masks[0][0])


class _Elsewhere(Selection):
    """Every expert's neighbour in its stead: a model that has the weights but not the routing."""

    def __init__(self, own: Selection) -> None:
        self.own = own

    def remembered(self, context: Context) -> Tensor | None:
        mask_TE = self.own.remembered(context)
        return None if mask_TE is None else mask_TE.roll(1, 1)

    def __call__(self, scores_TE: Tensor, context: Context | None = None) -> Tensor:
        return self.own(scores_TE, context).roll(1, 1)


@dataclass
class Expected:
    """What engines are compared with: logits `[1 + G, B, V]` behind the prompt and some tokens."""

    dense: Tensor
    sparse: Tensor
    prefill: Phase
    decode: Phase
    why: str
    """Why they are not of fp32; empty where they are."""
    own: dict[str, Fidelity]
    """What rounding does to the `dense` model and to the moefied one (`masked`), and what `other experts`
    of the same weights would do."""

    def allowed(self, engine: Engine | None = None) -> float:
        """The largest median KL of an engine; of moefy's own without one."""
        most = TIMES * max(self.own["dense"].median, self.own["masked"].median)
        if engine is not None and engine.path is not None:
            most = max(most, ELSEWHERE, NEARER * self.own["other experts"].median)
        return max(most, ELSEWHERE if self.why else LEAST)

    def record(self) -> dict[str, Any]:
        """JSON values; figures are None if there is no run in fp32."""
        own = {name: None if self.why else fidelity.record() for name, fidelity in self.own.items()}
        return {"why_not": self.why, "allowed": self.allowed(), **own}


@torch.no_grad()
def bench_model(
    models: Models, prompt: Prompt, sweep: Sweep, *, what: str, generated: int = 32
) -> dict[str, Any]:
    """Time prompts and `generated` tokens decoded behind them, for every batch; returns the record.

    `prompt` has as many sequences as the largest batch; the last `generated` ids of each are those that
    are decoded. Raises `MoefyError` for models that do not generate.
    """
    length = prompt.ids_BT.shape[1] - generated
    for model in (models.dense, models.sparse):
        _check_generates(model, prompt)
    device = device_of(models.sparse)
    bandwidth = read_bandwidth(device)
    cells = []
    for batch in sweep.batches:
        sweep.report.say(f"time prompt and decode: batch {batch}")
        ids_BT = prompt.ids_BT[:batch]
        cells += _cells(models, ids_BT, length, sweep, bandwidth["bytes_per_second"])
    what = f"{what}: {length} tokens of prompt, {generated} decoded, {prompt.what}"
    return record(
        "model", what, cells, dtype=models.sparse.dtype, device=device, samples=sweep.samples,
        bandwidth=bandwidth,
    )  # fmt: skip


def _check_generates(model: PreTrainedModel, prompt: Prompt) -> None:
    name, config = type(model).__name__, model.config.get_text_config()
    if not model.can_generate() or config.is_encoder_decoder:
        raise MoefyError(
            f"{name}: no cached decoding to time; --level layer and kernel time the layers of encoders, "
            "--layer D,N,E,k one of any shape"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and prompt.ids_BT.shape[1] > positions:
        raise MoefyError(
            f"{name}: {prompt.ids_BT.shape[1]} tokens of prompt and decode, but {positions} positions; "
            "lower --prompt-tokens or --new-tokens"
        )
    if int(prompt.ids_BT.max()) >= config.vocab_size:
        raise MoefyError(
            f"{name}: the prompt has token {int(prompt.ids_BT.max())}, the model knows "
            f"{config.vocab_size}; --against must have the vocabulary of MODEL"
        )


def _cells(
    models: Models, ids_BT: Tensor, length: int, sweep: Sweep, bandwidth: float
) -> list[dict[str, Any]]:
    """The records of prefill and decode for one batch."""
    # Graphs of other shapes would be guards of every call.
    torch.compiler.reset()
    steps = range(length, ids_BT.shape[1])
    wanted = reference(models, ids_BT, length)

    def check(engine: Engine) -> tuple[Session, dict[str, Facts]]:
        session = engine.begin(models, ids_BT, length)
        return session, _checked(engine, session, models, steps[:CHECKED], wanted)

    admitted, refused = admit(sweep.engines, check)
    share = _mlp_share(models, ids_BT, length)
    runs = {
        name: Run([s.prefill, *(partial(s.step, p) for p in steps)], before=s.reset)
        for name, (s, _) in admitted.items()
    }
    seconds = side_by_side(runs, sweep.samples)
    cells = []
    for phase, at, calls in (
        (PREFILL, wanted.prefill, slice(0, 1)),
        (DECODE, wanted.decode, slice(1, None)),
    ):
        place = _place(models, phase, at, len(ids_BT))
        place |= {"rounding": wanted.record(), "mlp_share": None, "amdahl": None}
        if phase == DECODE and share is not None:
            gain = costs.amdahl(share, place["density"])
            place |= {"mlp_share": share, "amdahl": gain}
        timed = {name: seconds_RC[:, calls] for name, seconds_RC in seconds.items()}
        facts = {name: known[phase] for name, (_, known) in admitted.items()}
        cells.append(cell(place, timed, facts, refused, bandwidth))
    return cells


def _place(models: Models, phase: str, at: Phase, batch: int) -> dict[str, Any]:
    masks = [mask_TE for one in at.masks for mask_TE in one]
    return {
        "phase": phase,
        "batch": batch,
        "tokens": at.tokens,
        "density": fmean(map(costs.density, masks)),
        "asked_density": None,
        "union": fmean(map(costs.union, masks)),
        "least_bytes": _bytes(models.sparse, at),
        "router": None,
    }


def _mlp_share(models: Models, ids_BT: Tensor, length: int) -> float | None:
    """Of decoding behind the prompt by the dense model as stock has it."""
    session = EAGER.begin(models, ids_BT, length)
    session.reset()
    session.prefill()
    steps = range(length, ids_BT.shape[1])
    return costs.mlp_share(models.dense, [partial(session.step, position) for position in steps])


def _checked(
    engine: Engine, session: Session, models: Models, steps: range, wanted: Expected
) -> dict[str, Facts]:
    """What is known of an engine in each phase.

    Raises `Unavailable` for one that computes something else, or by another backend than it names.
    """
    computed_by: list[dict[str, int]] = []

    def count() -> None:
        chosen = [module.chosen for module in sparse_mlps(models.sparse).values()]
        computed_by.append({name: chosen.count(name) for name in sorted(set(chosen))})

    if engine.backend:
        with recording(models.sparse) as watched:

            def watch() -> None:
                count()
                watched.next_pass()

            logits_of(session, steps, watch)
        others = {name for one in computed_by for name in one} - {engine.backend}
        if engine.backend != AUTO and others:
            taken = ", ".join(sorted(others))
            raise Unavailable(f"does not compute these layers, {taken} takes its place")
        check_layers(models.sparse, watched.passes)
        computed_by.clear()
    # As it is timed: a graph that is watched is another one.
    logits = logits_of(session, steps, count)
    fidelity = compare(logits, wanted.dense if session.dense else wanted.sparse)
    judge(fidelity, wanted.allowed(engine))
    facts = {}
    for phase, at, by in (
        (PREFILL, wanted.prefill, computed_by[0]),
        (DECODE, wanted.decode, computed_by[-1]),
    ):
        known = _facts(engine, session, models, at, by)
        facts[phase] = replace(known, error=fidelity.error, kl=fidelity.record())
    return facts


def _facts(
    engine: Engine, session: Session, models: Models, at: Phase, by: dict[str, int]
) -> Facts:
    """What one pass of a phase reads and uses, on average."""
    if engine.own_size:
        return Facts(session.dense, 0.0, None, None)
    if session.dense:
        read = costs.model_bytes(models.dense, at.tokens) + at.cache
        return Facts(True, 0.0, read, costs.model_parameters(models.dense))
    read = _bytes(models.sparse, at, whole=engine.backend == MASKED)
    parameters = fmean(costs.model_parameters(models.sparse, one) for one in at.masks)
    text = ", ".join(f"{name} ({n})" for name, n in by.items()) if engine.backend == AUTO else ""
    return Facts(False, 0.0, read, parameters, text)


def _bytes(sparse: PreTrainedModel, at: Phase, *, whole: bool = False) -> float:
    """Bytes that a pass of the moefied model reads on average; `whole` reads every expert."""
    ran = at.masks
    if whole:
        ran = [[torch.ones_like(mask_TE) for mask_TE in one] for one in ran]
    return fmean(costs.model_bytes(sparse, at.tokens, one) for one in ran) + at.cache


def reference(models: Models, ids_BT: Tensor, prompt: int) -> Expected:
    """The models in fp32 where that fits: dense without a cache, moefied by `masked`; and what they lose."""
    steps = range(prompt, ids_BT.shape[1])
    few = steps[:CHECKED]
    eager, masked = (row.begin(models, ids_BT, prompt) for row in (EAGER, backend(MASKED)))
    why = no_copy(models.dense) or no_copy(models.sparse)
    wide = nullcontext if why else widened
    eager.reset()  # as stock has it
    with wide(models.dense):
        dense = _uncached(models.dense, ids_BT[:, : prompt + len(few)], 1 + len(few))
    with wide(models.sparse):
        sparse = logits_of(masked, few)
    prefill, decode, logits = _passes(masked, models.sparse, steps)
    own = {
        "dense": compare(logits_of(eager, few), dense),
        "masked": compare(logits[: len(sparse)], sparse),
    }
    modules = sparse_mlps(models.sparse).values()
    selections = [module.selection for module in modules]
    try:
        for module in modules:
            module.selection = _Elsewhere(module.selection)
        own["other experts"] = compare(logits_of(masked, few), sparse)
    finally:
        for module, selection in zip(modules, selections, strict=True):
            module.selection = selection
    return Expected(dense, sparse, prefill, decode, why, own)


def _uncached(model: PreTrainedModel, ids_BT: Tensor, count: int) -> Tensor:
    """The last `count` logits `[C, B, V]` of one pass."""
    ids_BT, options = ids_BT.to(device_of(model)), keeping(model, count)
    logits_BTV = model(input_ids=ids_BT, use_cache=False, **options).logits
    logits_CBV: Tensor = logits_BTV[:, -count:].transpose(0, 1).float().cpu()
    return logits_CBV


def logits_of(
    session: Session, steps: Sequence[int], after: Callable[[], object] | None = None
) -> Tensor:
    """Logits `[1 + G, B, V]` behind the prompt and some tokens; `after` is called after every pass."""
    session.reset()
    passes: list[Callable[[], Tensor]] = [session.prefill]
    passes += [partial(session.step, position) for position in steps]
    logits = []
    for run in passes:
        # A graph of torch.compile may reuse the memory of what it returned before.
        logits.append(run().float().cpu())
        if after is not None:
            after()
    return torch.stack(logits)


def _passes(
    session: Session, sparse: PreTrainedModel, steps: Sequence[int]
) -> tuple[Phase, Phase, Tensor]:
    """What prefill and decoding run, and the logits `[1 + G, B, V]` of all of it."""
    assert isinstance(session, TransformersSession)
    masks: list[Tensor] = []
    passes: list[Phase] = []

    def finish() -> None:
        passes.append(Phase([masks.copy()], costs.cache_bytes(session.cache)))
        masks.clear()

    with watching(sparse_mlps(sparse), lambda _, __, mask_TE: masks.append(mask_TE.clone())):
        logits = logits_of(session, steps, finish)
    prefill, *decoded = passes
    mean = fmean(one.cache for one in decoded)
    return prefill, Phase([one.masks[0] for one in decoded], mean), logits
