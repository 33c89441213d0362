"""How much worse a model predicts than a base run of the same batch, token by token.

Language models: the change of cross-entropy and KL(base || other), in nats. With `z = logits - base`
and p the base's probabilities,

    m = <p, z>,   s = sum_v p_v exp(z_v - m) / sum_v p_v,   KL = log s,   CE change = m + log s - z_target

so that small effects are not lost in the difference of large numbers, nor in a sum of p that is 1 but for
rounding. Encoders have no next token:
their damage is 1 - cosine of the last hidden states, and they have no KL. It is taken as
`||u - v||^2 / 2` of the states at unit length, which is the same but never below 0, nor anything but 0
where nothing changed.

Shapes: B documents, T positions, J judged tokens of a batch, V vocabulary, D width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from moefy.activations import run
from moefy.data import IGNORED, Batch

NATS, COSINE = "nats per token", "1 - cosine of the last hidden states"
_CHUNK = 2**18
"""Logits compared at a time: few enough for the processor's caches."""
_LARGEST = 80.0


def judged(batch: Batch) -> Tensor:
    """Which positions `[B, T]` are judged (bool): those with a target, or all tokens for encoders."""
    if batch.targets_BT is not None:
        return batch.targets_BT != IGNORED
    mask = batch.mask()
    assert mask is not None
    return mask


def output(model: PreTrainedModel, batch: Batch) -> Tensor:
    """What a run is judged by: logits `[B, T, V]`, or last hidden states `[B, T, D]` of an encoder."""
    if batch.targets_BT is not None:
        result: Any = run(model, batch)
        return torch.as_tensor(result.logits)
    heard: list[Any] = []
    handle = model.base_model.register_forward_hook(lambda _, __, result: heard.append(result))
    try:
        run(model, batch)
    finally:
        handle.remove()
    return torch.as_tensor(heard[-1][0])


class Reference:
    """The base run of one batch."""

    def __init__(self, batch: Batch, out: Tensor) -> None:
        """`out` is what `output` gave."""
        self.keep = judged(batch).flatten().to(out.device)
        self.base_JV = self._rows(out)
        self.target_J: Tensor | None = None
        self.p_JV: Tensor | None = None
        if batch.targets_BT is not None:
            self.target_J = batch.targets_BT.flatten().to(out.device)[self.keep]
            self.p_JV = self.base_JV.softmax(-1)

    def _rows(self, out: Tensor) -> Tensor:
        rows = out.reshape(-1, out.shape[-1])
        rows = rows if bool(self.keep.all()) else rows[self.keep]
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    def compare(self, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """Damage `[J]` of another run of the batch, and KL `[J]` of language models."""
        other_JV = self._rows(out)
        if self.target_J is None or self.p_JV is None:
            away_JD = normalize(self.base_JV, dim=-1) - normalize(other_JV, dim=-1)
            return away_JD.square().sum(-1) / 2, None
        ce, kl, one_V = [], [], torch.ones_like(other_JV[:1])
        step = max(1, _CHUNK // other_JV.shape[1])
        for first in range(0, len(other_JV), step):
            at = slice(first, first + step)
            p, z = self.p_JV[at], other_JV[at] - self.base_JV[at]
            of_target = z.gather(1, self.target_J[at, None])[:, 0]
            m = torch.linalg.vecdot(p, z)
            z.sub_(m[:, None]).clamp_(max=_LARGEST).exp_()
            log_s = (torch.linalg.vecdot(p, z) / torch.linalg.vecdot(p, one_V)).log()
            ce.append(m + log_s - of_target)
            kl.append(log_s.clamp_min(0))
        return torch.cat(ce), torch.cat(kl)

    def target_log_p(self) -> Tensor:
        """Log-probability `[J]` that the base gives to the targets."""
        assert self.target_J is not None
        found = [
            rows.log_softmax(-1).gather(1, target[:, None])[:, 0]
            for rows, target in zip(self.base_JV.split(64), self.target_J.split(64), strict=True)
        ]
        return torch.cat(found)
