"""Evaluation records as a person reads them: rows of tables, and the model card (README.md) of a folder."""

from typing import Any

from moefy.models.artefact import Artefact
from moefy.models.entries import LayerEntry
from moefy.run.tables import figure, markdown

COLUMNS = {
    "bits_per_byte_dense": "bits/byte dense",
    "bits_per_byte": "bits/byte",
    "ce_dense": "CE dense",
    "ce": "CE",
    "ce_increase": "CE increase",
    "kl": "KL to dense",
    "agreement": "top-1",
    "accuracy": "top-1 right",
    "cosine": "cosine",
    "mse": "squared error",
}
_WITH_INTERVAL = ("ce_increase", "kl", "cosine", "mse")


def domain_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of an evaluation record: every domain, then all of them."""
    total = record["total"]
    names = [name for name in COLUMNS if name in total]
    header = ["domain", "tokens", *(COLUMNS[name] for name in names), "intervals over"]
    rows = []
    for domain, row in [*record["domains"].items(), ("all", total)]:
        cells = [cell_text(name, row[name]) if name in row else "" for name in names]
        rows.append([domain, str(row["tokens"]), *cells, row["bootstrap"]])
    return header, rows


def cell_text(name: str, value: dict[str, Any]) -> str:
    """A figure as text, with its interval where one is shown."""
    if name not in _WITH_INTERVAL:
        return f"{value['mean']:.3f}"
    return figure(value)


_GROUPS = {
    ("positions", "all"): "all tokens",
    ("positions", "without_first"): "without position 0",
    ("positions", "without_first_and_sinks"): "without position 0 and attention sinks",
    ("strata", "rank_1"): "bigram's first choice",
    ("strata", "rank_2_to_10"): "bigram's choices 2 to 10",
    ("strata", "rank_over_10"): "below the bigram's first 10",
}


def group_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the loss increase over some tokens only; no rows for images."""
    found = [
        (label, record[part][name])
        for (part, name), label in _GROUPS.items()
        if part in record and record[part][name]["tokens"]
    ]
    names = [name for name in _WITH_INTERVAL if found and name in found[0][1]]
    header = ["tokens that count", "share", *(COLUMNS[name] for name in names)]
    rows = []
    for label, row in found:
        cells = [cell_text(name, row[name]) for name in names]
        rows.append([label, f"{row['share']['mean']:.1%}", *cells])
    return header, rows


def sample_lines(record: dict[str, Any]) -> list[str]:
    """What the documents are too few for, a line each."""
    lines, alone = [], [n for n, row in record["domains"].items() if row["documents"] == 1]
    if record.get("domains_left_out"):
        lines.append(f"no document of: {', '.join(record['domains_left_out'])}")
    if alone:
        lines.append(f"no interval over one document: {', '.join(alone)}")
    return lines


def group_lines(record: dict[str, Any]) -> list[str]:
    """The other figures that a mean hides, a line each."""
    lines, total = [], record["total"]
    if "kl_tail" in total:
        tail = dict(total["kl_tail"])
        share = tail.pop("top_1_percent_share")
        values = ", ".join(f"{name} {value:.3f}" for name, value in tail.items())
        lines.append(f"KL tail: {values}; the worst 1 % of tokens hold {share:.0%} of all KL")
    if "bigram_skill" in total:
        skill, ce = total["bigram_skill"], total["ce_bigram"]["mean"]
        value = "none, dense is no better" if skill is None else figure(skill)
        lines.append(
            f"bigram skill: {value} (1 = dense, 0 = the bigram, whose CE is {ce:.3f}; fitted on "
            f"{record['bigram']['tokens']} other tokens)"
        )
    mean = record["router_quality"]["mean"]
    recall = "no" if mean["recall"] is None else f"{mean['recall']:.1%}"
    lines.append(
        f"router: {recall} of the oracle's experts run; missed energy "
        f"{mean['missed_energy']:.3f} = {mean['unavoidable']:.3f} unavoidable + "
        f"{mean['router_added']:.3f} by the router (means of layers)"
    )
    if record.get("overlap"):
        lines.append(
            f"WARNING: {record['overlap']} of these documents are also in {record['overlap_with']}"
        )
    return lines


def layer_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of an evaluation record by layer: the router, and FFN density.

    Of the domains only those of lowest and highest density are named; the record has them all.
    """
    density = record["ffn_density_by_layer"]
    figures = ("recall", "missed_energy", "unavoidable", "router_added")
    header = ["layer", *(name.replace("_", " ") for name in figures)]
    header += ["density", "lowest in", "highest in"]
    rows = []
    for index, row in enumerate(record["router_quality"]["layers"]):
        cells = ["" if row[name] is None else f"{row[name]:.3f}" for name in figures]
        domains = sorted((layers[index], name) for name, layers in density["domains"].items())
        ends = [f"{name} {value:.3f}" for value, name in (domains[0], domains[-1])]
        rows.append([row["layer"], *cells, f"{density['all'][index]:.3f}", *ends])
    return header, rows


def domain_table(record: dict[str, Any]) -> str:
    """An evaluation record as a Markdown table; the means of 95 % bootstrap intervals."""
    return markdown(*domain_rows(record))


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
against {dense}. FFN density {measured:.3f}; {bits:.2f} bits read per token and MLP weight of the dense model
(dense: 16; scales, router and compensation included); {computed:.3f} of its MLP multiplications; active
parameters {parameters:.3f}.{heads}

{table}

{exact}
"""
_FORM = {
    "full": "The weights are the source's, their neurons in expert order: plain `transformers` "
    "loads this folder as the dense model. A LoRA adapter that was trained on the source is silently wrong "
    "on it where it adapts MLPs: `moefy permute-adapter LORA FOLDER NEW` moves it first.",
    "trained": "The weights were trained after conversion (`moefy recover`): plain `transformers` loads "
    "this folder as a dense model, but not as the source.",
    "adapter": "This folder holds the side files only; the weights stay in the source.",
}


_EXACT = (
    "With every expert on, outputs equal the source{rounded} up to a relative error of "
    "{all_experts_relative_error:.1e}.{rounding}"
)
_ROUNDED = ", its MLP weights rounded to {bits} bits ({scales}-bit scales and offsets for 32),"
_ROUNDING = " Rounding alone costs KL {rounding_kl:.4f} (all experts on, against the source)."
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
        bits=quality["bits_read"],
        computed=quality["active_compute"],
        parameters=quality["active_parameters"],
        heads=_heads(quality),
        table=domain_table(quality),
        exact=_TRAINED if trained else _exact(first, records["conversion"]),
    )


def _exact(first: LayerEntry, conversion: dict[str, Any]) -> str:
    rounded = "" if first.storage is None else _ROUNDED.format(**first.storage)
    rounding = _ROUNDING.format(**conversion) if "rounding_kl" in conversion else ""
    return _EXACT.format(**conversion, rounded=rounded, rounding=rounding)


def _heads(quality: dict[str, Any]) -> str:
    if "head_density" not in quality:
        return ""
    return (
        f"\nHead density {quality['head_density']:.3f}, attention budget "
        f"{quality['attention_budget']:.3f} (docs/attention.md)."
    )
