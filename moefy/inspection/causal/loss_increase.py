"""How much worse a model predicts than a base run of the same batch, token by token.

Language models: the increase of cross-entropy and KL(base || other), in nats. With `z = logits - base`
and p the base's probabilities,

    m = <p, z>,   s = sum_v p_v exp(z_v - m) / sum_v p_v,   KL = log s,   increase = m + log s - z_target

so that small effects are not lost in the difference of large numbers, nor in a sum of p that is 1 but for
rounding. Encoders have no next token:
their loss is 1 - cosine of the last hidden states, and they have no KL. It is taken as
`||u - v||^2 / 2` of the states at unit length, which is the same but never below 0, nor anything but 0
where nothing changed.

Shapes: J judged tokens of a batch, C of a chunk, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from moefy.data.corpus import Batch
from moefy.evaluation.outputs import Outputs, ce_per_token, outputs_of, per_position, run_outputs
from moefy.experts.passes import walk

NATS, COSINE = "nats per token", "1 - cosine of the last hidden states"
_CHUNK = 2**18
"""Logits compared at a time: few enough for the processor's caches."""
_LARGEST = 80.0


def output(model: PreTrainedModel, batch: Batch) -> Outputs:
    """What a run is judged by: logits, or last hidden states of an encoder."""
    if batch.targets_BT is not None:
        return run_outputs(model, batch)
    results: list[Any] = []
    with model.base_model.register_forward_hook(lambda _, __, result: results.append(result)):
        walk(model, batch)
    return outputs_of(batch, torch.as_tensor(results[-1][0]))


class Reference:
    """The base run of one batch."""

    def __init__(self, base: Outputs) -> None:
        """`base` is what `output` gave. Few logits are kept, many made again for every comparison."""
        self.base = base.with_logits()
        self.p_JV: Tensor | None = None
        if base.classes and self.base.head is None:
            rows_JV = self.base.rows_JD
            self.p_JV = self.base.logits(rows_JV).softmax(-1)

    def compare(self, other: Outputs) -> tuple[Tensor, Tensor | None]:
        """Loss increase `[J]` of another run of the batch, and KL `[J]` of language models."""
        if not self.base.classes:
            return per_position(_apart, self.base, other)[0], None
        ce_J, kl_J = per_position(self._increase, self.base, other)
        return ce_J, kl_J

    def _increase(self, here: slice, base_CV: Tensor, other_CV: Tensor) -> tuple[Tensor, ...]:
        assert self.base.targets_J is not None
        target_C = self.base.targets_J[here]
        p_CV = base_CV.softmax(-1) if self.p_JV is None else self.p_JV[here]
        ce, kl, one_V = [], [], torch.ones_like(other_CV[:1])
        step = max(1, _CHUNK // other_CV.shape[1])
        for first in range(0, len(other_CV), step):
            at = slice(first, first + step)
            p, z = p_CV[at], other_CV[at] - base_CV[at]
            of_target = z.gather(1, target_C[at, None])[:, 0]
            m = torch.linalg.vecdot(p, z)
            z.sub_(m[:, None]).clamp_(max=_LARGEST).exp_()
            log_s = (torch.linalg.vecdot(p, z) / torch.linalg.vecdot(p, one_V)).log()
            ce.append(m + log_s - of_target)
            kl.append(log_s.clamp_min(0))
        return torch.cat(ce), torch.cat(kl)

    def target_log_p(self) -> Tensor:
        """Log-probability `[J]` that the base gives to the targets."""
        return -ce_per_token(self.base)


def _apart(_: slice, base_CD: Tensor, other_CD: Tensor) -> tuple[Tensor]:
    """1 - cosine `[C]`, as the squared distance of unit vectors."""
    away_CD = normalize(base_CD, dim=-1) - normalize(other_CD, dim=-1)
    return (away_CD.square().sum(-1) / 2,)
