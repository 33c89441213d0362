"""Level `model`: tokens per second of a prompt and of cached decoding, dense and moefied beside each other.

Ids are given, not chosen, so that all engines do the same work. A sample is the prompt and then every
token behind it, each timed by itself.

Shapes: B sequences, T tokens, E experts, V vocabulary, L layers, G generated tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.benchmark import moved
from moefy.benchmark.engines.model_engines import Models, Session, TransformersSession, keeping
from moefy.benchmark.engines.table import AUTO, EAGER, MASKED, Choice, Unavailable, choose
from moefy.benchmark.fidelity import (
    ELSEWHERE,
    LEAST,
    NEARER,
    TIMES,
    Fidelity,
    compare,
    judge,
    no_copy,
    widened,
)
from moefy.benchmark.moved import amdahl, mlp_share
from moefy.benchmark.prompts import Prompt
from moefy.benchmark.record import Facts, cell, failed, record
from moefy.benchmark.settings import check
from moefy.benchmark.timing import Run, read_bandwidth, side_by_side
from moefy.benchmark.watched import Watched, check_layers, watching
from moefy.errors import MoefyError
from moefy.experts.backends import BACKENDS
from moefy.experts.offload import device_of
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.methods.base import Context, Selection
from moefy.run.console import Reporter

CHECKED = 8
"""Decoded tokens whose layers and logits are compared."""
PHASES = ("prefill", "decode")


@dataclass
class _Pass:
    """What the reference run of a batch says of one phase."""

    masks: list[list[Tensor]]
    """`[T, E]` of each layer, for each pass."""
    cache: float
    """Bytes of keys and values that a pass moves."""

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
class _Reference:
    """What engines are compared with: logits `[1 + G, B, V]` behind the prompt and some tokens."""

    dense: Tensor
    sparse: Tensor
    passes: tuple[_Pass, _Pass]
    why: str
    """Why they are not of fp32; empty where they are."""
    own: dict[str, Fidelity]
    """What rounding does to the `dense` model and to the moefied one (`masked`), and what `other experts`
    of the same weights would do."""

    def allowed(self, choice: Choice) -> float:
        """The largest median KL of an engine."""
        most = TIMES * max(self.own["dense"].median, self.own["masked"].median)
        if choice.path is not None:
            most = max(most, ELSEWHERE, NEARER * self.own["other experts"].median)
        return max(most, ELSEWHERE if self.why else LEAST)

    def record(self) -> dict[str, Any]:
        """JSON values; figures are None where there is no run in fp32."""
        own = {name: None if self.why else found.record() for name, found in self.own.items()}
        return {"why_not": self.why, "allowed": self.allowed(Choice(MASKED)), **own}


@torch.no_grad()
def bench_model(
    dense: PreTrainedModel,
    sparse: PreTrainedModel,
    prompt: Prompt,
    *,
    what: str,
    generated: int = 32,
    batches: Sequence[int] = (1,),
    engines: Sequence[str] = (),
    samples: int = 7,
    placement: dict[str, Any] | None = None,
    report: Reporter | None = None,
) -> dict[str, Any]:
    """Time prompts and `generated` tokens decoded behind them, for every batch; returns the record.

    `prompt` has as many sequences as the largest batch; the last `generated` ids of each are those that
    are decoded. `engines` as in `engines.choose`; `placement` is how stock mixtures of experts are
    loaded. Raises `MoefyError` for models that do not generate.
    """
    check(batches, (), samples)
    choices = choose(engines)
    length = prompt.ids_BT.shape[1] - generated
    for model in (dense, sparse):
        _generates(model, prompt)
    models = Models(dense, sparse, placement or {})
    device = device_of(sparse)
    bandwidth = read_bandwidth(device)
    cells = []
    for batch in batches:
        if report is not None:
            report.say(f"time prompt and decode: batch {batch}")
        ids_BT = prompt.ids_BT[:batch]
        cells += _cells(models, ids_BT, length, choices, samples, bandwidth["bytes_per_second"])
    what = f"{what}: {length} tokens of prompt, {generated} decoded, {prompt.what}"
    return record(
        "model",
        what,
        cells,
        dtype=sparse.dtype,
        device=device,
        samples=samples,
        bandwidth=bandwidth,
    )


def _generates(model: PreTrainedModel, prompt: Prompt) -> None:
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
            "lower --prompt or --generated"
        )
    if int(prompt.ids_BT.max()) >= config.vocab_size:
        raise MoefyError(
            f"{name}: the prompt has token {int(prompt.ids_BT.max())}, the model knows "
            f"{config.vocab_size}; --against must have the vocabulary of MODEL"
        )


def _cells(
    models: Models,
    ids_BT: Tensor,
    length: int,
    choices: Sequence[Choice],
    samples: int,
    bandwidth: float,
) -> list[dict[str, Any]]:
    """The records of prefill and decode for one batch."""
    # Graphs of other shapes would have to be told from these in every call.
    torch.compiler.reset()
    batch, steps = len(ids_BT), range(length, ids_BT.shape[1])
    reference = _references(models, ids_BT, length)
    passes = reference.passes
    sessions: dict[str, Session] = {}
    facts: dict[str, dict[str, Facts]] = {phase: {} for phase in PHASES}
    refused: dict[str, str] = {}
    for choice in choices:
        try:
            session = models.session(choice, ids_BT, length)
            by, found = _compared(choice, session, models.sparse, steps[:CHECKED], reference)
            for phase, at in zip(PHASES, passes, strict=True):
                known = _facts(choice, session, models, at, by[phase], found.error)
                facts[phase][choice.label] = replace(known, kl=found.record())
            sessions[choice.label] = session
        except Exception as reason:  # another engine may do
            if choice.path is not None and isinstance(reason, MoefyError):
                raise  # no such file
            refused[choice.label] = failed(reason)
    share = _mlp_share(models, ids_BT, length)
    runs = {
        name: Run([s.prefill, *(partial(s.step, p) for p in steps)], before=s.reset)
        for name, s in sessions.items()
    }
    seconds = side_by_side(runs, samples)
    cells = []
    for phase, at, part in zip(PHASES, passes, (slice(0, 1), slice(1, None)), strict=True):
        masks = [mask_TE for one in at.masks for mask_TE in one]
        place: dict[str, Any] = {
            "phase": phase,
            "batch": batch,
            "tokens": batch * (length if phase == "prefill" else 1),
            "density": fmean(map(moved.density, masks)),
            "asked_density": None,
            "union": fmean(map(moved.union, masks)),
            "least_bytes": _bytes(models.sparse, at),
            "router": None,
            "rounding": reference.record(),
            "mlp_share": None,
            "amdahl": None,
        }
        if phase == "decode" and share is not None:
            place |= {"mlp_share": share, "amdahl": amdahl(share, place["density"])}
        timed = {name: seconds_RC[:, part] for name, seconds_RC in seconds.items()}
        cells.append(cell(place, timed, facts[phase], refused, bandwidth))
    return cells


def _references(models: Models, ids_BT: Tensor, length: int) -> _Reference:
    """The models in fp32 where that fits: dense without a cache, moefied by `masked`; and what they lose."""
    steps = range(length, ids_BT.shape[1])
    few = steps[:CHECKED]
    eager = models.session(Choice(EAGER), ids_BT, length)
    masked = models.session(Choice(MASKED), ids_BT, length)
    assert isinstance(masked, TransformersSession)
    why = no_copy(models.dense) or no_copy(models.sparse)
    wide = nullcontext if why else widened
    eager.reset()  # as stock has it
    with wide(models.dense):
        dense = _uncached(models.dense, ids_BT[:, : length + len(few)], 1 + len(few))
    with wide(models.sparse):
        sparse, _ = _run(masked, models.sparse, few)
    passes, logits = _passes(masked, models.sparse, steps)
    own = {
        "dense": compare(_run(eager, models.sparse, few)[0], dense),
        "masked": compare(logits[: len(sparse)], sparse),
    }
    modules = sparse_mlps(models.sparse).values()
    selections = [module.selection for module in modules]
    try:
        for module in modules:
            module.selection = _Elsewhere(module.selection)
        own["other experts"] = compare(_run(masked, models.sparse, few)[0], sparse)
    finally:
        for module, selection in zip(modules, selections, strict=True):
            module.selection = selection
    return _Reference(dense, sparse, passes, why, own)


def _uncached(model: PreTrainedModel, ids_BT: Tensor, count: int) -> Tensor:
    """The last `count` logits `[C, B, V]` of one pass."""
    ids_BT, options = ids_BT.to(device_of(model)), keeping(model, count)
    logits_BTV = model(input_ids=ids_BT, use_cache=False, **options).logits
    logits_CBV: Tensor = logits_BTV[:, -count:].transpose(0, 1).float().cpu()
    return logits_CBV


def _passes(
    session: TransformersSession, sparse: PreTrainedModel, steps: Sequence[int]
) -> tuple[tuple[_Pass, _Pass], Tensor]:
    """What prefill and decoding run, and the logits `[1 + G, B, V]` of all of it."""
    with _listening(sparse) as heard:
        session.reset()
        logits = [session.prefill()]
        prefill = _Pass([heard.copy()], moved.cache_bytes(session.cache))
        decode = _Pass([], 0.0)
        held = 0.0
        for position in steps:
            heard.clear()
            logits.append(session.step(position))
            decode.masks.append(heard.copy())
            held += moved.cache_bytes(session.cache)
    decode.cache = held / len(steps)
    return (prefill, decode), torch.stack(logits).float().cpu()


def _mlp_share(models: Models, ids_BT: Tensor, length: int) -> float | None:
    """Of decoding behind the prompt by the dense model as stock has it."""
    session = models.session(Choice(EAGER), ids_BT, length)
    session.reset()
    session.prefill()
    steps = range(length, ids_BT.shape[1])
    return mlp_share(models.dense, [partial(session.step, position) for position in steps])


@contextmanager
def _listening(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """The masks of the layers, in order, as they run."""
    heard: list[Tensor] = []

    def observe(_: Tensor, mask_TE: Tensor) -> None:
        heard.append(mask_TE.clone())

    modules = sparse_mlps(model).values()
    for module in modules:
        module.observer = observe
    try:
        yield heard
    finally:
        for module in modules:
            module.observer = None


def _run(
    session: Session,
    sparse: PreTrainedModel,
    steps: Sequence[int],
    watched: Watched | None = None,
) -> tuple[Tensor, dict[str, dict[str, int]]]:
    """Logits `[1 + G, B, V]` behind the prompt and some tokens; which backends computed each phase."""
    session.reset()
    passes: list[Callable[[], Tensor]] = [session.prefill]
    passes += [partial(session.step, position) for position in steps]
    logits, by = [], {}
    for phase, one in zip(("prefill", *["decode"] * len(steps)), passes, strict=True):
        # A graph of torch.compile may reuse the memory of what it returned before.
        logits.append(one().float().cpu())
        by[phase] = _backends(sparse)
        if watched is not None:
            watched.next_pass()
    return torch.stack(logits), by


def _compared(
    choice: Choice,
    session: Session,
    sparse: PreTrainedModel,
    steps: Sequence[int],
    reference: _Reference,
) -> tuple[dict[str, dict[str, int]], Fidelity]:
    """The backends of each phase, and how far the logits are from the reference.

    Raises `Unavailable` for an engine that computes something else.
    """
    if not choice.dense and choice.path is None:
        with watching(sparse) as watched:
            _, by = _run(session, sparse, steps, watched)
        _by_name(choice, by)
        check_layers(sparse, watched.passes)
    # As it is timed: a graph that is watched is another one.
    got, by = _run(session, sparse, steps)
    found = compare(got, reference.dense if session.dense else reference.sparse)
    judge(found, reference.allowed(choice))
    return by, found


def _backends(model: PreTrainedModel) -> dict[str, int]:
    """How many layers the last pass computed with each backend."""
    chosen = [module.chosen for module in sparse_mlps(model).values()]
    return {name: chosen.count(name) for name in sorted(set(chosen))}


def _by_name(choice: Choice, by: dict[str, dict[str, int]]) -> None:
    """Raise `Unavailable` where another backend than the one named computed some layer."""
    others = {name for phase in by.values() for name in phase} - {choice.name}
    if choice.name in BACKENDS and others:
        taken = ", ".join(sorted(others))
        raise Unavailable(f"does not compute these layers, {taken} takes its place")


def _facts(
    choice: Choice,
    session: Session,
    models: Models,
    at: _Pass,
    by: dict[str, int],
    error: float,
) -> Facts:
    """What one pass of a phase moves and uses, on average."""
    if choice.path is not None and choice.experts is None:
        return Facts(session.dense, error, None, None)  # weights of another size
    if session.dense:
        moved_bytes = moved.model_bytes(models.dense, at.tokens) + at.cache
        return Facts(True, error, moved_bytes, moved.model_parameters(models.dense))
    moved_bytes = _bytes(models.sparse, at, whole=choice.name == MASKED)
    parameters = fmean(moved.model_parameters(models.sparse, one) for one in at.masks)
    text = ", ".join(f"{name} ({n})" for name, n in by.items()) if choice.base == AUTO else ""
    return Facts(False, error, moved_bytes, parameters, text)


def _bytes(sparse: PreTrainedModel, at: _Pass, *, whole: bool = False) -> float:
    """Bytes that a pass of the moefied model moves on average; `whole` reads every expert."""
    ran = at.masks
    if whole:
        ran = [[torch.ones_like(mask_TE) for mask_TE in one] for one in ran]
    return fmean(moved.model_bytes(sparse, at.tokens, one) for one in ran) + at.cache
