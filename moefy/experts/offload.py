"""Weights that stay on disk until the moment they are needed.

`from_pretrained(device_map=...)` may leave layers on disk; accelerate then gives every stock module its
weights as it runs and takes them away again. A SparseMlp gets them in the same way, from the same
files, in its own layout. Streaming takes a layer's weights from here too, and keeps them for longer.

Shapes: N neurons.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.experts.sparse_mlp import SparseMlp
from moefy.models.checkpoint import Checkpoint
from moefy.models.locate import Site, disk_names, read_mlp


class StoredMlp:
    """The parameters of one SparseMlp, by their names in it, read from a checkpoint when asked for."""

    def __init__(
        self, checkpoint: Checkpoint, names: dict[str, str], site: Site, neurons: Tensor | None
    ) -> None:
        """`names` says which stored tensor holds each parameter of the model; `neurons` `[N]` is the
        order they are put into, None leaves them as they are stored."""
        self.checkpoint, self.names, self.site, self.neurons = checkpoint, names, site, neurons
        self.ahead: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        # All are asked for in turn: fused projections are read once for both halves.
        if name not in self.ahead:
            mlp = read_mlp(self.site, lambda parameter: self.checkpoint.read(self.names[parameter]))
            mlp = mlp if self.neurons is None else mlp.take(self.neurons)
            self.ahead = {n: v for n, v in vars(mlp).items() if isinstance(v, Tensor)}
        return self.ahead.pop(name).contiguous()


def stored_names(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Which stored tensor holds each parameter of `model`."""
    return {name: disk for disk, name in disk_names(model, checkpoint.tensors).items()}


def offloaded(module: nn.Module) -> torch.device | None:
    """The device that a module runs on whose weights accelerate keeps elsewhere; None if it has them."""
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        if getattr(one, "offload", False):
            return torch.device(one.execution_device)
    return None


def device_of(model: PreTrainedModel) -> torch.device:
    """The device that takes a model's inputs, wherever its weights are kept."""
    if model.device.type != "meta":
        return model.device
    found = (offloaded(module) for module in model.modules())
    return next((device for device in found if device is not None), torch.device("cpu"))


def offload(module: SparseMlp, weights: StoredMlp, device: torch.device) -> None:
    """Give `module` its weights, on `device`, while it runs."""
    hook = AlignDevicesHook(execution_device=device, offload=True, weights_map=weights)
    add_hook_to_module(module, hook)


@contextmanager
def present(module: SparseMlp) -> Iterator[None]:
    """Its weights are there, wherever accelerate keeps them."""
    if offloaded(module) is None:
        yield
        return
    hook: Any = module._hf_hook
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, None)
