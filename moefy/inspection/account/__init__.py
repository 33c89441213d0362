"""The exact account of one MLP, for every token of one streaming pass over the moefied model.

    y(x) = b + sum_e y_e,   y_e = sum_{j in S_e} h_j d_j          dense
    y^(x) = b + sum_e r_e y_e + compensation                      moefied
    error = y - y^                                                the experts that are dark

Everything is a function of contribution vectors `h_j d_j`, so that no rescale of a neuron that
leaves the function alone changes a number here.

Memory is that of one batch and of what listens: inputs and masks of a batch are kept until its
pass is over, then every layer's ledger is made chunk by chunk and handed to the listeners.

Beside the ledgers stands the scale of the final norm, for what an expert does to the logits:

    logits = norm(r) W_U,   norm(r) = (r - centre(r)) gamma / sigma(r) + beta

With sigma frozen the logits are linear in the residual stream, so what an expert writes into it has a
direct effect on every logit: `<(y_e - centre(y_e)) gamma / sigma, W_U[v] - mean_v W_U>`. Subtracting
the mean over the vocabulary leaves the softmax alone and makes effects comparable between tokens.

Shapes: B documents of a batch, T tokens of one chunk, without padding, D width, N neurons, E experts (the
shared ones first), V vocabulary.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.data.corpus import IGNORED, Batch
from moefy.data.shards import Ints
from moefy.evaluation.outputs import first_choices, run_outputs
from moefy.experts.passes import Heard, observing
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.inspection.texts import Reading
from moefy.inspection.texts.tokens import NONE, Tokens
from moefy.methods.routers.baselines import expert_norms
from moefy.models.mlp import DenseMlp
from moefy.run.console import Reporter


@dataclass(frozen=True)
class Ledger:
    """One layer and a chunk of tokens; what is dear is computed when it is first asked for."""

    layer: int
    module: SparseMlp
    mlp: DenseMlp
    """All neurons in expert order, in fp32, without the output bias."""
    x_TD: Tensor
    """Inputs of the layer in the moefied model, errors of earlier layers included."""
    mask_TE: Tensor
    """Which experts ran (bool), shared ones included."""
    scores_TE: Tensor | None
    """Scores of the routed experts; None where nothing was scored (prompt-static decoding)."""
    tokens: Tokens
    scale_T: Tensor | None
    """sigma of the final norm; None if there is no `Unembedding`."""

    @property
    def experts(self) -> int:
        """E, the shared ones included."""
        return self.module.experts

    def here(self, chosen_T: NDArray[np.bool_] | Ints) -> Tensor:
        """A mask or numbers of tokens, on the device of the inputs."""
        return torch.from_numpy(chosen_T).to(self.x_TD.device)

    @property
    def later_T(self) -> Tensor:
        """All tokens but the first of a document (bool)."""
        return self.here(self.tokens.position_T > 0)

    @cached_property
    def h_TN(self) -> Tensor:
        """Activations of every neuron, those that did not run included."""
        return self.mlp.hidden(self.x_TD.float())

    @cached_property
    def y_TD(self) -> Tensor:
        """Dense output without its bias: the sum of all experts."""
        return self.h_TN @ self.mlp.down_ND

    @cached_property
    def norm_TE(self) -> Tensor:
        """Contribution norm `||y_e||` of every expert, run or not."""
        return expert_norms(self.h_TN, self.mlp.down_ND, self.experts)

    def inner(self, direction_TD: Tensor, at: Tensor | slice = slice(None)) -> Tensor:
        """`<y_e, direction>` of every expert and token `[T, E]`; with `at`, of these tokens."""
        along_TN = self.h_TN[at] * (direction_TD @ self.mlp.down_ND.T)
        return along_TN.view(len(along_TN), self.experts, -1).sum(-1)

    @cached_property
    def share_TE(self) -> Tensor:
        """Signed share `<y_e, y> / ||y||^2`: sums to 1 over experts; negative is cancellation."""
        energy_T1 = self.y_TD.square().sum(1, keepdim=True)
        share_TE = self.inner(self.y_TD)
        return torch.where(energy_T1 > 0, share_TE / energy_T1, 1 / self.experts)

    @cached_property
    def error_TD(self) -> Tensor:
        """Dense minus moefied output of the layer at this input."""
        compensation, shared = self.module.compensation, self.module.shared
        centred = compensation.centred(self.mlp)
        h_TN = self.h_TN if centred.centre_N is None else self.h_TN - centred.centre_N
        off_TN = (~self.mask_TE).repeat_interleave(h_TN.shape[1] // self.experts, dim=1)
        error_TD = (h_TN * off_TN) @ self.mlp.down_ND
        extra_TD = compensation(self.x_TD, self.mask_TE[:, shared:])
        return error_TD if extra_TD is None else error_TD - extra_TD.float()

    @property
    def margin_TE(self) -> Tensor | None:
        """How far each routed expert's score is from the middle of the token's threshold `[T, E - S]`:
        positive where it ran. None without scores."""
        if self.scores_TE is None:
            return None
        ran_TE, scores_TE = self.mask_TE[:, self.module.shared :], self.scores_TE.float()
        lowest_T = scores_TE.masked_fill(~ran_TE, torch.inf).amin(1)
        highest_T = scores_TE.masked_fill(ran_TE, -torch.inf).amax(1)
        middle_T = torch.nan_to_num((lowest_T + highest_T) / 2, 0.0, 0.0, 0.0)
        return scores_TE - middle_T[:, None]


def bare(module: SparseMlp) -> DenseMlp:
    """The neurons of a layer in expert order, in fp32, without the output bias, as they were stored."""
    return replace(module.weights, down_bias_D=None).to(torch.float32)


_CLOSE = 1e-3
_TOKENS = 16
"""Tokens that tell the norm's form; their logits are made for nothing."""


@dataclass
class Unembedding:
    """The linear map from the residual stream to logits, with the scale of every token frozen."""

    gamma_D: Tensor
    """Gain of the final norm."""
    centred: bool
    """Whether the norm subtracts the mean over channels (LayerNorm) or not (RMSNorm)."""
    weight_VD: Tensor
    """Output embedding, as the model holds it."""
    norm: nn.Module = field(repr=False)
    eps: float = 0.0

    def scale(self, residual_TD: Tensor) -> Tensor:
        """sigma `[T]` of the final norm for these residual streams, in fp32."""
        return (self.centre(residual_TD.float()).square().mean(1) + self.eps).sqrt()

    def centre(self, values_TD: Tensor) -> Tensor:
        """Less their mean over channels, where the norm subtracts it."""
        return values_TD - values_TD.mean(1, keepdim=True) if self.centred else values_TD

    def directions(self, tokens_T: Tensor | slice = slice(None)) -> Tensor:
        """For each of these tokens the direction `[., D]` whose inner product with `y_e` is sigma times
        the direct effect on its logit, the mean over the vocabulary taken off."""
        return self.centre((self.weight_VD[tokens_T].float() - self.mean_D) * self.gamma_D)

    @cached_property
    def mean_D(self) -> Tensor:
        """Mean over the vocabulary of the output embedding `[D]`, in fp32."""
        return self.weight_VD.mean(0, dtype=torch.float32)


def find_unembedding(model: PreTrainedModel, ids_T: Tensor) -> Unembedding | None:
    """The final norm and output embedding, found by running the model on some ids; None where the
    model has none of the forms above (encoders, or logits made in another way).

    The norm is the last module with a gain of the model's width whose output is what the output
    embedding reads; its form is whichever reproduces that output numerically.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(head, nn.Module) or weight is None or weight.is_meta:
        return None
    width = weight.shape[1]
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    read: list[Tensor] = []

    def norm_hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        if args and isinstance(out, Tensor):
            calls.append((module, args[0].detach(), out.detach()))

    handles = [head.register_forward_pre_hook(lambda _, args: read.append(args[0].detach()))]
    handles += [
        module.register_forward_hook(norm_hook)
        for module in model.modules()
        if isinstance(gain := getattr(module, "weight", None), Tensor) and gain.shape == (width,)
    ]
    try:
        with torch.no_grad():
            model(input_ids=ids_T[None, :_TOKENS].to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if not read:
        return None
    for module, r, out in reversed(calls):
        if out.shape == read[-1].shape and torch.equal(out, read[-1]):
            return _matching(module, r.reshape(-1, width), out.reshape(-1, width), weight.detach())
    return None


def _matching(norm: nn.Module, r_TD: Tensor, out_TD: Tensor, weight: Tensor) -> Unembedding | None:
    gain = norm.get_parameter("weight").detach().float()
    bias = getattr(norm, "bias", None)
    eps = float(getattr(norm, "eps", getattr(norm, "variance_epsilon", 0)))
    for gamma in (gain, 1 + gain):
        for centred in (True, False):
            found = Unembedding(gamma, centred, weight, norm, eps)
            made = found.centre(r_TD.float()) * gamma / found.scale(r_TD)[:, None]
            made = made + (0 if bias is None else bias.float())
            error = (made - out_TD.float()).norm() / out_TD.float().norm()
            if error < _CLOSE * (10 if out_TD.dtype != torch.float32 else 1):
                return found
    return None


@contextmanager
def scales(unembedding: Unembedding | None) -> Iterator[list[Tensor]]:
    """Collects sigma `[B, T]` of every pass run meanwhile."""
    found: list[Tensor] = []
    if unembedding is None:
        yield found
        return

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        r = args[0].detach()
        found.append(unembedding.scale(r.reshape(-1, r.shape[-1])).view(r.shape[:-1]))

    handle = unembedding.norm.register_forward_pre_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


_ENTRIES = 2**22
"""Most activations of a chunk, so that a ledger takes some tens of megabytes."""


class LedgerListener(Protocol):
    """Whatever keeps sums over tokens."""

    def hear(self, ledger: Ledger) -> None:
        """Take in one layer and a chunk of tokens."""


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    reading: Reading,
    listeners: Iterable[LedgerListener],
    *,
    unembedding: Unembedding | None = None,
    batches: list[int] | None = None,
    report: Reporter | None = None,
    what: str = "observe experts",
) -> None:
    """Run the model as it is over the batches and let the listeners hear every ledger.

    `batches` are the numbers of those to read (a process's share); None is all. Inside
    `all_experts(model)` every expert runs, which is the dense model.
    """
    listeners, report = list(listeners), report or Reporter(quiet=True)
    numbers = range(len(reading.batches)) if batches is None else batches
    for number in report.track(numbers, what):
        for ledger in _ledgers(model, reading, number, unembedding):
            for listener in listeners:
                listener.hear(ledger)


def _ledgers(
    model: PreTrainedModel, reading: Reading, number: int, unembedding: Unembedding | None
) -> Iterator[Ledger]:
    """The ledgers of one batch, chunk by chunk."""
    batch, layers = reading.batches[number], _Layers()
    with observing(model, batch, layers, scores=True), scales(unembedding) as sigma:
        outputs = run_outputs(model, batch, keep_BT=batch.mask())
    with scales(unembedding) as of_head:
        predicted_T = first_choices(outputs) if outputs.is_logits else None
    scale_T = None if of_head or not sigma else sigma[-1].flatten()[_kept(batch)]
    if of_head:  # a norm behind the last hidden states runs as logits are made, chunk by chunk
        scale_T = torch.cat([sigma_1C.flatten() for sigma_1C in of_head])
    tokens = tokens_of(batch, reading.first_B[number], predicted_T)
    for layer, module in sparse_mlps(model).items():
        # Of one layer at a time: in fp32 the weights of all may be twice the model.
        weights, heard = bare(module), layers.heard[layer]
        size = max(1, _ENTRIES // weights.neurons)
        for first in range(0, len(heard.x_TD), size):
            at = slice(first, first + size)
            yield Ledger(
                layer, module, weights, heard.x_TD[at], heard.mask_TE[at].bool(),
                None if heard.scores_TE is None else heard.scores_TE[at],
                tokens.take(at),
                None if scale_T is None else scale_T[at],
            )  # fmt: skip


class _Layers:
    """Keeps what every layer read and ran until its pass is over."""

    def __init__(self) -> None:
        self.heard: dict[int, Heard] = {}

    def hear(self, heard: Heard) -> None:
        self.heard[heard.layer] = heard


def _kept(batch: Batch) -> Tensor:
    """Places `[B * T]` of a batch that hold tokens (bool)."""
    mask = batch.mask()
    assert mask is not None
    return mask.flatten()


def tokens_of(batch: Batch, first: int, predicted_T: Tensor | None = None) -> Tokens:
    """The tokens of a batch whose first document has the number `first`.

    `predicted_T` is the token that is put first behind each; without it none is.
    """
    ids_BT = batch.inputs["input_ids"].numpy()
    rows, width = ids_BT.shape
    none_BT = np.full_like(ids_BT, NONE)
    previous_BT = np.concatenate([none_BT[:, :1], ids_BT[:, :-1]], axis=1)
    target_BT = none_BT
    if batch.targets_BT is not None:
        target_BT = batch.targets_BT.numpy()
        target_BT = np.where(target_BT == IGNORED, NONE, target_BT)
    position_BT = np.broadcast_to(np.arange(width), (rows, width))
    document_BT = np.broadcast_to(np.arange(first, first + rows)[:, None], (rows, width))
    keep_BT = _kept(batch).numpy().reshape(rows, width)
    grids = (ids_BT, previous_BT, target_BT, none_BT, position_BT, document_BT)
    columns = [grid[keep_BT].astype(np.int64) for grid in grids]
    if predicted_T is not None:
        columns[3] = predicted_T.cpu().numpy()
    return Tokens(*columns)
