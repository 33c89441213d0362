"""How each engine computes one MLP, on the levels `kernel` and `layer`.

Shapes: T tokens, D width, N neurons, E experts, K experts that run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from moefy.benchmark import moved
from moefy.benchmark.engines.table import COMPILED, EAGER, LLAMA_CPP, Choice, Unavailable, serve
from moefy.benchmark.layers import Layers
from moefy.experts.backends.stock_moe import register_experts
from moefy.experts.sparse_mlp import SparseMlp
from moefy.methods.tables import COMPENSATIONS, SELECTIONS
from moefy.models.mlp import DenseMlp, activation_function
from moefy.run.memory import free_memory

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Case:
    """What every engine has to compute: some layers, the inputs of each, and which experts run."""

    layers: Layers
    inputs: list[Tensor]
    """`[T, D]` of each layer."""
    masks: list[Tensor]
    """`[T, E]` of each layer."""
    routed: bool
    """Whether the engine has to find the masks itself (level `layer`)."""
    asked: float | None = None
    """The density that the masks were made for; None where layers have their own."""

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.inputs[0])

    @property
    def density(self) -> float:
        """Share of the experts that a token runs, over all layers."""
        return fmean(moved.density(mask_TE) for mask_TE in self.masks)

    @property
    def union(self) -> float:
        """Share of the experts that any token runs, over all layers."""
        return fmean(moved.union(mask_TE) for mask_TE in self.masks)


def prepare(choice: Choice, case: Case) -> list[Call]:
    """One call for each layer; raises `Unavailable` where this engine does not compute the case."""
    serve(choice, case.inputs[0].device)
    if choice.name == EAGER:
        return _dense(case, mlp)
    if choice.name == COMPILED:
        # What was compiled for other shapes would count against the limit of recompilations.
        torch.compiler.reset()
        return _dense(case, torch.compile(mlp, dynamic=False))
    if choice.name == LLAMA_CPP or choice.linears or choice.compiled:
        raise Unavailable("runs whole models: --level model")
    if choice.experts is not None:
        return _stock(case, choice.experts)
    return [
        partial(_moefied, module, choice.name, x_TD, None if case.routed else mask_TE)
        for module, x_TD, mask_TE in zip(case.layers.modules, case.inputs, case.masks, strict=True)
    ]


def mlp(
    x_TD: Tensor,
    act: Callable[[Tensor], Tensor],
    up_ND: Tensor,
    gate_ND: Tensor | None,
    down_DN: Tensor,
    up_bias_N: Tensor | None,
    gate_bias_N: Tensor | None,
    down_bias_D: Tensor | None,
) -> Tensor:
    """The dense MLP as stock models compute it."""
    up_TN = linear(x_TD, up_ND, up_bias_N)
    h_TN = act(up_TN) if gate_ND is None else act(linear(x_TD, gate_ND, gate_bias_N)) * up_TN
    return linear(h_TN.to(down_DN.dtype), down_DN, down_bias_D)


def _dense(case: Case, compute: Callable[..., Tensor]) -> list[Call]:
    return [
        partial(
            compute, x_TD, activation_function(w.activation), w.up_ND, w.gate_ND, w.down_ND.T,
            w.up_bias_N, w.gate_bias_N, w.down_bias_D,
        )
        for x_TD, w in zip(case.inputs, case.layers.stock, strict=True)
    ]  # fmt: skip


def _moefied(module: SparseMlp, backend: str, x_TD: Tensor, mask_TE: Tensor | None) -> Tensor:
    """A layer by one backend: all of it, or with a mask given its experts alone."""
    module.backend = backend
    if mask_TE is None:
        y_TD: Tensor = module(x_TD)
        return y_TD
    return module.compute(x_TD, mask_TE, module.running)


def _stock(case: Case, implementation: str) -> list[Call]:
    """The experts by an implementation of transformers, the router as its blocks have it."""
    for module, mask_TE in zip(case.layers.modules, case.masks, strict=True):
        reason = _not_stock(module, case.routed)
        counts_T = mask_TE.sum(1)
        if reason is None and bool((counts_T != counts_T[0]).any()):
            reason = "tokens run different numbers of experts"
        if reason is not None:
            raise Unavailable(f"not as a stock mixture of experts: {reason}")
        if implementation == "batched_mm":
            _fits(int(mask_TE.sum()) * module.expert_size, module.weights)
    register_experts()
    calls: list[Call] = []
    for experts, module, x_TD, mask_TE in zip(
        case.layers.experts, case.layers.modules, case.inputs, case.masks, strict=True
    ):
        k = int(mask_TE[0].sum())
        weight_TK = x_TD.new_ones(len(x_TD), k)
        if case.routed:
            calls.append(partial(_block, implementation, experts, module, x_TD, weight_TK))
        else:
            index_TK = mask_TE.int().topk(k, dim=1).indices.sort(1).values
            calls.append(partial(_experts, implementation, experts, x_TD, index_TK, weight_TK))
    return calls


def _block(
    implementation: str, experts: Any, module: SparseMlp, x_TD: Tensor, ones_TK: Tensor
) -> Tensor:
    """Scores, softmax, top-k, experts: what the block of a stock mixture of experts does."""
    scores_TE = module.router(x_TD, module.routed).float()
    eps = getattr(module.selection, "eps", 1.0)
    index_TK = torch.softmax(scores_TE * eps, dim=-1).topk(ones_TK.shape[1], dim=-1).indices
    return _experts(implementation, experts, x_TD, index_TK, ones_TK)


def _experts(
    implementation: str, experts: Any, x_TD: Tensor, index_TK: Tensor, ones_TK: Tensor
) -> Tensor:
    experts.config._experts_implementation = implementation
    y_TD: Tensor = experts(x_TD, index_TK, ones_TK)
    return y_TD


def _not_stock(module: SparseMlp, routed: bool) -> str | None:
    """What of a layer a stock mixture of experts does not have; None where it has all."""
    mlp = module.running
    if mlp.gate_ND is None:
        return "the MLP has no gate"
    if not (mlp.up_bias_N is mlp.gate_bias_N is mlp.down_bias_D is mlp.centre_N is None):
        return "the MLP has biases"
    if not routed:
        return None
    if module.shared:
        return "some experts are shared"
    if not isinstance(module.selection, (SELECTIONS["topk"], SELECTIONS["softmax_topk"])):
        return f"the selection {type(module.selection).__name__}"
    if module.computes_gate:
        return "the router computes the gates"
    if not isinstance(module.compensation, COMPENSATIONS["none"]):
        return "there is a compensation"
    return None


def _fits(rows: int, mlp: DenseMlp) -> None:
    """Whether a copy of so many rows of every matrix leaves memory for the rest."""
    copied = rows * mlp.matrices * mlp.width * mlp.up_ND.element_size()
    free = torch.cuda.mem_get_info()[0] if mlp.up_ND.is_cuda else free_memory()
    if copied > free / 2:
        raise Unavailable(
            f"copies the weights of every token's experts, {copied / 1e9:.1f} GB; "
            f"{free / 1e9:.1f} GB are free"
        )
