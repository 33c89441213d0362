"""What runs: density by layer and domain of MLPs and of attention, active budget, active parameters.

Shapes: B documents, T tokens, D width, H heads, S shared and E routed experts.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from moefy.experts.moefied import of
from moefy.experts.passes import Heard
from moefy.experts.routed import Routed
from moefy.experts.sparse_heads import sparse_heads
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps


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

    def active_budget(self) -> float:
        """MLP weights read per token, router and compensation included, over the dense MLPs'."""
        read = self._run() + self._extra()
        return read / sum(_matrices(m) for m in self.modules.values())

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
        return (self._run() + extra) / sum(_matrices(m) for m in self.modules.values())

    def active_parameters(self) -> float:
        """Parameters that a token uses over those of the dense model.

        Attention counts as used in full, and so does what routes its heads: they are masked, and
        all are computed (docs/attention.md).
        """
        heads = _parameters(sparse_heads(self.model).values())
        added = _parameters(self.modules.values()) + heads
        dense = sum(p.numel() for p in self.model.parameters()) - added
        off = sum(_matrices(m) for m in self.modules.values()) - self._run()
        return (dense - off + self._extra() + heads) / dense

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
