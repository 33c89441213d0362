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

from moefy.data.corpus import load_corpus
from moefy.data.inputs import read_batches
from moefy.errors import CorpusError, MoefyError, unknown_choice
from moefy.experts.means import statistics as statistics
from moefy.experts.moefied import ExpertStatistics as ExpertStatistics
from moefy.experts.moefied import of
from moefy.experts.routed import Intervention, alone
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.run.arguments import checked

MODES = ("zero", "mean", "peak", "resample")
OWN_TOKENS, OWN_CONTEXT = 20_000, 512
"""What is read of the bundled corpus where no `means` are given."""

Pairs = Iterable[tuple[int, int]]
Masks = Tensor | Sequence[Tensor]


@checked
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

    Raises `MoefyError` for unknown experts, experts that are asked for in two ways, a `mode` that is
    not possible here, and where another thread runs the model: it may not until this ends.
    """
    if mode not in MODES:
        raise MoefyError(unknown_choice("mode", mode, MODES))
    modules = sparse_mlps(model)
    ablated = _ablated(model, ablate, keep)
    factors = _factors(model, scale or {}, ablated)
    constants = _constants(model, mode, means) if any(n.any() for n in ablated) else {}
    with alone(modules.values()):
        before = {layer: module.intervention for layer, module in modules.items()}
        try:
            for layer, module in modules.items():
                own = [_Edit(ablated[layer], constants[layer])] if ablated[layer].any() else []
                for edit in (*own, *([factors[layer]] if layer in factors else [])):
                    module.intervention = _after(module.intervention, edit)
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

    Raises `MoefyError` for an unknown expert.
    """
    modules = sparse_mlps(model)
    masks = [torch.zeros(module.neurons, dtype=torch.bool) for module in modules.values()]
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


def _masks(model: PreTrainedModel, chosen: Pairs | Masks, what: str) -> list[Tensor]:
    """What was chosen, as one mask `[N]` per layer."""
    if not isinstance(chosen, Tensor):
        chosen = list(chosen)
        if not any(isinstance(entry, Tensor) for entry in chosen):
            chosen = neuron_mask(model, chosen)
    return _fitting(model, chosen, what)


def _fitting(model: PreTrainedModel, masks: Masks, what: str) -> list[Tensor]:
    wanted = [(module.neurons,) for module in sparse_mlps(model).values()]
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


def _ablated(model: PreTrainedModel, ablate: Pairs | Masks, keep: Pairs | Masks) -> list[Tensor]:
    """The neurons `[N]` of every layer that are ablated."""
    ablated = []
    pairs = zip(_masks(model, ablate, "ablate"), _masks(model, keep, "keep"), strict=True)
    for layer, (ablate_N, keep_N) in enumerate(pairs):
        if (ablate_N & keep_N).any():
            raise MoefyError(f"layer {layer}: ablate and keep name the same neurons; leave out one")
        ablated.append(ablate_N | ~keep_N if keep_N.any() else ablate_N)
    return ablated


def _factors(
    model: PreTrainedModel, scale: Mapping[tuple[int, int], float], ablated: list[Tensor]
) -> dict[int, _Edit]:
    """What scales the experts of a layer, by layer."""
    modules = sparse_mlps(model)
    scaled = _masks(model, scale, "scale")
    found = {}
    for layer, scaled_N in enumerate(scaled):
        if (scaled_N & ablated[layer]).any():
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
    if [len(value_N) for value_N in value_LN] != [m.neurons for m in modules.values()]:
        raise MoefyError(
            f"means: of layers with {sorted({len(v) for v in value_LN})} neurons, {len(value_LN)} of "
            "them, which is another model; measure this one: moefy.experts.interventions.statistics"
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
    moefied = of(model)
    modules, known = list(moefied.mlps.values()), moefied.means
    dense = modules[0].all_on
    if dense in known:
        return known[dense]
    ask = "give means=moefy.experts.interventions.statistics(model, batches)"
    if moefied.stored is None:
        raise MoefyError(f"mode='{mode}': this model was not loaded from a folder; {ask}")
    if any(module.hooked for module in modules):
        raise MoefyError(
            f"mode='{mode}': means are measured without hooks, and there are some; {ask}, or enter "
            "model.experts(...) first"
        )
    try:
        batches = read_batches(moefied.stored, moefied.kind, load_corpus(), OWN_CONTEXT, OWN_TOKENS)
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
