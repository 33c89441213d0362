"""What experts of a moefied model contribute, by forming every output `[T, E, D]` in fp64.

Documents are run one by one, so that nothing depends on batches or padding.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from moefy.experts.sparse_mlp import sparse_mlps
from moefy.inspection.inspect import listened
from moefy.inspection.part import Pass


@dataclass
class Naive:
    """One layer and all tokens of a reading, in the order of its documents."""

    x_TD: torch.Tensor
    h_TN: torch.Tensor
    y_TED: torch.Tensor
    ran_TE: torch.Tensor
    """Shared experts included."""
    error_TD: torch.Tensor
    """Dense minus what the module gave, the constant of biases taken off."""
    document_T: torch.Tensor
    position_T: torch.Tensor

    @cached_property
    def norm_TE(self):
        return self.y_TED.norm(dim=2)

    @cached_property
    def share_TE(self):
        y_TD = self.y_TED.sum(1)
        return (self.y_TED * y_TD[:, None]).sum(2) / (y_TD * y_TD).sum(1, keepdim=True)


@torch.no_grad()
def naive(model, reading):
    """Every layer of the model, by layer."""
    modules = sparse_mlps(model)
    parts = {layer: [] for layer in modules}
    document = 0
    for batch in reading.batches:
        for sample in batch.samples:
            heard = {}
            handles = [
                module.register_forward_hook(_keeping(heard, layer))
                for layer, module in modules.items()
            ]
            model(input_ids=sample.inputs["input_ids"][None])
            for handle in handles:
                handle.remove()
            for layer, module in modules.items():
                x_TD, out_TD = (value.reshape(-1, value.shape[-1]) for value in heard[layer])
                parts[layer].append(_of(module, x_TD, out_TD, document))
            document += 1
    return {
        layer: Naive(*(torch.cat([getattr(p, f) for p in found]) for f in Naive.__annotations__))
        for layer, found in parts.items()
    }


def _keeping(heard, layer):
    def hook(_, args, out):
        heard[layer] = (args[0], out)

    return hook


def _of(module, x_TD, out_TD, document):
    mlp = module.weights.to(torch.float64)
    h_TN = mlp.hidden(x_TD.double())
    experts = module.experts
    down_EFD = mlp.down_ND.view(experts, -1, mlp.width)
    y_TED = torch.einsum("tef,efd->ted", h_TN.view(len(h_TN), experts, -1), down_EFD)
    bias = 0 if mlp.down_bias_D is None else mlp.down_bias_D
    return Naive(
        x_TD,
        h_TN,
        y_TED,
        module.mask(x_TD).bool(),
        y_TED.sum(1) + bias - out_TD.double(),
        torch.full((len(x_TD),), document),
        torch.arange(len(x_TD)),
    )


def heard_by(model, reading, *makers, seed=0):
    """Parts after one pass; the last, or all where there are several."""
    parts = listened(Pass(model, reading, seed), makers)
    return parts[0] if len(parts) == 1 else parts


def column(given, name, *shape):
    """A column as a tensor in fp64, None as NaN."""
    values = [float("nan") if v is None else v for v in given[name]]
    return torch.tensor(values, dtype=torch.float64).view(*shape) if shape else torch.tensor(values)
