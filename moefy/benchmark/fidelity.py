"""How far an engine's logits are from those of the same model in fp32, beside what rounding itself makes.

Where a router cuts, rounding changes which experts run, and so the logits, whatever the engine. No bound
follows from dtype and shapes; but how much it is can be measured: by the dense model in its own dtype
against itself in fp32, and by the moefied one, computed by `masked`. Another engine rounds elsewhere and
as much. So its median KL may be `TIMES` the larger of both: the KL grows as the square of the error, so
that is not three times the error, and the median of a few tokens with heavy tails varies by that much.
Below `LEAST` there is nothing to tell apart: a conversion costs a hundred times more.

An fp32 copy has to fit into memory. Where it does not, the model in its own dtype stands for it, nothing
is known of rounding, and only what is off by more than `ELSEWHERE` is refused.

Shapes: G generated tokens, B sequences, V vocabulary, C positions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.benchmark.bytes_read import cache_bytes
from moefy.benchmark.engines import EAGER, backend
from moefy.benchmark.engines.base import (
    MASKED,
    Engine,
    Models,
    Session,
    TransformersSession,
    Unavailable,
    keeping,
)
from moefy.benchmark.rounding import relative_error
from moefy.evaluation.outputs import kl_of
from moefy.experts.offload import device_of
from moefy.experts.passes import watching
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.methods.base import Context, Selection
from moefy.run.memory import free_memory

CHECKED = 8
"""Decoded tokens whose layers and logits are compared."""
TIMES = 8.0
"""Times the KL of rounding that an engine's may be."""
LEAST = 1e-4
"""Nats that are nothing in any dtype."""
ELSEWHERE = 0.1
"""Nats of files with rounded or quantised weights, and of any engine where there is no fp32 run."""
NEARER = 0.5
"""Files of experts choose for themselves; theirs may be this share of what other experts would cost."""


@dataclass(frozen=True)
class Fidelity:
    """What the logits of a run lie from, and how far."""

    error: float
    """Relative error of all logits."""
    median: float
    mean: float
    largest: float
    """KL in nats from the run in fp32, over tokens."""

    def record(self) -> dict[str, float]:
        """JSON values."""
        return {"median": self.median, "mean": self.mean, "largest": self.largest}


def compare(got: Tensor, want: Tensor) -> Fidelity:
    """Logits `[1 + G, B, V]` beside those of fp32; raises `Unavailable` where they have another shape."""
    if got.shape != want.shape:
        raise Unavailable(
            f"computes something else: logits of shape {tuple(got.shape)}, not {tuple(want.shape)}"
        )
    # Rounding takes it no lower than 0.
    kl_C = torch.cat(
        [kl_of(w.double(), g.double()) for g, w in zip(got, want, strict=True)]
    ).clamp_min(0)
    return Fidelity(
        relative_error(got, want), float(kl_C.quantile(0.5)), float(kl_C.mean()), float(kl_C.max())
    )


def judge(fidelity: Fidelity, allowed: float) -> None:
    """Raise `Unavailable` where a run is further off than allowed; so is one that is no number."""
    if not fidelity.median <= allowed:
        raise Unavailable(
            f"computes something else: KL {fidelity.median:.1e} nats to the reference (median), at most "
            f"{allowed:.1e}; relative error {fidelity.error:.1e}"
        )


def no_copy(model: PreTrainedModel) -> str:
    """Why the model cannot be had in fp32; empty where it can."""
    if model.device.type == "meta":
        return "its weights are offloaded"
    more = sum(4 * value.numel() for value in _narrow(model))
    free = torch.cuda.mem_get_info()[0] if model.device.type == "cuda" else free_memory()
    if more > 0.8 * free:
        return f"an fp32 copy takes {more / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return ""


@contextmanager
def widened(model: PreTrainedModel) -> Iterator[None]:
    """The model computes in fp32; afterwards it has the tensors it had."""
    held = {value: value.data for value in _narrow(model)}
    config: Any = model.config
    dtype = config.dtype
    for value in held:
        value.data = value.data.float()
    config.dtype = torch.float32
    try:
        yield
    finally:
        config.dtype = dtype
        for value, data in held.items():
            value.data = data


def _narrow(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers of fewer bits than fp32."""
    every = [*model.parameters(), *model.buffers()]
    return [v for v in every if v.is_floating_point() and v.element_size() < 4]


@dataclass
class Pass:
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
class Reference:
    """What engines are compared with: logits `[1 + G, B, V]` behind the prompt and some tokens."""

    dense: Tensor
    sparse: Tensor
    prefill: Pass
    decode: Pass
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
        """JSON values; figures are None where there is no run in fp32."""
        own = {name: None if self.why else fidelity.record() for name, fidelity in self.own.items()}
        return {"why_not": self.why, "allowed": self.allowed(), **own}


def reference(models: Models, ids_BT: Tensor, prompt: int) -> Reference:
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
    return Reference(dense, sparse, prefill, decode, why, own)


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
) -> tuple[Pass, Pass, Tensor]:
    """What prefill and decoding run, and the logits `[1 + G, B, V]` of all of it."""
    assert isinstance(session, TransformersSession)
    masks: list[Tensor] = []
    passes: list[Pass] = []

    def finish() -> None:
        passes.append(Pass([masks.copy()], cache_bytes(session.cache)))
        masks.clear()

    with watching(sparse_mlps(sparse), lambda _, __, mask_TE: masks.append(mask_TE.clone())):
        logits = logits_of(session, steps, finish)
    prefill, *decoded = passes
    mean = fmean(one.cache for one in decoded)
    return prefill, Pass([one.masks[0] for one in decoded], mean), logits
