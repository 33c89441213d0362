"""Level `model`: tokens per second of a prompt and of cached decoding, dense and moefied beside each other.

Ids are given, not chosen, so that all engines do the same work. A sample is the prompt and then every
token behind it, each timed by itself.

Shapes: B sequences, T tokens, E experts.
"""

from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.benchmark import bytes_read
from moefy.benchmark.engines import EAGER
from moefy.benchmark.engines.base import AUTO, MASKED, Engine, Models, Session, Unavailable
from moefy.benchmark.fidelity import (
    CHECKED,
    Pass,
    Reference,
    compare,
    judge,
    logits_of,
    reference,
)
from moefy.benchmark.layers import Prompt
from moefy.benchmark.levels import Sweep, admit
from moefy.benchmark.record import Facts, cell, record
from moefy.benchmark.rounding import check_layers, watching
from moefy.benchmark.timing import Run, read_bandwidth, side_by_side
from moefy.errors import MoefyError
from moefy.experts.offload import device_of
from moefy.experts.sparse_mlp import sparse_mlps

PREFILL, DECODE = "prefill", "decode"


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
    # Graphs of other shapes would have to be told from these in every call.
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
            gain = bytes_read.amdahl(share, place["density"])
            place |= {"mlp_share": share, "amdahl": gain}
        timed = {name: seconds_RC[:, calls] for name, seconds_RC in seconds.items()}
        facts = {name: known[phase] for name, (_, known) in admitted.items()}
        cells.append(cell(place, timed, facts, refused, bandwidth))
    return cells


def _place(models: Models, phase: str, at: Pass, batch: int) -> dict[str, Any]:
    masks = [mask_TE for one in at.masks for mask_TE in one]
    return {
        "phase": phase,
        "batch": batch,
        "tokens": at.tokens,
        "density": fmean(map(bytes_read.density, masks)),
        "asked_density": None,
        "union": fmean(map(bytes_read.union, masks)),
        "least_bytes": _bytes(models.sparse, at),
        "router": None,
    }


def _mlp_share(models: Models, ids_BT: Tensor, length: int) -> float | None:
    """Of decoding behind the prompt by the dense model as stock has it."""
    session = EAGER.begin(models, ids_BT, length)
    session.reset()
    session.prefill()
    steps = range(length, ids_BT.shape[1])
    return bytes_read.mlp_share(
        models.dense, [partial(session.step, position) for position in steps]
    )


def _checked(
    engine: Engine, session: Session, models: Models, steps: range, wanted: Reference
) -> dict[str, Facts]:
    """What is known of an engine in each phase.

    Raises `Unavailable` for one that computes something else, or by another backend than it names.
    """
    computed_by: list[dict[str, int]] = []

    def count() -> None:
        chosen = [module.chosen for module in sparse_mlps(models.sparse).values()]
        computed_by.append({name: chosen.count(name) for name in sorted(set(chosen))})

    if engine.backend:
        with watching(models.sparse) as watched:

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


def _facts(engine: Engine, session: Session, models: Models, at: Pass, by: dict[str, int]) -> Facts:
    """What one pass of a phase reads and uses, on average."""
    if engine.own_size:
        return Facts(session.dense, 0.0, None, None)
    if session.dense:
        read = bytes_read.model_bytes(models.dense, at.tokens) + at.cache
        return Facts(True, 0.0, read, bytes_read.model_parameters(models.dense))
    read = _bytes(models.sparse, at, whole=engine.backend == MASKED)
    parameters = fmean(bytes_read.model_parameters(models.sparse, one) for one in at.masks)
    text = ", ".join(f"{name} ({n})" for name, n in by.items()) if engine.backend == AUTO else ""
    return Facts(False, 0.0, read, parameters, text)


def _bytes(sparse: PreTrainedModel, at: Pass, *, whole: bool = False) -> float:
    """Bytes that a pass of the moefied model reads on average; `whole` reads every expert."""
    ran = at.masks
    if whole:
        ran = [[torch.ones_like(mask_TE) for mask_TE in one] for one in ran]
    return fmean(bytes_read.model_bytes(sparse, at.tokens, one) for one in ran) + at.cache
