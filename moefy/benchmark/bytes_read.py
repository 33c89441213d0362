"""Bytes that a layer or a model has to read and write, and parameters that a token uses, counted from masks.

Bytes are the least there is to move: the weights of every expert that any token of the batch runs, what
routes them, the input and the output. Copies that an engine makes on the way are its own loss.

`mlp_share` measures how much of a dense model's time its MLPs take, and `amdahl` what experts may gain by
it (G. M. Amdahl, Validity of the single processor approach to achieving large scale computing
capabilities, AFIPS 1967): with a share `s` of the time that takes `d` of it afterwards, all is
`1 / (1 - s + s d)` as fast.

Shapes: T tokens, E experts, D width.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.models.locate import sites


def union(mask_TE: Tensor) -> float:
    """Share of the experts that any token runs."""
    return float(mask_TE.bool().any(0).float().mean())


def density(mask_TE: Tensor) -> float:
    """Share of the experts that a token runs, on average."""
    return float(mask_TE.bool().float().mean())


def expert_tensors(module: SparseMlp, share: float, *, routed: bool) -> list[tuple[float, int]]:
    """Numbers and bytes of each, of every tensor that a share of the experts reads.

    With `routed`, gates that the router computes are its own, not theirs.
    """
    mlp = module.weights
    computed = mlp.selecting_ND if routed and module.computes_gate else None
    rows = (mlp.up_ND, mlp.gate_ND, mlp.down_ND, mlp.up_bias_N, mlp.gate_bias_N)
    read = [v for v in rows if v is not None and v is not computed]
    tensors = [(share * value.numel(), value.element_size()) for value in read]
    bias = mlp.down_bias_D
    return tensors if bias is None else [*tensors, (bias.numel(), bias.element_size())]


def dense_parameters(module: SparseMlp) -> float:
    """Parameters of the dense MLP."""
    return sum(count for count, _ in expert_tensors(module, 1, routed=False))


def routing_bytes(module: SparseMlp, mask_TE: Tensor) -> float:
    """Bytes that router and compensation read, once for all tokens.

    A router whose tensors are all read counts with them; one that reads other weights (columns of the
    gate, say) with the figure of its active budget, in the dtype of the layer.
    """
    stored = list(module.router.state_dict().values())
    read = module.router.weights_read(module.weights)
    plain = read == sum(value.numel() for value in stored)
    router = sum(v.nbytes for v in stored) if plain else read * module.dtype.itemsize
    sizes = [value.element_size() for value in module.compensation.state_dict().values()]
    return router + _compensation(module, mask_TE) * max(sizes, default=0)


def layer_bytes(module: SparseMlp, mask_TE: Tensor, *, whole: bool, routed: bool) -> float:
    """Bytes of one layer for a batch.

    `whole` is for engines that compute every neuron; `routed` adds router and compensation.
    """
    tensors = expert_tensors(module, 1 if whole else union(mask_TE), routed=routed)
    ends = 2 * len(mask_TE) * module.width * module.dtype.itemsize
    return _bytes(tensors) + ends + (routing_bytes(module, mask_TE) if routed else 0)


def active_parameters(module: SparseMlp, mask_TE: Tensor, *, routed: bool) -> float:
    """Parameters of one layer that a token uses, on average: those of the active budget."""
    weights = sum(count for count, _ in expert_tensors(module, density(mask_TE), routed=routed))
    if not routed:
        return weights
    return weights + module.router.weights_read(module.weights) + _compensation(module, mask_TE)


def model_bytes(model: PreTrainedModel, tokens: int, masks: Sequence[Tensor] = ()) -> float:
    """Bytes of a model's weights for one pass over `tokens` tokens, with these masks of its SparseMlps.

    Of a table of embeddings only the rows looked up, unless it is the output projection too.
    """
    head: Any = model.get_output_embeddings()
    output = None if head is None else head.weight
    total = float(sum(value.nbytes for value in _others(model)))
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight is not output:
            unread = max(0, module.num_embeddings - tokens)
            total -= unread * module.embedding_dim * module.weight.element_size()
    for layer, mask_TE in zip(sparse_mlps(model).values(), masks, strict=True):
        total += _bytes(expert_tensors(layer, union(mask_TE), routed=True))
        total += routing_bytes(layer, mask_TE)
    return total


def model_parameters(model: PreTrainedModel, masks: Sequence[Tensor] = ()) -> float:
    """Parameters of a model that a token uses, with these masks of its SparseMlps."""
    layers = zip(sparse_mlps(model).values(), masks, strict=True)
    active = sum(active_parameters(layer, mask_TE, routed=True) for layer, mask_TE in layers)
    return sum(value.numel() for value in _others(model)) + active


def _others(model: nn.Module) -> list[Tensor]:
    """All parameters but those of SparseMlps."""
    inside = {id(p) for layer in sparse_mlps(model).values() for p in layer.parameters()}
    return [p for p in model.parameters() if id(p) not in inside]


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values that a cache holds."""
    held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(value.nbytes for value in held if isinstance(value, Tensor))


def _compensation(module: SparseMlp, mask_TE: Tensor) -> float:
    """Weights that the compensation reads for one token."""
    return module.compensation.weights_read(density(mask_TE) * module.experts - module.shared)


def _bytes(tensors: list[tuple[float, int]]) -> float:
    return sum(count * size for count, size in tensors)


def mlp_share(model: PreTrainedModel, steps: Sequence[Callable[[], object]]) -> float | None:
    """Share of the time of `steps`, passes of a dense model on a CPU, that its MLPs take.

    Their median; reading the clock around every MLP is in the time of both. None on a GPU,
    where the host does not wait for what it starts.
    """
    if model.device.type != "cpu":
        return None
    shares = []
    with _clocked(model) as spent:
        for step in steps:
            spent.clear()
            began = time.perf_counter()
            step()
            shares.append(sum(spent) / (time.perf_counter() - began))
    return median(shares)


@contextmanager
def _clocked(model: PreTrainedModel) -> Iterator[list[float]]:
    """Seconds of every pass through an MLP, as they are spent."""
    spent: list[float] = []
    began: dict[nn.Module, float] = {}

    def begin(module: nn.Module, _: Any) -> None:
        began[module] = time.perf_counter()

    def end(module: nn.Module, _: Any, __: Any) -> None:
        spent.append(time.perf_counter() - began.pop(module))

    handles = []
    for site in sites(model):
        # Families without a module for the MLP compute it in parts.
        paths = [site.module, *([site.act, site.path("down")] if site.act else [])]
        for module in map(model.get_submodule, paths):
            handles.append(module.register_forward_pre_hook(begin))
            handles.append(module.register_forward_hook(end))
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def amdahl(share: float, left: float) -> float:
    """How many times faster all is where a share of the time takes `left` of what it took."""
    return 1 / (1 - share + share * left)
