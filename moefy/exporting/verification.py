"""Whether an exported checkpoint computes what moefy's model does, measured with stock transformers.

Both models run the same few token sequences. A *flip* is a token for which a layer runs other
experts; it changes everything after it, so the error that shows a wrong export is taken before the
first flip of each sequence.

Shapes: B documents, T tokens, V vocabulary, E routed experts, K experts that run.
"""

import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moefy.data.corpus import Batch, load_corpus
from moefy.data.inputs import load_tokenizer, read_batches
from moefy.errors import MoefyError
from moefy.evaluation.outputs import values_of
from moefy.experts.loading import open_model
from moefy.experts.passes import run, watching
from moefy.experts.placement import placement
from moefy.experts.sparse_mlp import all_experts, sparse_mlps
from moefy.models.checkpoint import Checkpoint

DOCUMENTS, CONTEXT = 8, 48
TOLERANCE, ROUNDED_TOLERANCE, DENSE_TOLERANCE = 1e-3, 2e-2, 1e-5
"""Largest relative error of fp32 logits before the first flip: of an exact export, of one whose
scaled weights had to be rounded, and of the dense one."""
MOST_FLIPS = 0.1
ROW_BYTES = 16
"""torch's grouped matrix product, which transformers takes unless told otherwise, refuses rows of an
expert's neurons that are no multiple of this."""
EMULATED = 5 * 10**9
"""Parameters times tokens up to which 16-bit arithmetic is measured where it must be emulated."""


@dataclass(frozen=True)
class Trace:
    """Logits and routing of one model on some batches, tokens only."""

    logits: list[Tensor]
    """`[B, T, V]` of each batch."""
    masks: list[Tensor]
    """`[L, B, T, E]` of each batch: which routed experts ran in each of L layers."""


@dataclass(frozen=True)
class Difference:
    """An exported model against moefy's."""

    dtype: str
    tokens: int
    relative_error: float
    """Norm of the difference of all logits over the norm of moefy's."""
    relative_error_before_flips: float | None
    """The same up to each sequence's first flip; None where every sequence begins with one."""
    max_difference: float | None
    """Largest difference of a logit before flips."""
    flips: int
    """Tokens and layers that run other experts."""
    flip_rate: float


def verification_batches(checkpoint: Checkpoint, vocabulary: int) -> list[Batch]:
    """A few documents: of the bundled corpus if there is a tokenizer, else of random token ids."""
    if load_tokenizer(checkpoint.folder) is not None:
        corpus = load_corpus().take(DOCUMENTS)
    else:
        generator = torch.Generator().manual_seed(0)
        corpus = load_corpus(
            torch.randint(vocabulary, (DOCUMENTS, CONTEXT), generator=generator).tolist()
        )
    return read_batches(checkpoint, "decoder", corpus, CONTEXT)


def verify(
    folder: Path, written: Path, batches: list[Batch], *, exact: bool, expert_size: int
) -> dict[str, Any]:
    """Compare the stock checkpoint `written` with the artefact `folder`, in fp32 and as stored.

    `exact` says whether scaling rounded no weight; `expert_size` is F. Raises `MoefyError` where
    they differ in fp32 by more than the tolerance.
    """
    reference = _moefied(folder, batches, torch.float32)
    got = _stock(written, batches, torch.float32, expert_size)
    full = compare(reference, got, batches, torch.float32)
    limit = TOLERANCE if exact else ROUNDED_TOLERANCE
    error = full.relative_error_before_flips
    if error is None or not error <= limit or full.flip_rate > MOST_FLIPS:
        raise MoefyError(
            "verification failed: logits of the exported model differ from moefy's by "
            f"{full.relative_error if error is None else error:.1e} (relative; at most {limit:.0e}) and "
            f"{full.flip_rate:.1%} of its expert sets (at most {MOST_FLIPS:.0%}); nothing was "
            "written; please report this with the model's config.json"
        )
    measured = {"float32": asdict(full)}
    stored = _stored_dtype(written)
    if stored != torch.float32 and _has_arithmetic(written, batches):
        low = _moefied(folder, batches, stored)
        name = str(stored).removeprefix("torch.")
        got = _stock(written, batches, stored, expert_size)
        measured[name] = asdict(compare(low, got, batches, stored))
        # What the dtype itself costs, to set the figure above against.
        own = compare(reference, low, batches, stored)
        measured[f"moefy itself, {name} for float32"] = asdict(own)
    return measured


def verify_dense(folder: Path, written: Path, batches: list[Batch]) -> float:
    """Relative error of the dense checkpoint against the artefact with every expert on, in fp32.

    Raises `MoefyError` above `DENSE_TOLERANCE`.
    """
    reference = _moefied(folder, batches, torch.float32, dense=True)
    got = _run(open_model(written, dtype=torch.float32, dense=True), batches, [])
    error = _relative(list(zip(got.logits, reference.logits, strict=True)))
    if error is None or not error <= DENSE_TOLERANCE:
        raise MoefyError(
            f"verification failed: logits of the dense model differ by {error} (relative; at most "
            f"{DENSE_TOLERANCE:.0e}); nothing was written; please report this with the model's "
            "config.json"
        )
    return error


def compare(reference: Trace, got: Trace, batches: list[Batch], dtype: torch.dtype) -> Difference:
    """How far `got` is from `reference`, padding left out."""
    total, before, clean = [], [], []
    flips = tokens = layers = 0
    for batch, want, have, mask, other in zip(
        batches, reference.logits, got.logits, reference.masks, got.masks, strict=True
    ):
        real_BT = batch.mask()
        if real_BT is None:
            real_BT = torch.ones(want.shape[:2], dtype=torch.bool)
        flipped_LBT = (mask != other).any(-1) & real_BT
        before_BT = (flipped_LBT.any(0).cumsum(1) == 0) & real_BT
        flips += int(flipped_LBT.sum())
        tokens, layers = tokens + int(real_BT.sum()), len(mask)
        total.append((have[real_BT], want[real_BT]))
        clean.append((have[before_BT], want[before_BT]))
        before.append((have[before_BT] - want[before_BT]).abs())
    return Difference(
        dtype=str(dtype).removeprefix("torch."),
        tokens=tokens,
        relative_error=_relative(total) or 0.0,
        relative_error_before_flips=_relative(clean),
        max_difference=max((float(d.max()) for d in before if d.numel()), default=None),
        flips=flips,
        flip_rate=flips / max(1, tokens * layers),
    )


def _relative(pairs: list[tuple[Tensor, Tensor]]) -> float | None:
    """Norm of the differences over the norm of the second ones; None if there is nothing."""
    norm = _norm([want for _, want in pairs])
    return _norm([have - want for have, want in pairs]) / norm if norm else None


def _norm(parts: list[Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))


def _moefied(
    folder: Path, batches: list[Batch], dtype: torch.dtype, *, dense: bool = False
) -> Trace:
    """Run moefy's model of the artefact; with `dense` every expert."""
    model = open_model(folder, dtype=dtype, dense=False)
    modules, masks = sparse_mlps(model), list[Tensor]()

    def keep(layer: int, _: Tensor, mask_TE: Tensor) -> None:
        masks.append(mask_TE[:, modules[layer].shared :].cpu())

    with watching(modules, keep), all_experts(model) if dense else nullcontext():
        return _run(model, batches, masks)


def _stock(folder: Path, batches: list[Batch], dtype: torch.dtype, expert_size: int) -> Trace:
    """Run the exported mixture of experts in stock transformers."""
    options = {**placement(), "dtype": dtype, "output_loading_info": True}
    if expert_size * dtype.itemsize % ROW_BYTES:
        options["experts_implementation"] = "eager"
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)
    model, info = loaded
    wrong = {kind: sorted(names)[:3] for kind, names in info.items() if names}
    if wrong:
        raise MoefyError(
            "verification failed: transformers does not take the tensors of the exported model as "
            f"they are: {wrong}; nothing was written; please report this"
        )
    masks: list[Tensor] = []

    def hook(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
        logits_TE, ids_TK = output[0], output[2]
        empty_TE = torch.zeros(logits_TE.shape, dtype=torch.bool)
        masks.append(empty_TE.scatter_(1, ids_TK.cpu(), True))

    for name, module in model.named_modules():
        if name.endswith(".gate"):
            module.register_forward_hook(hook)
    return _run(model.eval(), batches, masks)


@torch.no_grad()
def _run(model: PreTrainedModel, batches: list[Batch], masks: list[Tensor]) -> Trace:
    """Logits and routing; `masks` takes those `[T, E]` of every layer while the model runs."""
    logits, routing = [], []
    for batch in batches:
        masks.clear()
        logits.append(values_of(model, run(model, batch)).float().cpu())
        shape = logits[-1].shape[:2]
        routing.append(
            torch.stack([m.view(*shape, -1) for m in masks]) if masks else torch.empty(0)
        )
    return Trace(logits, routing)


def _stored_dtype(folder: Path) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, Checkpoint.open_config(folder).config["dtype"])
    return dtype


def _has_arithmetic(folder: Path, batches: list[Batch]) -> bool:
    """Whether this machine computes in 16 bits, or the model is small enough to emulate it."""
    if placement().get("dtype") != torch.float32:
        return True
    parameters = Checkpoint.open(folder).bytes // 2
    return parameters * sum(batch.inputs["input_ids"].numel() for batch in batches) <= EMULATED
