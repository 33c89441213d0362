"""Whether an engine computes what it should: its layers, up to rounding, and its logits, beside those of fp32.

The exact output is that of the same weights, on the same input and with the same experts, in fp64. An
engine rounds a number to the dtype of the weights, unit roundoff `u`, where it stores it, and adds up
products with unit roundoff `v` (that of fp32, or of fp64). Rounding errors are taken to be independent
and of mean zero. Then the sum of `n` products `p_i` is off by about `sqrt(n) v sum |p_i|` (Higham and
Mary, A new approach to probabilistic rounding error analysis, SIAM J. Sci. Comput. 41(5), 2019, which
replaces the `n` of Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 3.1), and
errors of different neurons add up as their squares. To first order, with `g` the gate, `u'` up and `a =
act(g)`:

    e_g = sqrt(D) v |x| |G| + u/2 |g|                            and e_u' alike
    e_a = the largest |act(g +- e_g) - a|, + u/2 |a|
    e_h = e_a |u'| + |a| e_u' + u |h|
    e_y = | e_h d |_2 + sqrt(N_on) v sum |h| |d| + (1 + sqrt(K)) u/2 (|y| + |h d|_2)

`u/2` is about the standard deviation of a rounding of relative size at most `u`. The last term is what
engines lose that add up K experts in the dtype of the weights; partial sums of terms with signs at
random are of the size `|y| + |h d|_2`. Of a token the norm over its width is compared, where errors of
single numbers average out: `SLACK` is for what the model leaves out, not for chance.

Whole models are checked layer by layer, each on the very input that an engine gave it. Routers cut, at
largest inputs, thresholds or the k-th score, so that hidden states which differ in the last digit may choose
other experts: no two engines can be asked to agree on what a whole model chooses. What can be asked is what
a layer makes of its own input `x`:

- It chose experts that its router may choose for `x`. The router is run again on `x`, eagerly and in the
  same dtype. An engine that runs the same code must choose the same. `torch.compile` adds up in another
  order: where it chose otherwise, the selection has to choose that for scores which are off by no more
  than rounding.
- It put out what these experts give for `x`, within the bound above.

What is between the layers is judged by the logits (`compare`; `levels.model` says how far they may be off).

Shapes: T tokens, D width, N neurons, E experts, C neurons of a chunk or positions, B sequences, V vocabulary.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.benchmark.engines.base import Unavailable
from moefy.evaluation.outputs import kl_of
from moefy.experts.placement import present
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.methods.base import Context, Selection
from moefy.models.mlp import DenseMlp, activation_function
from moefy.run.memory import free_memory

SLACK = 4.0
"""Times the expected error that is still rounding."""
CHUNK = 1024
"""Neurons that are widened to fp64 at a time, or those of one expert."""


@dataclass(frozen=True)
class Exact:
    """What a layer has to put out, and how far rounding may take an engine from it."""

    y_TD: Tensor
    bound_T: Tensor
    """Of the norm of a token's error."""


def exact(mlp: DenseMlp, x_TD: Tensor, mask_TE: Tensor, extra_TD: Tensor | None = None) -> Exact:
    """The experts of the mask on `x_TD` in fp64, with `extra_TD` added, and the bound of the docstring."""
    size = mlp.neurons // mask_TE.shape[1]
    step = size * max(1, CHUNK // size)
    on_TE, wide_TD = mask_TE.bool(), x_TD.double()
    unit = _unit(x_TD.dtype, mlp.down_ND.dtype)
    fine = min(unit, _unit(torch.float32))
    y_TD, size_TD, square_TD, error_TD = (torch.zeros_like(wide_TD) for _ in range(4))
    for first in range(0, mlp.neurons, step):
        rows = slice(first, min(first + step, mlp.neurons))
        on_TC = on_TE[:, first // size : rows.stop // size].repeat_interleave(size, 1)
        if not on_TC.any():
            continue
        part = mlp.take(rows).to(torch.float64)
        h_TC, off_TC = (value_TC * on_TC for value_TC in _hidden(part, wide_TD, unit, fine))
        y_TD += h_TC @ part.down_ND
        size_TD += h_TC.abs() @ part.down_ND.abs()
        square_TD += h_TC.square() @ part.down_ND.square()
        error_TD += off_TC.square() @ part.down_ND.square()
    for added in (mlp.down_bias_D, extra_TD):
        if added is not None:
            y_TD += added.double()
            square_TD += added.double().square()
    experts_T1 = on_TE.sum(1, keepdim=True)
    stored_TD = (1 + experts_T1**0.5) * unit / 2 * (y_TD.abs() + square_TD**0.5)
    summed_TD = (experts_T1 * size) ** 0.5 * fine * size_TD
    bound_T = SLACK * (error_TD**0.5 + summed_TD + stored_TD).norm(dim=1)
    return Exact(y_TD, bound_T + torch.finfo(x_TD.dtype).tiny * mlp.neurons)


def _hidden(mlp: DenseMlp, x_TD: Tensor, unit: float, fine: float) -> tuple[Tensor, Tensor]:
    """Activations `[T, C]` and how far they may be off; `mlp` and `x_TD` are in fp64."""

    summed = float(mlp.width) ** 0.5 * fine

    def off(value_TC: Tensor, weight_CD: Tensor) -> Tensor:
        off_TC: Tensor = summed * (x_TD.abs() @ weight_CD.abs().T) + unit / 2 * value_TC.abs()
        return off_TC

    act = activation_function(mlp.activation)
    at_TC = mlp.deciding(x_TD)
    active_TC, off_TC = act(at_TC), off(at_TC, mlp.selecting_ND)
    ends = [(act(at_TC + sign * off_TC) - active_TC).abs() for sign in (-1, 1)]
    off_TC = torch.maximum(*ends) + unit / 2 * active_TC.abs()
    if mlp.gate_ND is not None:
        up_TC = mlp.up(x_TD)
        off_TC = off_TC * up_TC.abs() + active_TC.abs() * off(up_TC, mlp.up_ND)
    h_TC = mlp.finish(active_TC, x_TD)
    centre = 0.0 if mlp.centre_N is None else mlp.centre_N.abs()
    return h_TC, off_TC + unit * (h_TC.abs() + centre)


def _unit(*dtypes: torch.dtype) -> float:
    """The unit roundoff of the coarsest."""
    return 0.5 * max(float(torch.finfo(dtype).eps) for dtype in dtypes)


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; the former where that is all zeros."""
    got, want = got.double(), want.double()
    return float((got - want).norm()) / (float(want.norm()) or 1.0)


def checked(got_TD: Tensor, want: Exact) -> float:
    """The relative error of an output; raises `Unavailable` where rounding does not explain it."""
    if got_TD.shape != want.y_TD.shape:
        raise Unavailable(
            f"computes something else: an output of shape {tuple(got_TD.shape)}, not "
            f"{tuple(want.y_TD.shape)}"
        )
    error = relative_error(got_TD, want.y_TD)
    times_T = (got_TD.double() - want.y_TD).norm(dim=1) / want.bound_T
    if not bool((times_T <= 1).all()):
        token = int(times_T.nan_to_num(torch.inf).argmax())
        raise Unavailable(
            f"computes something else: relative error {error:.1e}, of token {token} "
            f"{float(times_T[token]):.1f} times what rounding explains"
        )
    return error


MOST = 64
"""Tokens of a pass whose outputs are compared: all, or as many spread over it."""
TIMES = 8.0
"""Times the largest error of a router's own scores, against fp64, that reordered sums may be off by."""


class _Watch(Selection):
    """Stands for the selection and the forward of a layer, and keeps what passes through.

    That is held by attributes, which a graph of `torch.compile` sets when it ends.
    """

    def __init__(self, module: SparseMlp) -> None:
        self.own, self.forward = module.selection, module.forward
        self.x: Any = None
        self.y: Any = None
        self.mask_TE: Any = None
        self.scores_TE: Any = None
        """None where the choice was made before, from a prompt."""

    def remembered(self, context: Context) -> Tensor | None:
        mask_TE = self.own.remembered(context)
        if mask_TE is not None:
            self.mask_TE, self.scores_TE = mask_TE, None
        return mask_TE

    def __call__(self, scores_TE: Tensor, context: Context | None = None) -> Tensor:
        mask_TE = self.own(scores_TE, context)
        self.mask_TE, self.scores_TE = mask_TE, scores_TE
        return mask_TE

    def run(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """The forward of the layer."""
        y = self.forward(hidden)
        self.x, self.y = hidden.clone(), y.clone()
        return y if residual is None else y + residual


@dataclass(frozen=True)
class Seen:
    """One layer in one pass."""

    x_TD: Tensor
    mask_TE: Tensor
    """Of the routed experts."""
    scored: bool
    """Whether it was chosen from scores of these tokens."""
    y_TD: Tensor


class Watched:
    """What every layer of a model saw, chose and put out, pass by pass."""

    def __init__(self, watches: dict[SparseMlp, _Watch]) -> None:
        self.watches = watches
        self.passes: list[list[Seen]] = []

    def next_pass(self) -> None:
        """To be called after every forward pass."""
        self.passes.append([_seen(watch) for watch in self.watches.values()])


def _seen(watch: _Watch) -> Seen:
    x_TD, y_TD = (value.detach().flatten(0, -2) for value in (watch.x, watch.y))
    mask_TE = watch.mask_TE.bool()
    mask_TE = mask_TE.repeat_interleave(len(x_TD) // len(mask_TE), 0)
    return Seen(x_TD, mask_TE.clone(), watch.scores_TE is not None, y_TD)


@contextmanager
def recording(model: PreTrainedModel) -> Iterator[Watched]:
    """Keep what the layers read, choose and put out as they run."""
    watches = {module: _Watch(module) for module in sparse_mlps(model).values()}
    # accelerate has put a forward of its own there, if any.
    own = {module: vars(module).pop("forward", None) for module in watches}
    for module, watch in watches.items():
        module.selection = watch
        vars(module)["forward"] = watch.run
    try:
        yield Watched(watches)
    finally:
        for module, watch in watches.items():
            module.selection = watch.own
            del vars(module)["forward"]
            if own[module] is not None:
                vars(module)["forward"] = own[module]


@torch.no_grad()
def check_layers(model: PreTrainedModel, passes: Sequence[Sequence[Seen]]) -> float:
    """The largest relative error of a layer; raises `Unavailable` for one that is not its function."""
    worst = 0.0
    for index, module in sparse_mlps(model).items():
        try:
            with present(module):
                for one in passes:
                    _check_choice(module, one[index], one[index - module.look_ahead])
                worst = max(worst, _check_output(module, [one[index] for one in passes]))
        except Unavailable as reason:
            raise Unavailable(f"layer {index} {reason}") from None
    return worst


def _check_output(module: SparseMlp, seen: Sequence[Seen]) -> float:
    places = [torch.linspace(0, len(s.x_TD) - 1, min(MOST, len(s.x_TD))).long() for s in seen]
    pairs = list(zip(seen, places, strict=True))
    x_TD, mask_TE, y_TD = (
        torch.cat([getattr(s, name)[at.to(s.x_TD.device)] for s, at in pairs])
        for name in ("x_TD", "mask_TE", "y_TD")
    )
    extra_TD = module.compensation(x_TD, mask_TE)
    shared_TE = mask_TE.new_ones(len(mask_TE), module.shared)
    every_TE = torch.cat([shared_TE, mask_TE], 1)
    return checked(y_TD, exact(module.running, x_TD, every_TE, extra_TD))


def _check_choice(module: SparseMlp, seen: Seen, read: Seen) -> None:
    """`read` has what the router reads."""
    if not seen.scored:
        return
    watch = _Watch(module)
    before = module.context.previous_TD
    module.selection, module.context.previous_TD = watch, read.x_TD
    try:
        module.mask(seen.x_TD)
    finally:
        module.selection, module.context.previous_TD = watch.own, before
    if watch.scores_TE is None:  # chosen by a prompt, which later tokens do not change
        return
    differs_T = (watch.mask_TE.bool() != seen.mask_TE).any(1)
    if not bool(differs_T.any()):
        return
    scores_TE = watch.scores_TE.double()
    own_TE = (scores_TE - _exact_scores(module, read.x_TD)).abs()
    least = torch.finfo(torch.float32).eps * float(scores_TE.abs().max())
    off = TIMES * max(float(own_TE.max()), least)
    towards_TE = seen.mask_TE.double() * 2 - 1
    for share in (1, -1):  # less of what was chosen may be what reaches a sum
        chosen_TE = watch.own(scores_TE + share * off * towards_TE, module.context).bool()
        differs_T &= (chosen_TE != seen.mask_TE).any(1)
    if bool(differs_T.any()):
        raise Unavailable(
            f"chooses experts that its router does not: {int(differs_T.sum())} of {len(differs_T)} tokens"
        )


def _exact_scores(module: SparseMlp, x_TD: Tensor) -> Tensor:
    """Scores `[T, E]` in fp64."""
    router = copy.deepcopy(module.router).double()
    routed, wide_TD = module.routed.to(torch.float64), x_TD.double()
    if module.computes_gate:
        return router.scores(routed.deciding(wide_TD), routed)
    scores_TE: Tensor = router(wide_TD, routed)
    return scores_TE


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
    kl_C = torch.cat([kl_of(w.double(), g.double()) for g, w in zip(got, want, strict=True)])
    kl_C = kl_C.clamp_min(0)  # which rounding alone takes below
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
