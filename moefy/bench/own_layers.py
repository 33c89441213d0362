"""Layers of a moefied model with the inputs that they have within it.

Shapes: T tokens, D width.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.bench.layers import COPIES, Layers
from moefy.bench.prompts import Prompt
from moefy.errors import MoefyError
from moefy.offload import device_of
from moefy.sparse_mlp import sparse_mlps

LENGTH = 64
"""Tokens of the sequences that inputs are taken from."""


@torch.no_grad()
def own_layers(
    model: PreTrainedModel, what: str, prompt: Prompt, *, tokens: int, seed: int = 0
) -> Layers:
    """Up to `COPIES` MLPs, spread over the depth of the model, and `tokens` inputs of each.

    The tokens are drawn from everywhere in the prompt. Raises `MoefyError` where weights are offloaded
    and for models that take more than ids.
    """
    if model.config.is_encoder_decoder:
        raise MoefyError(
            f"{what}: a {type(model).__name__} takes more than token ids; use --layer D,N,E,k"
        )
    modules = list(sparse_mlps(model).values())
    if any(module.weights.up_ND.is_meta for module in modules):
        raise MoefyError(
            f"{what}: its layers are offloaded, so that reading them from disk would be what is timed; "
            "use --level model"
        )
    count = min(COPIES, len(modules))
    chosen = [modules[i * len(modules) // count] for i in range(count)]
    seen: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[[Tensor, Tensor], None]:
        return lambda x_TD, _: seen.update({index: x_TD.clone()})

    for index, module in enumerate(chosen):
        module.observer = keep(index)
    try:
        model(input_ids=prompt.ids_BT.to(device_of(model)))
    finally:
        for module in chosen:
            module.observer = None
    drawn_T = torch.randperm(len(seen[0]), generator=torch.Generator().manual_seed(seed))[:tokens]
    inputs = [seen[index][drawn_T.to(seen[index].device)] for index in range(count)]
    first = chosen[0]
    text = (
        f"layers of {what}: D {first.weights.width}, N {first.weights.neurons}, {first.experts} experts, "
        f"{type(first.router).__name__}; inputs from {prompt.what}"
    )
    for module in chosen:
        module.requires_grad_(False)
    return Layers(text, chosen, inputs, synthetic=False)
