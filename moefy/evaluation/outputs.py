"""What a model puts out for a batch, and the one loop behind every figure.

    dense, sparse = run_outputs(stock, batch), run_outputs(moefied, batch)
    kl_J, ce_J = kl_per_token(dense, sparse), ce_per_token(sparse)
    judge(partial(run_outputs, moefied), batches, stock_outputs).mean("kl")    # per token

The logits `[B, T, V]` of a batch, in fp32 and with what a comparison makes of them, would take more
memory than many a model. A pass therefore keeps its last hidden states; logits are made of chunks of
`LOGITS_BYTES`, and with a gradient made again in the backward pass (`moefy.experts.passes`). In every pass they
are compared with logits that the model makes at once; where they differ, it is left to make them all.

Judged are the positions that predict a token; without targets all tokens, or whole documents and images
where the model has one output for each. What a model puts out its class says (`moefy.models.answers`).

Shapes: Q documents in the order of the batches, B of one batch, T positions, P outputs of a document
(positions, or fewer), J judged ones, C of a chunk, V vocabulary or classes, D width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy, log_softmax
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from moefy.data.corpus import IGNORED, Batch
from moefy.experts.passes import SHOWN, Head, inputs_of, short_logits
from moefy.experts.routed import say_once
from moefy.models.answers import answer_of

LOGITS_BYTES = 2**24
"""Memory of one chunk's logits in fp32; a comparison takes several times as much."""

BACKWARD_TOKENS = 512
"""Positions that are backpropagated at a time: what autograd keeps of every layer stays in memory."""

_CLOSE, _ROUNDINGS = 1e-5, 4
"""Most by which a position's logits may depend on what else is in its chunk, as a share of the largest;
in 16 bits, rounding errors."""


@dataclass(frozen=True)
class Outputs:
    """What one pass puts out at its judged positions."""

    rows_JD: Tensor
    """Last hidden states; or what is compared itself, where `head` is None."""
    head: Callable[[Tensor], Tensor] | None
    """Logits `[B, C, V]` of hidden states `[B, C, D]`."""
    size: int
    """V, or D of hidden states."""
    keep_BT: Tensor
    """Which positions are judged (bool), on the CPU."""
    targets_J: Tensor | None
    classes: bool
    """Whether the numbers are log-probabilities of tokens or classes, but for a constant."""
    is_logits: bool
    """Whether they are logits of the vocabulary."""
    keeps_gradient: bool = False
    """Whether logits carry a gradient, where gradients are taken."""

    def __len__(self) -> int:
        """J."""
        return len(self.rows_JD)

    def chunks(self) -> list[slice]:
        """Positions whose logits are in memory together."""
        step = max(1, LOGITS_BYTES // (4 * self.size))
        return [slice(first, first + step) for first in range(0, len(self), step)]

    def logits(self, rows_CD: Tensor) -> Tensor:
        """Logits `[C, V]` of some of `rows_JD`, in fp32 or wider."""
        with torch.set_grad_enabled(self.keeps_gradient and torch.is_grad_enabled()):
            found = rows_CD if self.head is None else self.head(rows_CD[None])[0]
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def with_logits(self) -> "Outputs":
        """The same with its logits made once and for all, where one chunk holds them."""
        if self.head is None or len(self.chunks()) > 1:
            return self
        return replace(self, rows_JD=self.logits(self.rows_JD), head=None)

    def detach(self) -> "Outputs":
        """The same without a gradient."""
        return replace(self, rows_JD=self.rows_JD.detach(), keeps_gradient=False)


ABSENT = -1e4
"""Logit of a position that a document does not have: its probability is zero in any precision."""


def values_of(model: PreTrainedModel, result: Any, mask_BT: Tensor | None = None) -> Tensor:
    """What a forward pass is compared by `[B, P, V]`, by the class of the model.

    Logits or hidden states of all positions; labels or values of a document, P = 1, or two labels (there or
    not) for each of P; distributions over its V = T positions, P = 2, of where an answer starts and ends.
    """
    answer = answer_of(model)
    value: Tensor = result[answer.field]
    if answer.form == "spans":
        value = torch.stack([value, result["end_logits"]], 1)
        absent_BT = torch.zeros_like(value[:, 0]) if mask_BT is None else ~mask_BT.to(value.device)
        return value.masked_fill(absent_BT[:, None].bool(), ABSENT)
    if answer.binary:
        return torch.stack([torch.zeros_like(value), value], -1)
    return value[:, None] if answer.pooled else value


def judged_positions(batch: Batch, shape: torch.Size | None = None) -> Tensor:
    """Which positions `[B, T]` are judged (bool): those with a target, or else all tokens; `shape` is
    that of inputs without a mask."""
    if batch.targets_BT is not None:
        return batch.targets_BT != IGNORED
    mask_BT = batch.mask()
    if mask_BT is None:
        assert shape is not None
        return torch.ones(shape, dtype=torch.bool)
    return mask_BT


def run_outputs(
    model: PreTrainedModel,
    batch: Batch,
    *,
    through: nn.Module | None = None,
    keep_BT: Tensor | None = None,
    device: torch.device | None = None,
) -> Outputs:
    """Run a batch; `through` is `model` as it may be wrapped, `keep_BT` other positions to judge,
    `device` where the inputs are to be if not with the weights."""
    inputs, answer = inputs_of(model, batch, device), answer_of(model)
    with short_logits(model) as trunk:
        result: Any = (through or model)(**inputs)
    found, head = values_of(model, result, batch.mask()), None
    if trunk.hidden is not None:
        head = Head(model, inputs, trunk.last, trunk.given)
        size, found = found.shape[-1], trunk.hidden
        if not _agrees(head, trunk.hidden, result.logits):
            say_once(
                f"{type(model).__name__}: logits of single positions are not those of the whole; all of "
                "a batch are held in memory"
            )
            found, head = head(trunk.hidden), None
    else:
        size = found.shape[-1]
    if answer.pooled:
        keep_BT = torch.ones(found.shape[:2], dtype=torch.bool)
    elif keep_BT is None:
        keep_BT = judged_positions(batch, found.shape[:2])
    return Outputs(
        found[keep_BT.to(found.device)], head, size, keep_BT, _targets(batch, keep_BT, found.device),
        classes=answer.classes,
        is_logits=answer.tokens,
        keeps_gradient=torch.is_grad_enabled(),
    )  # fmt: skip


def states_of(model: PreTrainedModel, batch: Batch) -> Outputs:
    """The last hidden states of every token, whatever the model makes of them."""
    with short_logits(model):
        result = model(**inputs_of(model, batch), output_hidden_states=True)
    hidden = getattr(result, "last_hidden_state", None)
    return outputs_of(
        batch, torch.as_tensor(result.hidden_states[-1] if hidden is None else hidden)
    )


def outputs_of_all(model: PreTrainedModel, batch: Batch) -> Outputs:
    """What shows at every token whether two models are the same: outputs, or, where a text has one alone,
    hidden states, which that one is made of."""
    mask_BT = batch.mask()
    if answer_of(model).pooled and mask_BT is not None:
        return states_of(model, batch)
    return run_outputs(model, batch, keep_BT=mask_BT)


def judged_count(model: PreTrainedModel, batch: Batch) -> int:
    """J of a batch, without running it."""
    if answer_of(model).pooled or batch.mask() is None:
        return len(batch.samples)
    return int(judged_positions(batch).sum())


def outputs_of(batch: Batch, values_BTV: Tensor) -> Outputs:
    """What logits, or hidden states, of all positions say."""
    keep_BT = judged_positions(batch, values_BTV.shape[:2])
    targets_J = _targets(batch, keep_BT, values_BTV.device)
    return Outputs(
        values_BTV[keep_BT.to(values_BTV.device)], None, values_BTV.shape[-1], keep_BT, targets_J,
        classes=targets_J is not None, is_logits=targets_J is not None,
    )  # fmt: skip


def _targets(batch: Batch, keep_BT: Tensor, device: torch.device) -> Tensor | None:
    return None if batch.targets_BT is None else batch.targets_BT[keep_BT].to(device)


@torch.no_grad()
def _agrees(head: Head, hidden_BTD: Tensor, shown_1CV: Tensor) -> bool:
    """Whether the last of the positions whose logits were made at once has the same alone."""
    if shown_1CV.shape[:2] != hidden_BTD[:1, :SHOWN].shape[:2]:
        return False
    alone_V = head(hidden_BTD[:1, :SHOWN][:, -1:])[0, 0].float()
    together_V = shown_1CV[0, -1].float()
    error = float((alone_V - together_V).abs().max())
    share = max(_CLOSE, _ROUNDINGS * torch.finfo(hidden_BTD.dtype).eps)
    return error <= share * float(together_V.abs().max())


def per_position(of: Callable[..., tuple[Tensor, ...]], *outputs: Outputs) -> tuple[Tensor, ...]:
    """What `of(at, *logits)` makes of the logits `[C, V]` of each: tensors `[C]`, joined to `[J]`.

    `at` is where the chunk lies in `[J]`. With a gradient the logits are made again when it is taken.
    """
    first = outputs[0]
    if any(one.size != first.size or len(one) != len(first) for one in outputs):
        raise ValueError(f"passes of other shapes: {[(len(one), one.size) for one in outputs]}")
    chunks = first.chunks()
    again = torch.is_grad_enabled() and len(chunks) > 1
    parts: list[tuple[Tensor, ...]] = []
    for at in chunks:

        def compare(*rows: Tensor, at: slice = at) -> tuple[Tensor, ...]:
            made = (
                one.logits(r).to(first.rows_JD.device) for one, r in zip(outputs, rows, strict=True)
            )
            return of(at, *made)

        rows = [one.rows_JD[at] for one in outputs]
        parts.append(checkpoint(compare, *rows, use_reentrant=False) if again else compare(*rows))
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def kl_per_token(dense: Outputs, sparse: Outputs) -> Tensor:
    """KL(dense || sparse) `[J]`, in nats."""
    return per_position(lambda _, p, q: (kl_of(p, q),), dense, sparse)[0]


def kl_of(dense_CV: Tensor, sparse_CV: Tensor) -> Tensor:
    """KL `[C]` of logits, in nats."""
    p, q = log_softmax(dense_CV, -1), log_softmax(sparse_CV, -1)
    return (p.exp() * (p - q)).sum(-1)


def ce_per_token(outputs: Outputs) -> Tensor:
    """Cross-entropy `[J]`, in nats."""
    return per_position(lambda at, logits: (ce_of(logits, outputs, at),), outputs)[0]


def ce_of(logits_CV: Tensor, outputs: Outputs, at: slice) -> Tensor:
    """Cross-entropy `[C]` of the logits of one chunk, in nats; zero where nothing is predicted."""
    assert outputs.targets_J is not None
    return cross_entropy(logits_CV, outputs.targets_J[at], reduction="none", ignore_index=IGNORED)


def placed(value_J: Tensor, keep_BT: Tensor) -> Tensor:
    """Values where their positions are `[B, T]`, zero elsewhere; on the CPU."""
    placed_BT = torch.zeros(keep_BT.shape, dtype=value_J.dtype)
    placed_BT[keep_BT] = value_J.cpu()
    return placed_BT


def first_choices(outputs: Outputs) -> Tensor:
    """The token `[J]` that is put first."""
    return per_position(lambda _, logits: (logits.argmax(-1),), outputs)[0]


def compared(dense: Outputs, sparse: Outputs) -> dict[str, Tensor]:
    """`ce_dense` and `ce` where tokens are predicted, `kl` and `agreement` `[J]`."""

    def of(at: slice, p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        found = (kl_of(p, q).clamp_min(0), (p.argmax(-1) == q.argmax(-1)).float())
        if sparse.targets_J is None:
            return found
        return (*found, ce_of(p, sparse, at), ce_of(q, sparse, at))

    found = per_position(of, dense, sparse)
    return dict(zip(("kl", "agreement", "ce_dense", "ce"), found, strict=False))


def predictions(_: Outputs, got: Outputs) -> dict[str, Tensor]:
    """`ce`, and `right` where the token that comes next is put first `[J]`: no other model is needed."""

    def of(at: slice, logits_CV: Tensor) -> tuple[Tensor, ...]:
        assert got.targets_J is not None
        return ce_of(logits_CV, got, at), (logits_CV.argmax(-1) == got.targets_J[at]).float()

    return dict(zip(("ce", "right"), per_position(of, got), strict=True))


def cosine(dense: Outputs, sparse: Outputs) -> Tensor:
    """Cosine `[J]` of what is compared."""

    def of(_: slice, p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        return (cosine_similarity(p, q, dim=-1),)

    return per_position(of, dense, sparse)[0]


def squared_error(dense: Outputs, sparse: Outputs) -> Tensor:
    """Mean squared error `[J]` of values."""
    return per_position(lambda _, p, q: ((p - q).square().mean(-1),), dense, sparse)[0]


def distances(dense: Outputs, sparse: Outputs) -> dict[str, Tensor]:
    """What distillation minimises, as `distance` `[J]`: KL(dense || sparse), or without probabilities the squared
    error over the squared norm."""

    def relative(_: slice, p: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        return ((p - q).square().sum(-1) / p.square().sum(-1).clamp_min(1e-12),)

    if sparse.classes:
        return {"distance": kl_per_token(dense, sparse)}
    return {"distance": per_position(relative, dense, sparse)[0]}


def distance(dense: Outputs, sparse: Outputs) -> Tensor:
    """The mean of `distances` over judged positions."""
    return distances(dense, sparse)["distance"].mean()


@torch.no_grad()
def difference(got: Outputs, want: Outputs) -> tuple[float, float, float]:
    """Norm of the difference over all judged positions, norm of `want`, and the largest difference."""

    def of(_: slice, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        norm = torch.linalg.vector_norm
        return norm(a - b, dim=-1), norm(b, dim=-1), norm(a - b, torch.inf, dim=-1)

    error_J, size_J, most_J = (value_J.double() for value_J in per_position(of, got, want))
    return float(error_J.norm()), float(size_J.norm()), float(most_J.max())


Objective = Callable[[nn.Module, Batch], dict[str, Tensor]]
"""Sums over the tokens of a batch by name; `loss` among them is what is minimised."""


def language(plain: PreTrainedModel) -> Objective:
    """Cross-entropy on the text."""

    def objective(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        ce = ce_per_token(run_outputs(plain, batch, through=model)).sum()
        return {"loss": ce, "ce": ce}

    return objective


Floats = NDArray[np.float64]
Source = Callable[[Batch], Outputs] | Sequence[Outputs]
Figures = Callable[[Outputs, Outputs], dict[str, Tensor]]
"""From what is compared with, and what was run, to figures `[J]` by name."""


@dataclass(frozen=True)
class Judged:
    """One batch and its figures."""

    batch: Batch
    keep_BT: Tensor
    """Which positions were judged (bool)."""
    figures_J: dict[str, Tensor]

    def placed(self, name: str) -> Tensor:
        """One figure `[B, T]`, zero where nothing is judged; on the CPU."""
        return placed(self.figures_J[name], self.keep_BT)


@dataclass(frozen=True)
class Judgement:
    """Sums over the judged positions of every document."""

    sums_Q: dict[str, Floats]
    tokens_Q: Floats

    def mean(self, name: str) -> float:
        """A figure per judged position."""
        return float(self.sums_Q[name].sum() / self.tokens_Q.sum())


@torch.no_grad()
def judged(
    run: Source, batches: Iterable[Batch], dense: Source | None = None, of: Figures | None = None
) -> Iterator[Judged]:
    """Figures of every batch in turn; what dense says is made first, and then let go.

    Without `dense` outputs are judged by the text alone (`predictions`), else `compared`.
    """
    of = of or (predictions if dense is None else compared)
    for number, batch in enumerate(batches):
        want = None if dense is None else _outputs(dense, number, batch)
        got = _outputs(run, number, batch)
        yield Judged(batch, got.keep_BT, of(got if want is None else want, got))


def judge(
    run: Source, batches: Iterable[Batch], dense: Source | None = None, of: Figures | None = None
) -> Judgement:
    """`judged`, summed by document."""
    rows: dict[str, list[Floats]] = {}
    tokens: list[Floats] = []
    for one in judged(run, batches, dense, of):
        tokens.append(one.keep_BT.double().sum(1).numpy())
        for name, value_J in one.figures_J.items():
            sums_B = placed(value_J.double(), one.keep_BT).sum(1)
            rows.setdefault(name, []).append(sums_B.numpy())
    sums_Q = {name: np.concatenate(parts) for name, parts in rows.items()}
    return Judgement(sums_Q, np.concatenate(tokens))


def _outputs(source: Source, number: int, batch: Batch) -> Outputs:
    return source(batch) if callable(source) else source[number]
