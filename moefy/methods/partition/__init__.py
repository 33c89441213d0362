"""Which expert owns each neuron of one layer.

    found = partition(mlp, x_TD, experts=32)      # found.owner_N, found.permutation

A method is a function from an MLP, a sample of its inputs, a number of experts and a seed to the
owner of each neuron; `METHODS` names those shipped, and a dotted path `package.module:function`
names any other. Methods see the MLP in canonical gauge and order, so neither the order in which a
checkpoint stores its neurons nor a rescale that leaves the function alone changes what they find.

Shapes: T tokens, D model width, N neurons, E experts, F = N / E neurons per expert.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefy.errors import CheckpointError, RecipeError, unknown_choice
from moefy.methods.partition.canonical import canonical_gauge, canonical_order
from moefy.methods.partition.clusters import (
    cmoe,
    coactivation,
    contiguous,
    kmeans,
    markers,
    patterns,
    random,
)
from moefy.methods.partition.contribution import contribution
from moefy.methods.partition.shared import SHARED_BY, shared_share, variation
from moefy.models.mlp import DenseMlp

Run = Callable[..., Tensor]
"""`(mlp, x_TD, num_experts, seed) -> owner_N`, every expert owning exactly N / E neurons."""


@dataclass(frozen=True)
class Method:
    """One way to split the neurons of a layer, and what it has to be given."""

    run: Run
    reads_tokens: bool = False
    """Whether it needs a sample of inputs; the others take an empty one."""
    sees_shared: bool = False
    """Whether it is given all neurons, and as a fifth argument those that it is to split `[N]`."""
    as_stored: bool = False
    """Whether it sees the neurons in the order of the checkpoint, and so is not invariant to it."""


METHODS: dict[str, Method] = {
    "cmoe": Method(cmoe, reads_tokens=True, sees_shared=True),
    "coactivation": Method(coactivation, reads_tokens=True),
    "contiguous": Method(contiguous, as_stored=True),
    "contribution": Method(contribution, reads_tokens=True),
    "kmeans": Method(kmeans),
    "markers": Method(markers, reads_tokens=True),
    "patterns": Method(patterns, reads_tokens=True),
    "random": Method(random),
}

EXPERT_SIZE = 32
"""Neurons per expert where a recipe says nothing: small experts lose least at a given density."""


@dataclass(frozen=True)
class Partition:
    """Equal experts over the neurons of one layer."""

    owner_N: Tensor
    """Expert of each neuron, int64 `[N]`, in the order the checkpoint stores them."""
    experts: int
    """E, the shared ones included."""
    shared: int
    """Experts 0 to `shared` - 1 run for every token."""

    @property
    def expert_size(self) -> int:
        """F, neurons per expert."""
        return len(self.owner_N) // self.experts

    @property
    def permutation(self) -> Tensor:
        """Neurons `[N]` in expert order; within an expert they keep the checkpoint's order."""
        return self.owner_N.argsort(stable=True)

    @property
    def as_stored(self) -> bool:
        """Whether the neurons stand in expert order in the checkpoint already."""
        return bool((self.owner_N.diff() >= 0).all())


def partition(
    mlp: DenseMlp,
    x_TD: Tensor,
    *,
    experts: int,
    method: str = "contribution",
    shared: int | None = 0,
    shared_by: str = "contribution",
    most_shared: int | None = None,
    domain_T: Tensor | None = None,
    seed: int = 0,
    where: str = "layer",
) -> Partition:
    """Split the neurons of one MLP into `experts` equal experts.

    `x_TD` is a sample of the MLP's inputs, which may be empty if neither the method nor `shared` needs
    one; `domain_T` are the domains of its tokens. The first `shared` experts hold the neurons that the
    ranking `shared_by` puts first; None lets ExpertWeaver's rule say how many, at most `most_shared`.
    `where` names the layer in errors. Computes in fp32. Raises `RecipeError` for an unknown method, a count
    that does not divide, too many shared experts; `CheckpointError` for numbers that are not finite.
    """
    row, size = find_method(method), mlp.neurons // expert_count(mlp.neurons, None, experts, where)
    _require_shared(shared, shared_by, experts, where)
    what = f"method '{method}' with {shared} shared experts"
    _require_inputs(mlp, x_TD, what, where, needed=bool(shared) or row.reads_tokens)
    if size == 1 and shared == 0:
        return Partition(owner_N=torch.arange(mlp.neurons), experts=experts, shared=0)
    order_N = torch.arange(mlp.neurons) if row.as_stored else canonical_order(mlp)
    mlp = canonical_gauge(mlp, order_N)
    if shared is None:
        wanted = round(shared_share(variation(mlp, x_TD, domain_T)) * experts)
        shared = min(wanted, experts - 1, experts - 1 if most_shared is None else most_shared)
    first_N = torch.arange(mlp.neurons)
    if shared:
        first_N = SHARED_BY[shared_by](mlp, x_TD, domain_T).argsort(descending=True, stable=True)
    owner_N, routed_N = torch.empty_like(order_N), first_N[shared * size :].sort().values
    owner_N[order_N[first_N[: shared * size]]] = torch.arange(shared * size) // size
    split_N = _split(method, mlp, x_TD, experts - shared, seed, routed_N, order_N)
    owner_N[order_N[routed_N]] = shared + split_N
    return Partition(owner_N=owner_N, experts=experts, shared=shared)


def _split(
    method: str,
    mlp: DenseMlp,
    x_TD: Tensor,
    experts: int,
    seed: int,
    routed_N: Tensor,
    order_N: Tensor,
) -> Tensor:
    """The owner of each routed neuron; single neurons keep the order of the checkpoint, `order_N`."""
    row = find_method(method)
    if len(routed_N) == experts:
        owner_N = order_N[routed_N].argsort().argsort()
    elif row.sees_shared:
        owner_N = row.run(mlp, x_TD, experts, seed, routed_N)
    else:
        mine = mlp if len(routed_N) == mlp.neurons else mlp.take(routed_N)
        owner_N = row.run(mine, x_TD, experts, seed)
    _require_balanced(owner_N, len(routed_N), experts, method)
    return owner_N


def _require_shared(shared: int | None, shared_by: str, experts: int, where: str) -> None:
    if shared_by not in SHARED_BY:
        raise RecipeError(unknown_choice("partition.shared_by", shared_by, SHARED_BY))
    if shared is not None and not 0 <= shared < experts:
        raise RecipeError(
            f"{where}: got {shared} shared experts of {experts}; at least one must be routed, "
            f"so give 0 to {experts - 1}"
        )


def expert_count(neurons: int, expert_size: int | None, experts: int | None, where: str) -> int:
    """Number of experts for `neurons` neurons, from a size or a count or neither.

    With neither, the size is the divisor of N nearest to 32, multiples of 16 before others. Raises
    `RecipeError` naming `where` if both are given or the split is not exact.
    """
    if expert_size is not None and experts is not None:
        raise RecipeError(f"{where}: expert_size and experts exclude each other; give one")
    divisors = [d for d in range(1, neurons + 1) if neurons % d == 0]
    if experts is not None:
        if experts not in divisors:
            raise RecipeError(
                f"{where}: {neurons} neurons do not split into {experts} equal experts; "
                f"nearest that do: {_nearest(divisors, experts)}"
            )
        return experts
    if expert_size is not None:
        if expert_size not in divisors:
            raise RecipeError(
                f"{where}: {neurons} neurons do not split into experts of {expert_size}; "
                f"nearest sizes that do: {_nearest(divisors, expert_size)}"
            )
        return neurons // expert_size
    preferred = [d for d in divisors if d % 16 == 0 and d < neurons] or divisors
    return neurons // min(preferred, key=lambda d: (abs(d - EXPERT_SIZE), d))


def _nearest(divisors: list[int], wanted: int) -> str:
    below = [d for d in divisors if d < wanted][-1:]
    above = [d for d in divisors if d > wanted][:1]
    return ", ".join(str(d) for d in below + above)


def find_method(name: str) -> Method:
    """A shipped method, or the function (or `Method`) that `package.module:name` names."""
    if name in METHODS:
        return METHODS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise RecipeError(
            unknown_choice("partition method", name, METHODS) + ", or package.module:function"
        )
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"partition method '{name}': {error}; check the dotted path") from None
    return found if isinstance(found, Method) else Method(found)


def _require_inputs(mlp: DenseMlp, x_TD: Tensor, what: str, where: str, *, needed: bool) -> None:
    if needed and not len(x_TD):
        raise RecipeError(f"{where}: {what} needs a sample of inputs, got 0 tokens; give a corpus")
    for name, value in [*vars(mlp).items(), ("inputs", x_TD)]:
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"{where}: {name.split('_')[0]} holds NaN or infinite values; "
                "check that the checkpoint is whole and runs in this dtype"
            )


def _require_balanced(owner_N: Tensor, neurons: int, experts: int, method: str) -> None:
    """A method from outside may be wrong; the shipped ones are tested."""
    ok = owner_N.shape == (neurons,) and not owner_N.is_floating_point()
    ok = ok and int(owner_N.min()) >= 0
    size_E = torch.bincount(owner_N, minlength=experts).tolist() if ok else []
    if size_E != [neurons // experts] * experts:
        raise RecipeError(
            f"partition method '{method}': did not return {experts} experts of "
            f"{neurons // experts} neurons each; got sizes {size_E[:8]}"
        )
