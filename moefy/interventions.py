"""Remove, keep or scale experts, or any neurons, while a model runs, and give them back afterwards.

    with model.experts(ablate=[(5, 12)], mode="mean"):
        logits = model(input_ids).logits

One operation on neurons is behind all of it: `h_j -> c_j` for the neurons of a set, which is
`y' = y + sum_j m_j (c_j - h_j) d_j`. What a moefied model adds for a neuron is `r_e h_j`, zero where
expert e is off, and that is what is replaced: router, mask and compensation stay as they were. An
expert that is off therefore adds `sum_j c_j d_j` while it is ablated. With `all_experts(model)` every
r_e is 1: the dense model. Where a compensation centres neurons, they are counted from their centres.

Modes say what c_j is: `zero`; `mean`, the mean of `r_e h_j` over tokens; `peak`, the mode of its
distribution (Pochinkov et al. 2024, 2408.17322); `resample`, what the next document of the batch adds
at the same position.

Shapes: T tokens, of b sequences at p positions each, N neurons of a layer in expert order, L layers.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.activations import run
from moefy.checkpoint import Checkpoint
from moefy.data import Batch, load_corpus
from moefy.errors import CorpusError, MoefyError, unknown_choice
from moefy.hook_points import Intervention
from moefy.inputs import read_batches
from moefy.sparse_mlp import SparseMlp, sparse_mlps

MODES = ("zero", "mean", "peak", "resample")
OWN_TOKENS, OWN_CONTEXT = 20_000, 512
"""What is read of the bundled corpus where no `means` are given."""
BINS = 256
_LEAST = 8
"""Values other than zero that the bins of a neuron are laid out by."""
_LAID_OUT = 1024
"""Most tokens that are."""
_ENTRIES = 2**20
"""Most values that are sorted into bins at a time."""

Pairs = Iterable[tuple[int, int]]
Masks = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class ExpertStatistics:
    """What the neurons of every layer add on some text, in expert order: `r_e h_j`."""

    mean_LN: list[Tensor]
    """Mean over tokens, one `[N]` per layer, in fp32."""
    peak_LN: list[Tensor]
    """Most frequent value: exactly zero, or the middle of the fullest bin. Bins are 2 IQR / cbrt(n)
    wide (Freedman and Diaconis 1981) for the n values that are not zero of the first 1024 tokens."""
    tokens_L: list[int]
    """Tokens that every layer saw, padding left out."""
    dense: bool
    """Whether every expert was on (`all_experts`)."""


@contextmanager
def experts(
    model: PreTrainedModel,
    *,
    ablate: Pairs | Masks = (),
    keep: Pairs | Masks = (),
    scale: Mapping[tuple[int, int], float] | None = None,
    mode: str = "mean",
    means: ExpertStatistics | None = None,
) -> Iterator[None]:
    """While this lasts, ablate experts, keep some alone, or scale what they add.

    An expert is `(layer, number)`: layers count over all MLPs, encoder before decoder; numbers count
    the shared experts first. `keep` ablates all others of the layers it names and leaves the other
    layers alone. In place of pairs both take neurons: bool `[L, N]`, or a list of `[N]` where layers
    differ; a layer without a True is not named. Contexts nest: the inner one changes what the outer
    one leaves. Layers that are changed compute every neuron.

    `mode` is one of `MODES`. `means` is what `statistics` measured, for `mean` and `peak`; without it
    the bundled corpus is measured once and remembered. `resample` needs batches of two documents
    or more (sequences that beam search makes of one document count as several).

    Raises `MoefyError` for experts that are not there, that are asked for in two ways, and where
    `mode` cannot be had.
    """
    if mode not in MODES:
        raise MoefyError(unknown_choice("mode", mode, MODES))
    modules = sparse_mlps(model)
    gone = _gone(model, ablate, keep)
    factors = _factors(model, scale or {}, gone)
    constants = _constants(model, mode, means) if any(n.any() for n in gone) else {}
    before = {layer: module.intervention for layer, module in modules.items()}
    try:
        for layer, module in modules.items():
            if gone[layer].any():
                module.intervention = _after(
                    module.intervention, _Edit(gone[layer], constants[layer])
                )
            if layer in factors:
                module.intervention = _after(module.intervention, factors[layer])
        yield
    finally:
        for layer, module in modules.items():
            module.intervention = before[layer]


@dataclass(frozen=True)
class _Edit:
    """`h_j -> c_j` for the neurons of a set."""

    chosen_N: Tensor
    value: Intervention
    """c_j of every neuron, `[T, N]` or `[N]`, from what the neurons add and the places that hold tokens."""

    def __call__(self, run_TN: Tensor, places_BP: Tensor) -> Tensor:
        value = self.value(run_TN, places_BP).to(run_TN)
        return torch.where(self.chosen_N.to(run_TN.device), value, run_TN)


def _after(first: Intervention | None, second: Intervention) -> Intervention:
    if first is None:
        return second
    return lambda run_TN, places_BP: second(first(run_TN, places_BP), places_BP)


def neuron_mask(model: PreTrainedModel, pairs: Pairs) -> Tensor | list[Tensor]:
    """The neurons of these experts: bool `[L, N]`, or a list of `[N]` where layers differ in N.

    Raises `MoefyError` for an expert that is not there.
    """
    modules = sparse_mlps(model)
    masks = [torch.zeros(_neurons(module), dtype=torch.bool) for module in modules.values()]
    for layer, expert in pairs:
        if layer not in modules:
            raise MoefyError(
                f"expert ({layer}, {expert}): the model has layers 0 to {len(modules) - 1}"
            )
        count = modules[layer].experts
        if not 0 <= expert < count:
            raise MoefyError(
                f"expert ({layer}, {expert}): layer {layer} has experts 0 to {count - 1}"
            )
        masks[layer].view(count, -1)[expert] = True
    return torch.stack(masks) if len({len(mask) for mask in masks}) == 1 else masks


def expert_pairs(model: PreTrainedModel, mask: Masks) -> list[tuple[int, int]]:
    """The experts `(layer, number)` that a mask of neurons covers.

    Raises `MoefyError` where it covers a part of an expert, or has another shape than the model.
    """
    found = []
    for (layer, module), mask_N in zip(
        sparse_mlps(model).items(), _fitting(model, mask, "mask"), strict=True
    ):
        mask_EF = mask_N.view(module.experts, -1)
        whole_E, some_E = mask_EF.all(1), mask_EF.any(1)
        partly = (some_E & ~whole_E).nonzero().flatten().tolist()
        if partly:
            raise MoefyError(
                f"layer {layer}: the mask holds {int(mask_EF[partly[0]].sum())} of the "
                f"{mask_EF.shape[1]} neurons of expert {partly[0]}; give the mask itself to "
                "experts(...), or whole experts"
            )
        found += [(layer, expert) for expert in whole_E.nonzero().flatten().tolist()]
    return found


def _neurons(module: SparseMlp) -> int:
    return module.up_ND.shape[0]


def _masks(model: PreTrainedModel, chosen: Pairs | Masks, what: str) -> list[Tensor]:
    """What was chosen, as one mask `[N]` per layer."""
    if not isinstance(chosen, Tensor):
        chosen = list(chosen)  # type: ignore[assignment]
        if not any(isinstance(entry, Tensor) for entry in chosen):
            chosen = neuron_mask(model, chosen)  # type: ignore[arg-type]
    return _fitting(model, chosen, what)  # type: ignore[arg-type]


def _fitting(model: PreTrainedModel, masks: Masks, what: str) -> list[Tensor]:
    wanted = [(_neurons(module),) for module in sparse_mlps(model).values()]
    found = list(masks)
    got = [tuple(mask.shape) for mask in found]
    if got != wanted or any(mask.dtype != torch.bool for mask in found):
        kinds = ", ".join(sorted({str(mask.dtype) for mask in found}))
        raise MoefyError(
            f"{what}: masks of {len(found)} layers, shapes {sorted(set(got))}, {kinds}; the model takes "
            f"{len(wanted)} bool masks of {sorted(set(wanted))}, neurons in expert order, or pairs "
            "(layer, expert)"
        )
    return [mask.cpu() for mask in found]


def _gone(model: PreTrainedModel, ablate: Pairs | Masks, keep: Pairs | Masks) -> list[Tensor]:
    """The neurons `[N]` of every layer that are ablated."""
    gone = []
    pairs = zip(_masks(model, ablate, "ablate"), _masks(model, keep, "keep"), strict=True)
    for layer, (ablate_N, keep_N) in enumerate(pairs):
        if (ablate_N & keep_N).any():
            raise MoefyError(f"layer {layer}: ablate and keep name the same neurons; leave out one")
        gone.append(ablate_N | ~keep_N if keep_N.any() else ablate_N)
    return gone


def _factors(
    model: PreTrainedModel, scale: Mapping[tuple[int, int], float], gone: list[Tensor]
) -> dict[int, _Edit]:
    """What scales the experts of a layer, by layer."""
    modules = sparse_mlps(model)
    scaled = _masks(model, scale, "scale")
    found = {}
    for layer, scaled_N in enumerate(scaled):
        if (scaled_N & gone[layer]).any():
            raise MoefyError(f"layer {layer}: an expert is both scaled and ablated; leave out one")
        if not scaled_N.any():
            continue
        factor_N = torch.ones(len(scaled_N), dtype=torch.float64)
        for (where, expert), factor in scale.items():
            if where == layer:
                factor_N.view(modules[layer].experts, -1)[expert] = factor
        found[layer] = _Edit(scaled_N, _times(factor_N))
    return found


def _times(factor_N: Tensor) -> Intervention:
    return lambda run_TN, _: run_TN * factor_N.to(run_TN)


def _constants(
    model: PreTrainedModel, mode: str, means: ExpertStatistics | None
) -> dict[int, Intervention]:
    """What gives c_j, by layer."""
    modules = sparse_mlps(model)
    if mode == "zero":
        return dict.fromkeys(modules, _zero)
    if mode == "resample":
        return dict.fromkeys(modules, _of_another)
    means = means or _measured(model, mode)
    value_LN = means.mean_LN if mode == "mean" else means.peak_LN
    if [len(value_N) for value_N in value_LN] != [_neurons(m) for m in modules.values()]:
        raise MoefyError(
            f"means: of layers with {sorted({len(v) for v in value_LN})} neurons, {len(value_LN)} of "
            "them, which is another model; measure this one: moefy.interventions.statistics"
        )
    return {layer: _fixed(modules[layer], value_LN[layer], means.dense) for layer in modules}


def _fixed(module: SparseMlp, value_N: Tensor, dense: bool) -> Intervention:
    def value(run_TN: Tensor, _: Tensor) -> Tensor:
        if module.all_on != dense:
            names = ("the moefied model", "all_experts")
            raise MoefyError(
                f"means measured with {names[dense]} were given to {names[module.all_on]}; enter "
                "all_experts(model) before model.experts(...), and measure means where they are used"
            )
        return value_N

    return value


def _zero(run_TN: Tensor, _: Tensor) -> Tensor:
    return run_TN.new_zeros(())


def _of_another(run_TN: Tensor, places_BP: Tensor) -> Tensor:
    """What the next sequence of the batch that holds a token at the position adds there `[T, N]`."""
    batch, positions = places_BP.shape
    if batch == 1:
        raise MoefyError(
            "mode='resample' takes activations of another document of the batch, and this batch "
            "holds one; batch two documents or more, or use mode='mean'"
        )
    device = places_BP.device
    row_B1 = torch.arange(batch, device=device)[:, None]
    other_BK = (row_B1 + torch.arange(1, batch, device=device)) % batch
    holds_BKP = places_BP[other_BK]
    alone_BP = places_BP & ~holds_BKP.any(1)
    if alone_BP.any():
        row, position = alone_BP.nonzero()[0].tolist()
        raise MoefyError(
            f"mode='resample': document {row} of the batch is the only one with a token at position "
            f"{position}; batch documents of one length, or cut them to the second longest"
        )
    from_BP = other_BK.gather(1, holds_BKP.int().argmax(1))
    run_BPN = run_TN.view(batch, positions, -1)
    return run_BPN[from_BP, torch.arange(positions, device=device)].view(run_TN.shape)


def _measured(model: PreTrainedModel, mode: str) -> ExpertStatistics:
    """Statistics of the model on the bundled corpus, measured when first asked for."""
    modules = list(sparse_mlps(model).values())
    dense = modules[0].all_on
    known: dict[bool, ExpertStatistics] = vars(model).setdefault("moefy_statistics", {})
    if dense in known:
        return known[dense]
    ask = "give means=moefy.interventions.statistics(model, batches)"
    checkpoint: Checkpoint | None = getattr(model, "moefy_checkpoint", None)  # type: ignore[assignment]
    if checkpoint is None:
        raise MoefyError(f"mode='{mode}': this model was not loaded from a folder; {ask}")
    if any(module.hooked for module in modules):
        raise MoefyError(
            f"mode='{mode}': means are measured without hooks, and there are some; {ask}, or enter "
            "model.experts(...) first"
        )
    kind = model.moefy_sites[0].family.kind  # type: ignore[index, union-attr]
    try:
        batches = read_batches(checkpoint, kind, load_corpus(), OWN_CONTEXT, OWN_TOKENS)
    except CorpusError as error:
        raise MoefyError(
            f"mode='{mode}': the bundled corpus cannot be read: {error}; {ask}"
        ) from None
    known[dense] = statistics(model, batches)
    warnings.warn(
        f"mode='{mode}': means of {known[dense].tokens_L[-1]} tokens of the bundled corpus, measured "
        f"once and remembered; for text of your own {ask}",
        stacklevel=2,
    )
    return known[dense]


@torch.no_grad()
def statistics(
    model: PreTrainedModel, batches: Iterable[Batch | Mapping[str, Tensor]]
) -> ExpertStatistics:
    """Mean and most frequent value of what every neuron adds, in one pass over batches.

    A batch is one of `moefy.data.make_batches`, or what the model is called with; padding, by its
    attention mask, is left out. The model runs as it is: inside `all_experts` these are the numbers of
    the dense model; interventions in force are set aside. Memory does not grow with the text: `BINS`
    counts for each neuron.

    Raises `MoefyError` where there is no batch.
    """
    modules = sparse_mlps(model)
    read = [b if isinstance(b, Batch) else Batch([], dict(b), None) for b in batches]
    if not read:
        raise MoefyError("statistics: no batch; give some, for example of moefy.data.make_batches")
    tallies = {layer: _Tally() for layer in modules}
    before = {layer: module.intervention for layer, module in modules.items()}
    try:
        for layer, module in modules.items():
            module.intervention = tallies[layer]
        # The largest first: it says where the bins are.
        for batch in sorted(read, key=lambda b: -next(iter(b.inputs.values())).numel()):
            run(model, batch)
    finally:
        for layer, module in modules.items():
            module.intervention = before[layer]
    return ExpertStatistics(
        mean_LN=[tally.mean_N() for tally in tallies.values()],
        peak_LN=[tally.peak_N() for tally in tallies.values()],
        tokens_L=[tally.tokens for tally in tallies.values()],
        dense=modules[0].all_on,
    )


class _Tally:
    """Sums and a histogram of every neuron of a layer, kept as an intervention that changes nothing.

    Zeros are counted by themselves: a neuron that is off, or a ReLU at rest, stands there exactly.
    """

    def __init__(self) -> None:
        self.tokens = 0

    def __call__(self, run_TN: Tensor, places_BP: Tensor) -> Tensor:
        value_TN = run_TN[places_BP.flatten()]
        if not self.tokens:
            neurons, device = run_TN.shape[1], run_TN.device
            self.sum_N = torch.zeros(neurons, dtype=torch.float64, device=device)
            self.low_N = torch.full((neurons,), torch.nan, device=device)
            self.width_N = torch.full((neurons,), torch.nan, device=device)
            # One bin more for what lies in none.
            self.count_NB = torch.zeros(neurons, BINS + 1, dtype=torch.int32, device=device)
            self.zeros_N = torch.zeros(neurons, dtype=torch.int64, device=device)
        self.tokens += len(value_TN)
        self.sum_N += value_TN.sum(0, dtype=torch.float64)
        for piece_TN in value_TN.split(max(_LEAST, _ENTRIES // value_TN.shape[1])):
            self._sort(piece_TN.float())
        return run_TN

    def _sort(self, value_TN: Tensor) -> None:
        zero_TN = value_TN == 0
        self.zeros_N += zero_TN.sum(0)
        self._lay_out(value_TN[:_LAID_OUT])
        bin_TN = ((value_TN - self.low_N) / self.width_N).floor()
        outside_TN = zero_TN | ~((bin_TN >= 0) & (bin_TN < BINS))  # NaN where there are no bins
        flat_TN = bin_TN.masked_fill(outside_TN, BINS).long()
        flat_TN += torch.arange(flat_TN.shape[1], device=flat_TN.device) * (BINS + 1)
        count = torch.bincount(flat_TN.flatten(), minlength=self.count_NB.numel())
        self.count_NB += count.view(self.count_NB.shape)

    def _lay_out(self, value_TN: Tensor) -> None:
        """Bins about the median of the values that are not zero, where there are none yet."""
        new_N = self.low_N.isnan() & ((value_TN != 0).sum(0) >= _LEAST)
        if not new_N.any():
            return
        value_NT = value_TN[:, new_N].T.contiguous()
        sorted_NT = value_NT.masked_fill_(value_NT == 0, torch.nan).sort(1).values  # zeros last
        count_N = (~sorted_NT.isnan()).sum(1)
        low_N, median_N, high_N = (
            sorted_NT.gather(1, ((count_N - 1) * share).long()[:, None])[:, 0]
            for share in (0.25, 0.5, 0.75)
        )
        width_N = 2 * (high_N - low_N) / count_N ** (1 / 3)
        width_N = torch.where(width_N > 0, width_N, median_N.abs() * 1e-4)
        self.width_N[new_N] = width_N
        self.low_N[new_N] = median_N - width_N * (BINS // 2 + 0.5)

    def mean_N(self) -> Tensor:
        """The mean `[N]`, on the CPU."""
        return (self.sum_N / self.tokens).float().cpu()

    def peak_N(self) -> Tensor:
        """The most frequent value `[N]`, on the CPU."""
        most_N, bin_N = self.count_NB[:, :BINS].max(1)
        middle_N = self.low_N + (bin_N + 0.5) * self.width_N
        return torch.where(self.zeros_N >= most_N, 0.0, middle_N).cpu()
