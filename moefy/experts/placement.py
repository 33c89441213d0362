"""Where and in which dtype this machine runs a checkpoint best; weights that stay on disk until they are needed.

`from_pretrained(device_map=...)` may leave layers on disk; accelerate then gives every stock module its
weights as it runs and takes them away again. A SparseMlp gets them in the same way, from the same
files, in its own layout. Streaming takes a layer's weights from here too, and keeps them for longer.

Shapes: N neurons.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.experts.sparse_mlp import SparseMlp
from moefy.models.checkpoint import Checkpoint
from moefy.models.locate import Site, disk_names, read_mlp
from moefy.models.quantised import QuantisedMlp
from moefy.run.computing import now
from moefy.run.memory import free_memory


def placement(checkpoint: Checkpoint | None = None) -> dict[str, Any]:
    """How this machine runs models best, as arguments of `load` and `load_dense`.

    As the caller asks (`moefy.run.computing`), else all GPUs if there are any, or in many processes each its own.
    On a CPU without arithmetic in 16 bits, which it would emulate fifty times slower, fp32. The layers of a
    `checkpoint` that memory cannot hold stay on disk until they run.
    """
    asked = now()
    found: dict[str, Any] = {}
    if asked.on_gpu:
        ranks = PartialState()
        own = asked.device or (ranks.device if ranks.num_processes > 1 else None)
        found["device_map"] = "auto" if own is None else {"": own}
    elif not _has_bf16():
        found["dtype"] = torch.float32
    if asked.dtype is not None:
        found["dtype"] = asked.dtype
    if not asked.on_gpu and checkpoint is not None and memory_of(checkpoint) > free_memory():
        found["device_map"] = {"": "disk"}
    return found


def memory_of(checkpoint: Checkpoint) -> int:
    """Bytes that the weights take where `placement` runs them on a CPU."""
    return (
        checkpoint.bytes * running_dtype(checkpoint).itemsize // stored_dtype(checkpoint).itemsize
    )


def running_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that `placement` runs a checkpoint in."""
    given: torch.dtype | None = placement().get("dtype")
    return given or stored_dtype(checkpoint)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most of a checkpoint's weights are stored in."""
    sizes: Counter[str] = Counter()
    first: dict[str, str] = {}
    for name, tensor in checkpoint.tensors.items():
        sizes[tensor.dtype] += tensor.end - tensor.begin
        first.setdefault(tensor.dtype, name)
    return checkpoint.dtype_of(first[sizes.most_common(1)[0][0]])


def _has_bf16() -> bool:
    flags = Path("/proc/cpuinfo")
    text = flags.read_text() if flags.exists() else ""
    return "avx512_bf16" in text or "amx_bf16" in text or " bf16" in text


class StoredMlp:
    """The parameters of one SparseMlp, by their names in it, read from a checkpoint when asked for."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: dict[str, str],
        site: Site,
        neurons: Tensor | None,
        stored: QuantisedMlp | None = None,
    ) -> None:
        """`names` says which stored tensor holds each parameter of the model; `neurons` `[N]` is the
        order they are put into, None leaves them as they are stored; `stored` has the matrices where
        those are rounded."""
        self.checkpoint, self.names, self.site, self.neurons = checkpoint, names, site, neurons
        self.stored = stored
        self.ahead: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        # All are asked for in turn: fused projections are read once for both halves.
        if name not in self.ahead:
            mlp = read_mlp(self.site, lambda parameter: self.checkpoint.read(self.names[parameter]))
            mlp = mlp if self.neurons is None else mlp.take(self.neurons)
            mlp = mlp if self.stored is None else mlp.to(torch.float32).holding(self.stored)
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
    module.away = True
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
