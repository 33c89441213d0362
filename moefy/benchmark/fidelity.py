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

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

from moefy.benchmark.engines.table import Unavailable
from moefy.benchmark.rounding import relative_error
from moefy.run.memory import free_memory

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
    kl_C = torch.cat([_kl(*pair) for pair in zip(got, want, strict=True)])
    return Fidelity(
        relative_error(got, want), float(kl_C.quantile(0.5)), float(kl_C.mean()), float(kl_C.max())
    )


def _kl(got_BV: Tensor, want_BV: Tensor) -> Tensor:
    """KL from `want` in fp64 `[B]`; rounding takes it no lower than 0."""
    want_BV, got_BV = (log_softmax(logits.double(), -1) for logits in (want_BV, got_BV))
    return (want_BV.exp() * (want_BV - got_BV)).sum(-1).clamp_min(0)


def judge(found: Fidelity, allowed: float) -> None:
    """Raise `Unavailable` where a run is further off than allowed; so is one that is no number."""
    if not found.median <= allowed:
        raise Unavailable(
            f"computes something else: KL {found.median:.1e} nats to the reference (median), at most "
            f"{allowed:.1e}; relative error {found.error:.1e}"
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
