"""The README.md of an artefact: what it is, how to load it, what it measured."""

from typing import Any

from moefy.evaluation.tables import domain_table
from moefy.models.artefact import Artefact

_CARD = """---
library_name: moefy
tags: [moefy, mixture-of-experts, activation-sparsity]
---
# {name}, moefied

Made from `{name}` by moefy {version}: {layers} MLPs in {experts} experts each, of which {active} run
for a token (FFN density {density:.3f}). {form}

```python
import moefy
model = moefy.load("path/to/this/folder")
```

## Measured

On {documents} documents ({tokens} tokens) of the corpus `{corpus}` on which nothing was fitted,
against {dense}. FFN density {measured:.3f}, active budget {budget:.3f} (MLP weights read per token,
router and compensation included, over the dense MLPs'), active parameters {parameters:.3f}.{heads}

{table}

{exact}
"""
_FORM = {
    "full": "The weights are the source's, their neurons in expert order: plain `transformers` "
    "loads this folder as the dense model.",
    "trained": "The weights were trained after conversion (`moefy recover`): plain `transformers` loads "
    "this folder as a dense model, but not as the source.",
    "adapter": "This folder holds the side files only; the weights stay in the source.",
}


_EXACT = (
    "With every expert on, outputs equal the source up to a relative error of "
    "{all_experts_relative_error:.1e}."
)
_TRAINED = "With every expert on it is a dense model of its own, not the source."


def model_card(artefact: Artefact, records: dict[str, Any]) -> str:
    """The text of the card."""
    first, quality = artefact.layers[0], records["evaluation"]
    active = first.active
    share = artefact.recipe["density"] if active is None else active / first.experts
    trained = records.get("recovery") if artefact.weights_modified else None
    corpus = trained["corpus"]["name"] if trained else artefact.corpus["name"]
    return _CARD.format(
        name=artefact.source["name"],
        version=artefact.versions["moefy"],
        layers=len(artefact.layers),
        experts=first.experts,
        active="a varying number" if active is None else active,
        density=share,
        form=_FORM["trained" if trained else artefact.form],
        documents=quality["documents"],
        tokens=quality["tokens"],
        corpus=corpus,
        dense=quality["dense"],
        measured=quality["ffn_density"],
        budget=quality["active_budget"],
        parameters=quality["active_parameters"],
        heads=_heads(quality),
        table=domain_table(quality),
        exact=_TRAINED if trained else _EXACT.format(**records["conversion"]),
    )


def _heads(quality: dict[str, Any]) -> str:
    if "head_density" not in quality:
        return ""
    return (
        f"\nHead density {quality['head_density']:.3f}, attention budget "
        f"{quality['attention_budget']:.3f} (docs/attention.md)."
    )
