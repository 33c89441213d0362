"""How much each direction of an MLP's output matters to the model: one Fisher matrix per layer.

For a small error `e` of one layer's output, KL(dense || disturbed) is about `e^T G e / 2`, with
`G = E[g g^T]` and `g` the gradient, at that output, of the log-probability of tokens drawn from the
model's own prediction (Amari 1998). One backward pass gives the matrices of all layers. Where there
are no logits, `g` is the gradient of a random projection of the last hidden states, over their size.

Where a backward pass does not fit, one number per layer has to do: the inverse of the residual
stream's squared norm, `|e|^2 / |h|^2`. Normalisation makes later layers see an error in proportion to
the stream that it is added to.

Shapes: T tokens, D width, V vocabulary.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.conversion.distil import only_training
from moefy.data.corpus import Batch
from moefy.evaluation.outputs import Outputs, run_outputs
from moefy.experts.passes import walk
from moefy.experts.sparse_mlp import all_experts, sparse_mlps
from moefy.models.locate import Site, side_of
from moefy.run.memory import give_back


def sensitivities(
    model: PreTrainedModel, found: list[Site], batches: list[Batch], *, seed: int = 0
) -> tuple[list[Tensor], list[Outputs]]:
    """`G / 2` of every MLP `[D, D]` in fp32, of the model with every expert on; and what that puts
    out for each batch."""
    modules = list(sparse_mlps(model).values())
    sums = [torch.zeros(site.width, site.width) for site in found]
    tokens = [0] * len(found)
    generator = torch.Generator().manual_seed(seed)
    outputs: dict[int, Tensor] = {}
    dense: list[Outputs] = []

    def keep(index: int, _: nn.Module, __: object, output: Tensor) -> Tensor:
        # The first layer's output depends on nothing that is trained.
        output = output if output.requires_grad else output.detach().requires_grad_(True)
        output.retain_grad()
        outputs[index] = output
        return output

    handles = [m.register_forward_hook(partial(keep, i)) for i, m in enumerate(modules)]
    try:
        for batch in batches:
            with torch.enable_grad(), all_experts(model), only_training(model, []):
                got = run_outputs(model, batch)
                got.rows_JD.backward(_gradient(got, generator))
            dense.append(got.detach())
            del got
            for index, site in enumerate(found):
                gradient = outputs[index].grad
                assert gradient is not None
                g_TD = _unpadded(gradient, batch.mask(side_of(site)))
                sums[index] += (g_TD.T @ g_TD).float().cpu()
                tokens[index] += len(g_TD)
            outputs.clear()
            give_back()  # batches grow, and what was freed of a smaller one would not serve the next
    finally:
        for handle in handles:
            handle.remove()
    return [total / (2 * count) for total, count in zip(sums, tokens, strict=True)], dense


@torch.no_grad()
def stream_metric(model: PreTrainedModel, found: list[Site], batches: list[Batch]) -> list[Tensor]:
    """The inverse of the residual stream's squared norm behind every layer, with every expert on."""
    powers: list[list[Tensor]] = [[] for _ in found]
    current: list[Batch] = []

    def behind(site: Site, _: nn.Module, __: object, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        powers[site.index].append(squared_norms(hidden, current[0].mask(side_of(site))))

    layers = [(model.get_submodule(site.layer), site) for site in found]
    handles = [layer.register_forward_hook(partial(behind, site)) for layer, site in layers]
    try:
        with all_experts(model):
            for batch in batches:
                current[:] = [batch]
                walk(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [inverse_power(torch.cat(rows)) for rows in powers]


def squared_norms(hidden: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Squared norm of every real token's hidden state `[T]`."""
    return _unpadded(hidden.detach().float(), mask_BT).square().sum(1).cpu()


def _unpadded(values_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """The rows `[T, D]` of real tokens."""
    rows_TD = values_BTD.reshape(-1, values_BTD.shape[-1])
    return rows_TD if mask_BT is None else rows_TD[mask_BT.flatten().to(rows_TD.device)]


def inverse_power(power_T: Tensor) -> Tensor:
    """One over the median: a few attention sinks would make the mean."""
    return 1 / power_T.median().clamp_min(1e-30)


def _gradient(outputs: Outputs, generator: torch.Generator) -> Tensor:
    """The gradient of `_objective` at the rows of `outputs` `[J, D]`, a chunk of logits at a time."""
    found = []
    for at in outputs.chunks():
        rows_CD = outputs.rows_JD[at].detach().requires_grad_()
        value = _objective(outputs.logits(rows_CD), outputs.classes, generator)
        found.append(torch.autograd.grad(value, rows_CD)[0])
    return torch.cat(found)


def _objective(output_CV: Tensor, classes: bool, generator: torch.Generator) -> Tensor:
    """A scalar, summed over tokens, whose gradient's covariance is the Fisher matrix."""
    if not classes:
        size_C1 = output_CV.detach().norm(dim=-1, keepdim=True).clamp_min(1e-6)
        drawn = torch.randn(output_CV.shape, generator=generator).to(output_CV.device)
        projected: Tensor = 2**0.5 * drawn * output_CV / size_C1
        return projected.sum()
    log_p = output_CV.log_softmax(-1)
    drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=generator)
    return log_p.gather(1, drawn.to(log_p.device)).sum()
