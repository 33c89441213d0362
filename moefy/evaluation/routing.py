"""What runs, and how well it was chosen: density and what is read; the router beside the oracle.

The oracle ranks the routed experts of a token by the norm of their output and takes as many as the
router ran for that token. Shared experts always run: they count in no recall and in no error, but
they are part of the dense output. Both see the input that the layer has in the moefied model, errors of
earlier layers included.

Shapes: B documents, T tokens, D width, N neurons, H heads, S shared and E routed experts.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moefy.data.corpus import Batch
from moefy.experts.moefied import of
from moefy.experts.passes import Heard
from moefy.experts.routed import Routed
from moefy.experts.sparse_heads import sparse_heads
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.methods.base import WIDE_BITS, Compensation, Router, WeightBits
from moefy.methods.routers.baselines import expert_norms
from moefy.models.mlp import DenseMlp


class Load:
    """Counts the experts that run on real tokens, by layer and domain."""

    def __init__(self, experts: list[int]) -> None:
        self.experts = experts
        """All experts of each layer."""
        self.active: dict[tuple[int, str], float] = defaultdict(float)
        self.tokens: dict[tuple[int, str], float] = defaultdict(float)

    def hear(self, heard: Heard) -> None:
        """Add one layer in one forward pass."""
        ran_B = heard.mask_TE.new_zeros(len(heard.batch.samples), dtype=heard.document_T.dtype)
        tokens_B = heard.document_T.bincount(minlength=len(ran_B)).tolist()
        ran_B.index_add_(0, heard.document_T, heard.mask_TE.sum(1))
        rows = zip(heard.batch.samples, ran_B.tolist(), tokens_B, strict=True)
        for sample, ran, tokens in rows:
            self.active[heard.layer, sample.document.domain] += ran
            self.tokens[heard.layer, sample.document.domain] += tokens

    def per_layer(self, domain: str | None = None) -> list[float]:
        """Share of the experts of every layer that ran, over all tokens or those of one domain."""
        densities = []
        for index, experts in enumerate(self.experts):
            cells = [cell for cell in self.tokens if cell[0] == index and domain in (None, cell[1])]
            tokens = sum(self.tokens[cell] for cell in cells)
            densities.append(sum(self.active[cell] for cell in cells) / (tokens * experts))
        return densities

    def by_layer(self, layers: list[str]) -> dict[str, Any]:
        """Density by layer, over all tokens and by domain."""
        domains = sorted({domain for _, domain in self.tokens})
        return {
            "layers": layers,
            "all": self.per_layer(),
            "domains": {domain: self.per_layer(domain) for domain in domains},
        }


class FfnLoad(Load):
    """What MLPs run."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.modules = sparse_mlps(model)
        self.found = of(model).sites
        super().__init__([module.experts for module in self.modules.values()])

    def density(self) -> float:
        """FFN density of the model: neurons that ran over all neurons."""
        neurons = [m.expert_size * m.experts for m in self.modules.values()]
        ran = [n * density for n, density in zip(neurons, self.per_layer(), strict=True)]
        return sum(ran) / sum(neurons)

    def table(self) -> dict[str, Any]:
        """FFN density by layer, over all tokens and by domain."""
        return self.by_layer([site.layer for site in self.found])

    def bits_read(self) -> float:
        """Bits read per token and MLP weight of the dense model, whose own are `WIDE_BITS`.

        Router, compensation and scales included.
        """
        pairs = zip(self.modules.values(), self.per_layer(), strict=True)
        return sum(_bits(module, density) for module, density in pairs) / self._weights()

    def active_budget(self) -> float:
        """`bits_read` over those of the dense model."""
        return self.bits_read() / WIDE_BITS

    def active_compute(self) -> float:
        """MLP multiplications per token over the dense MLPs', those of the router included.

        Differs from the budget where a router reads few bits of many weights.
        """
        pairs = list(zip(self.modules.values(), self.per_layer(), strict=True))
        extra = sum(
            module.router.products(module.weights)
            + module.compensation.weights_read(density * module.experts - module.shared)
            for module, density in pairs
        )
        return (self._run() + extra) / self._weights()

    def active_parameters(self) -> float:
        """Parameters that a token uses over those of the dense model.

        Attention counts as used in full, and so does what routes its heads: they are masked, and
        all are computed (docs/attention.md).
        """
        heads = _parameters(sparse_heads(self.model).values())
        added = _parameters(self.modules.values()) + heads
        dense = sum(p.numel() for p in self.model.parameters()) - added
        off = self._weights() - self._run()
        return (dense - off + self._extra() + heads) / dense

    def _weights(self) -> int:
        """Weights of all MLPs."""
        return sum(_matrices(m) for m in self.modules.values())

    def _run(self) -> float:
        """Weights of the neurons that ran, per token; gates that the router computed not among them."""
        pairs = zip(self.modules.values(), self.per_layer(), strict=True)
        return sum(
            density * _matrices(module) * (1 - module.computes_gate / module.weights.matrices)
            for module, density in pairs
        )

    def _extra(self) -> float:
        """Weights that routers and compensations read, per token."""
        pairs = zip(self.modules.values(), self.per_layer(), strict=True)
        return sum(
            module.router.weights_read(module.weights)
            + module.compensation.weights_read(density * module.experts - module.shared)
            for module, density in pairs
        )


def _parameters(modules: Iterable[Routed]) -> int:
    """Parameters of routers and compensations."""
    parts = (part for module in modules for part in (module.router, module.compensation))
    return sum(p.numel() for part in parts for p in part.parameters())


def _matrices(module: SparseMlp) -> int:
    """Weights of one MLP, biases left out."""
    weights = module.weights
    return weights.neurons * weights.width * weights.matrices


def bits_read(
    mlp: DenseMlp,
    router: Router,
    compensation: Compensation,
    density: float,
    *,
    experts: int,
    shared: int,
    reuses: bool = True,
) -> float:
    """Bits that an MLP reads for a token of which a share `density` of its experts runs.

    `reuses` says whether the router reads the input of this very layer, so that what it reads of a neuron
    serves the neuron too.
    """
    size, bits = mlp.neurons * mlp.width, WeightBits.of(mlp)
    of_neurons = size * (bits.inputs * (mlp.matrices - 1) + bits.down)
    run = density * (of_neurons - (router.bits_reused(mlp) if reuses else 0))
    extra = router.bits_read(mlp) + compensation.bits_read(density * experts - shared)
    return run + size * bits.down_scales + extra


def _bits(module: SparseMlp, density: float) -> float:
    return bits_read(
        module.weights, module.router, module.compensation, density,
        experts=module.experts, shared=module.shared, reuses=not module.look_ahead,
    )  # fmt: skip


class HeadLoad(Load):
    """Counts the heads that run; a model whose heads all run has no figures."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.found = of(model).heads
        self.modules = sparse_heads(model)
        super().__init__([module.experts for module in self.modules.values()])

    def record(self) -> dict[str, Any]:
        """`head_density`, `attention_budget` and `head_density_by_block`."""
        if not self.found:
            return {}
        heads = [site.heads for site in self.found]
        ran = [n * density for n, density in zip(heads, self.per_layer(), strict=True)]
        return {
            "head_density": sum(ran) / sum(heads),
            "attention_budget": self.budget(),
            "head_density_by_block": self.by_layer([site.block for site in self.found]),
        }

    def budget(self) -> float:
        """Attention weights that a token needs over those of the dense blocks.

        Queries and output of the heads that ran, keys and values of all heads, router and
        compensation; biases left out.
        """
        read = 0.0
        rows = zip(self.found, self.modules.values(), self.per_layer(), strict=True)
        for site, module, density in rows:
            read += 2 * site.width * site.head_dim * (density * site.heads + site.groups)
            read += module.router.weights_read(module.summed)
            read += module.compensation.weights_read(density * module.experts)
        return read / sum(site.parameters for site in self.found)


TOKENS = 4096
"""Tokens of every layer that are looked at; the work is about that of two more passes over them."""

_CHUNK = 1024


class RouterQuality:
    """Sums over a sample of tokens of every layer."""

    def __init__(
        self, model: PreTrainedModel, batches: list[Batch], *, tokens: int = TOKENS, seed: int = 0
    ) -> None:
        self.found = of(model).sites
        self.modules = sparse_mlps(model)
        self.generator = torch.Generator().manual_seed(seed)
        self.most = tokens
        self.weight = {
            side: sum(_weight(b, side) for b in batches) for side in ("encoder", "decoder")
        }
        self.passed: Counter[int] = Counter()
        self.taken: Counter[int] = Counter()
        self.sums: list[dict[str, float]] = [defaultdict(float) for _ in self.modules]

    def hear(self, heard: Heard) -> None:
        """Add a share of the tokens of one layer in one forward pass, drawn evenly."""
        layer = heard.layer
        self.passed[layer] += _weight(heard.batch, heard.side)
        due = self.most * self.passed[layer] // self.weight[heard.side] - self.taken[layer]
        self.taken[layer] += due
        x_TD, mask_TE = heard.x_TD, heard.mask_TE
        if due < len(x_TD):
            chosen = torch.randperm(len(x_TD), generator=self.generator)[:due].to(x_TD.device)
            x_TD, mask_TE = x_TD[chosen], mask_TE[chosen]
        module = self.modules[layer]
        # The output bias is no part of what experts put out, the constant of centred neurons is.
        mlp = replace(module.weights, down_bias_D=None).to(torch.float32)
        mlp = module.compensation.centred(mlp)
        for x, mask in zip(x_TD.split(_CHUNK), mask_TE.split(_CHUNK), strict=True):
            for name, value in _sums(module, mlp, x, mask).items():
                self.sums[layer][name] += value

    def record(self) -> dict[str, Any]:
        """Recall and missed energy of every layer, and their means over layers."""
        layers = [
            {"layer": site.layer, **_figures(sums)}
            for site, sums in zip(self.found, self.sums, strict=True)
        ]
        names = [name for name in layers[0] if name not in ("layer", "tokens")]
        means = {}
        for name in names:
            values = [row[name] for row in layers if row[name] is not None]
            means[name] = sum(values) / len(values) if values else None
        return {
            "tokens_per_layer": max(row["tokens"] for row in layers),
            "mean": means,
            "layers": layers,
        }


def _weight(batch: Batch, side: str) -> int:
    """Tokens of a batch, or its images, which are of one size."""
    mask = batch.mask(side)
    return len(batch.samples) if mask is None else int(mask.sum())


@dataclass(frozen=True)
class Compared:
    """The router beside the oracle, token by token."""

    ran_TE: Tensor
    """Which routed experts ran (bool)."""
    oracle_TE: Tensor
    """Which the oracle would have run, as many for each token (bool)."""
    energy_T: dict[str, Tensor]
    """Sums of squares, in fp64: `energy` of the dense output without its bias, `model` and `oracle` of
    what each leaves out, and both `bare`, without the compensation."""


def compare_with_oracle(
    module: SparseMlp, mlp: DenseMlp, x_TD: Tensor, mask_TE: Tensor
) -> Compared:
    """What one layer ran for some tokens beside the oracle's choice.

    `mlp` holds all neurons in expert order without the output bias, as they run
    (`Compensation.centred`); the mask covers shared experts too.
    """
    ran_TE = mask_TE[:, module.shared :].bool()
    first = module.shared * module.expert_size
    h_TN = mlp.hidden(x_TD.float())
    routed_TN, down_ND = h_TN[:, first:], mlp.down_ND[first:]
    norm_TE = expert_norms(routed_TN, down_ND, ran_TE.shape[1])
    rank_TE = norm_TE.argsort(dim=1, descending=True).argsort(dim=1)
    oracle_TE = rank_TE < ran_TE.sum(1, keepdim=True)
    energy_T = {"energy": _energy(mlp.output(h_TN))}
    for name, on_TE in (("model", ran_TE), ("oracle", oracle_TE)):
        off_TN = (~on_TE).repeat_interleave(module.expert_size, dim=1)
        error_TD = (routed_TN * off_TN) @ down_ND
        energy_T[f"{name} bare"] = _energy(error_TD)
        extra_TD = module.compensation(x_TD, on_TE)
        if extra_TD is not None:
            error_TD = error_TD - extra_TD.float()
        energy_T[name] = _energy(error_TD)
    return Compared(ran_TE, oracle_TE, energy_T)


def _sums(module: SparseMlp, mlp: DenseMlp, x_TD: Tensor, mask_TE: Tensor) -> dict[str, float]:
    """Hits, experts that ran, and energies of one chunk of tokens."""
    found = compare_with_oracle(module, mlp, x_TD, mask_TE)
    return {
        "tokens": float(len(x_TD)),
        "hits": float((found.oracle_TE & found.ran_TE).sum()),
        "ran": float(found.ran_TE.sum()),
        **{name: float(energy_T.sum()) for name, energy_T in found.energy_T.items()},
    }


def _energy(values_TD: Tensor) -> Tensor:
    return values_TD.double().square().sum(1)


def _figures(sums: dict[str, float]) -> dict[str, Any]:
    """The figures of one layer; a layer of all zeros misses nothing."""
    energy = sums["energy"] or 1.0
    return {
        "tokens": int(sums["tokens"]),
        "recall": sums["hits"] / sums["ran"] if sums["ran"] else None,
        **_split("", sums["model"] / energy, sums["oracle"] / energy),
        **_split("uncompensated_", sums["model bare"] / energy, sums["oracle bare"] / energy),
    }


def _split(prefix: str, missed: float, unavoidable: float) -> dict[str, float]:
    return {
        f"{prefix}missed_energy": missed,
        f"{prefix}unavoidable": unavoidable,
        f"{prefix}router_added": missed - unavoidable,
    }
