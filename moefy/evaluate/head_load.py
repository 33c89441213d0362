"""What attention runs: head density by block and domain, and the budget of attention.

Shapes: D width, H heads.
"""

from typing import Any

from transformers import PreTrainedModel

from moefy.evaluate.load import Load
from moefy.heads import HeadSite
from moefy.sparse_heads import sparse_heads


class HeadLoad(Load):
    """Counts the heads that run; a model whose heads all run has no figures."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.found: list[HeadSite] = getattr(model, "moefy_heads", [])
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
