"""Seconds, not FLOPs: dense and moefied side by side in one run, medians of alternating samples.

`bench_model` times prefill and cached decode of a whole model, `bench_layer` one MLP of any shape
with random weights. The baseline is the stock dense computation in the same dtype, with the key
and value cache on; for a layer also the same under torch.compile where a compiler is at hand.

Shapes: T tokens, D width, N neurons, E experts, K experts that run.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers import DynamicCache, PreTrainedModel

from moefy.console import Reporter
from moefy.errors import MoefyError
from moefy.mlp import DenseMlp
from moefy.offload import device_of
from moefy.provenance import machine
from moefy.routing import COMPENSATIONS, ROUTERS, SELECTIONS, Router
from moefy.sparse_mlp import SparseMlp, sparse_mlps


def side_by_side(
    runs: Mapping[str, Callable[[], object]], samples: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds of every sample of every run; the runs take turns, so that drift hits all alike."""
    for call in runs.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(samples):
        for name, call in runs.items():
            _synchronize()
            began = time.perf_counter()
            call()
            _synchronize()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.no_grad()
def bench_model(
    dense: PreTrainedModel,
    sparse: PreTrainedModel,
    *,
    prompt: int = 128,
    generated: int = 32,
    samples: int = 5,
    report: Reporter | None = None,
) -> dict[str, Any]:
    """Tokens/s of prefill (`prompt` tokens, batch 1) and of cached decode (`generated` tokens).

    The prompt is random token ids from a fixed seed. Raises `MoefyError` for models that do not
    generate.
    """
    if not sparse.can_generate() or sparse.config.is_encoder_decoder:
        raise MoefyError(f"{type(sparse).__name__}: no cached decoding to time; bench --layer does")
    generator = torch.Generator().manual_seed(0)
    vocabulary = sparse.config.get_text_config().vocab_size
    ids_BT = torch.randint(vocabulary, (1, prompt), generator=generator).to(device_of(sparse))

    def decode(model: PreTrainedModel) -> Callable[[], object]:
        def call() -> object:
            # Ids are given, not chosen, so that both models do the same work.
            cache = prefilled[id(model)]
            for position in range(generated):
                model(input_ids=ids_BT[:, position % prompt, None], past_key_values=cache)
            cache.crop(-generated)
            return cache

        return call

    models = {"dense": dense, "moefied": sparse}
    prefilled = {id(m): DynamicCache(config=m.config) for m in models.values()}
    for model in models.values():
        model(input_ids=ids_BT, past_key_values=prefilled[id(model)])
    if report is not None:
        report.say("time prefill and decode")
    prefill_runs = {
        name: partial(model, input_ids=ids_BT, use_cache=False) for name, model in models.items()
    }
    prefill = side_by_side(prefill_runs, samples)
    backends = {"prefill": _backends(sparse)}
    decoded = side_by_side({name: decode(model) for name, model in models.items()}, samples)
    backends["decode"] = _backends(sparse)
    return {
        "kind": "model speed",
        "dtype": str(sparse.dtype),
        "prompt": prompt,
        "generated": generated,
        "prefill": _rates(prefill, prompt),
        "decode": _rates(decoded, generated),
        "backends": backends,
        "baseline": "stock transformers, eager, cache on, same dtype",
        "machine": machine(),
    }


def _backends(model: nn.Module) -> dict[str, int]:
    """How many layers the last forward pass computed with each backend."""
    chosen = [module.chosen for module in sparse_mlps(model).values()]
    return {name: chosen.count(name) for name in sorted(set(chosen))}


def _rates(seconds: dict[str, list[float]], tokens: int) -> dict[str, Any]:
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "tokens_per_second": {name: tokens / value for name, value in medians.items()},
        "speedup": medians["dense"] / medians["moefied"],
        "seconds": seconds,
    }


@torch.no_grad()
def bench_layer(
    *,
    width: int = 4096,
    neurons: int = 11008,
    experts: int = 64,
    k: int = 16,
    tokens: int = 1,
    dtype: torch.dtype = torch.float32,
    router: str = "linear",
    samples: int = 20,
    compiled: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Time one SwiGLU MLP with random weights (synthetic: speed only, it says nothing of quality).

    The moefied side includes router and selection. `masked dense` computes the same function with
    all neurons; `auto` takes the faster of it and the expert views, as models do.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).div_(width**0.5).to(dtype)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    gate_ND, up_ND, down_ND = (random(neurons, width).to(device) for _ in range(3))
    stock_down_DN = down_ND.T.contiguous()
    x_TD = torch.randn(tokens, width, generator=generator).to(dtype).to(device)
    module = SparseMlp(
        DenseMlp(gate_ND=gate_ND, up_ND=up_ND, down_ND=down_ND, activation="silu"),
        experts=experts,
        shared=0,
        router=_random_router(router, width, experts, seed).to(device),
        selection=SELECTIONS["topk"](k=k),  # type: ignore[call-arg]
        compensation=COMPENSATIONS["none"](width, experts, 0),
    )

    def dense() -> Tensor:
        return linear(silu(linear(x_TD, gate_ND)) * linear(x_TD, up_ND), stock_down_DN)

    def forced(name: str) -> Callable[[], Tensor]:
        def call() -> Tensor:
            module.backend = name
            return module(x_TD)  # type: ignore[no-any-return]

        return call

    runs: dict[str, Callable[[], object]] = {"dense": dense}
    if compiled:
        runs["dense compiled"] = torch.compile(dense)
    runs |= {"moefied": forced("auto"), "views": forced("views"), "masked dense": forced("masked")}
    seconds = side_by_side(runs, samples)
    forced("auto")()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    best_dense = min(medians["dense"], medians.get("dense compiled", float("inf")))
    return {
        "kind": "layer speed",
        "label": "synthetic: random weights",
        "width": width,
        "neurons": neurons,
        "experts": experts,
        "k": k,
        "tokens": tokens,
        "dtype": str(dtype),
        "router": router,
        "chosen": module.chosen,
        "speedup": {n: best_dense / s for n, s in medians.items() if not n.startswith("dense")},
        "median_seconds": medians,
        "seconds": seconds,
        "machine": machine(),
    }


def _random_router(name: str, width: int, experts: int, seed: int) -> Router:
    torch.manual_seed(seed)
    router = ROUTERS[name](width, experts, 128)
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=width**-0.5)
    return router
