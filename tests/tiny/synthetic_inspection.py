"""An inspection made of drawn numbers, at any size: what the report is tested and measured on.

Figures have the entropy of measured ones (floats of six digits), so that sizes mean something.
Document 0 holds what breaks a page that trusts its texts.
"""

import base64
import re
from functools import cache
from typing import Any

import numpy as np

from moefy.data.corpus import load_corpus
from moefy.inspection.record import Inspection, Table, table

HOSTILE = (
    "A </script><script>document.title='run'</script> <b>bold</b> <img src=x onerror=alert(1)> "
    "\U0001f642\U0001f469‍\U0001f680 שלום עולם ‮evil "
    "{{DATA}} &amp; \\u003c -->\nnext line é日本"
)
HOSTILE_TOKENS = ("</script>", "<b>", "\U0001f642", "‮evil", " שלום", "\n", "", "\\u003c")
DOMAINS = 11
KINDS = ("current", "previous", "target", "predicted")
PANELS = (
    ("top", "select"), ("top", "held_out"), ("spectrum", "select"), ("spectrum", "held_out"),
    ("random", "select"), ("near", "select"), ("negative", "select"),
)  # fmt: skip


def inspection(
    *, layers: int = 12, experts: int = 64, examples: int = 140, documents: int = 400, seed: int = 0
) -> Inspection:
    """A whole inspection; `examples` per expert are spread over the panels and shards, of which the report
    shows 62 where there are 140."""
    draw = np.random.default_rng(seed)
    texts, labels = _texts(documents)
    words = [*HOSTILE_TOKENS, *sorted({t for text in texts[1:40] for t in _pieces(text)})][:3000]
    lengths = [len(_ends(text)) for text in texts]
    domains = sorted(set(labels))
    made: dict[str, Table] = {
        "documents": table(
            {
                "document": np.arange(len(texts)), "domain": labels, "tokens": np.array(lengths),
                "shard": ["select" if i % 3 == 0 else "held_out" for i in range(len(texts))],
                "corpus": ["bundled"] * len(texts),
            }
        ),
        "layers": _layers(draw, layers),
        "experts": _experts(draw, layers, experts),
        "domains": _domains(draw, layers, experts, domains),
        "tokens": _tokens(draw, layers, experts, len(words)),
        "logits": _logits(draw, layers, experts, len(words)),
        "causal": _causal(draw, layers, experts, domains),
        "examples": _examples(draw, layers, experts, examples, lengths),
        "quantiles": _quantiles(draw, layers, experts, domains),
        "pairs": _pairs(draw, layers, experts),
        "random_weights": _random_weights(draw, layers),
        "hunt": _hunt(draw, lengths, labels),
        "hunt_domains": _means(draw, "domain", domains),
        "hunt_classes": _means(draw, "class", ["digits", "punctuation"]),
        "enrichment": _enrichment(draw, layers, experts, domains),
        "families": _families(draw, layers, experts),
        "energy": _energy(draw, layers, experts, domains),
        "something_new": table({"name": ["a", "b"], "value": np.array([1.5, 2.5])}),
    }  # fmt: skip
    meta: dict[str, Any] = {
        "model": "models/demo-<b>llama</b>",
        "layers": [
            {"name": f"model.layers.{i}.mlp", "experts": experts, "owner": _owner(i, experts)}
            for i in range(layers)
        ],
        "command": "moefy inspect models/demo -o report",
        "settings": {"mode": "mean"},
        "seeds": {"seed": seed},
        "versions": {"moefy": "0.1.0", "torch": "2.11.0"},
        "hashes": {"corpus": "0" * 64},
        "vocabulary": {str(i): word for i, word in enumerate(words)},
    }
    honesty = {
        "ce_dense": {"value": 3.214, "low": 3.1, "high": 3.33, "what": "CE of the dense model, nats"},
        "bigram_skill": {
            "value": 0.93, "low": 0.91, "high": 0.95, "what": "bigram skill: 1 dense, 0 the bigram",
            "verdict": "most of what the dense model knows beyond pairs of tokens is kept",
        },
        "perfect": {"value": 2.1e-6, "what": "largest logit difference to dense, all experts on"},
        "unknown": {"value": None, "what": "not measured"},
    }  # fmt: skip
    held = {str(i): {"text": text, "ends": _ends(text)} for i, text in enumerate(texts)}
    return Inspection(meta, honesty, made, held, [_prompt(draw, layers, experts)])


@cache
def _texts(documents: int) -> tuple[list[str], list[str]]:
    found = load_corpus(None).documents
    names = sorted({doc.domain for doc in found})[:DOMAINS]
    by_name = [[doc for doc in found if doc.domain == name] for name in names]
    chosen = [
        by_name[i % len(names)][i // len(names) % len(by_name[i % len(names)])]
        for i in range(documents - 1)
    ]
    return [HOSTILE, *(doc.text[:2000] for doc in chosen)], ["<b>web", *(d.domain for d in chosen)]


def _pieces(text: str) -> list[str]:
    return re.findall(r"\s?\w{1,6}|\s|\S", text)


def _ends(text: str) -> list[int]:
    """Ends of the tokens; an emoji takes two tokens, of which the second ends where the first does."""
    ends, at = [], 0
    for piece in _pieces(text):
        at += len(piece)
        ends += [at] * (2 if ord(piece[0]) > 0xFFFF else 1)
    return ends


def _owner(layer: int, experts: int) -> list[int]:
    return np.random.default_rng(layer).permutation(np.repeat(np.arange(experts), 8)).tolist()


def _keys(layers: int, experts: int, times: int) -> dict[str, np.ndarray]:
    return {
        "layer": np.repeat(np.arange(layers), experts * times),
        "expert": np.tile(np.repeat(np.arange(experts), times), layers),
    }


def _ranged(name: str, middle: np.ndarray, width: float) -> dict[str, np.ndarray]:
    half = width * (0.5 + np.random.default_rng(len(middle)).random(len(middle)))
    return {name: middle, f"{name}_low": middle - half, f"{name}_high": middle + half}


def _layers(draw: np.random.Generator, layers: int) -> Table:
    share = {
        name: _ranged(f"share_{name}", scale * draw.random(layers), 0.01)
        for name, scale in (("token", 0.5), ("previous", 0.2), ("domain", 0.06), ("position", 0.02))
    }
    columns = {key: values for part in share.values() for key, values in part.items()}
    columns["share_position"][0] = -0.004
    return table({"layer": np.arange(layers), **columns, "bits_entropy": 20 + draw.random(layers)})


def _experts(draw: np.random.Generator, layers: int, experts: int) -> Table:
    size = layers * experts
    names = (
        "norm",
        "norm_routed",
        "share",
        "energy",
        "norm_later",
        "energy_later",
        "router_recall",
    )
    figures = {}
    for name in names:
        figures |= _ranged(name, draw.beta(2, 6, size), 0.02)
    return table(
        {
            **_keys(layers, experts, 1), **_ranged("load", draw.beta(2, 6, size), 0.02),
            "documents": draw.integers(5, 400, size), **figures,
            "norm_max": draw.lognormal(1, 0.5, size), "stability": draw.random(size),
            "stability_chance": np.full(size, 0.02), "dead": [False] * size,
            "causal_domain": ["c_code"] * size,
            **_ranged("causal_csi", draw.normal(0, 0.01, size), 0.002),
            **_ranged("figure_of_tomorrow", draw.normal(0, 1, size), 0.3),
        }
    )  # fmt: skip


def _domains(draw: np.random.Generator, layers: int, experts: int, domains: list[str]) -> Table:
    size, times = layers * experts * len(domains), len(domains)
    ds, adjusted = draw.beta(2, 6, size), draw.normal(0, 0.05, size)
    return table(
        {
            **_keys(layers, experts, times), "domain": domains * (layers * experts),
            **_ranged("ds", ds, 0.03), "lift": draw.normal(0, 1, size),
            **_ranged("ds_lex", ds - adjusted, 0.02), **_ranged("ds_adj", adjusted, 0.03),
            "p": draw.random(size), "q": draw.random(size) ** 3, "q_adj": draw.random(size) ** 3,
            "documents": draw.integers(5, 80, size), "tokens": draw.integers(100, 20000, size),
        }
    )  # fmt: skip


def _tokens(draw: np.random.Generator, layers: int, experts: int, vocabulary: int) -> Table:
    times = len(KINDS) * 40
    size = layers * experts * times
    return table(
        {
            **_keys(layers, experts, times),
            "kind": [k for k in KINDS for _ in range(40)] * (layers * experts),
            "end": (["top"] * 20 + ["bottom"] * 20) * (size // 40),
            "token": _spread(draw, size, vocabulary), "total": draw.integers(10, 9000, size),
            "documents": draw.integers(5, 80, size), "count": draw.zipf(1.5, size).clip(10, 5000),
            "recall": draw.beta(1, 30, size), "precision": draw.beta(2, 5, size),
            "lift": draw.normal(0, 1.5, size),
            "z": np.tile(np.r_[np.linspace(12, 2, 20), np.linspace(-2, -9, 20)], size // 40)
            + draw.normal(0, 0.3, size),
        }
    )  # fmt: skip


def _spread(draw: np.random.Generator, size: int, vocabulary: int) -> np.ndarray:
    """Token ids of which every expert's first are the hostile ones."""
    ids = draw.integers(len(HOSTILE_TOKENS), vocabulary, size)
    ids[: len(HOSTILE_TOKENS)] = np.arange(len(HOSTILE_TOKENS))
    return ids


def _logits(draw: np.random.Generator, layers: int, experts: int, vocabulary: int) -> Table:
    kinds = ("mean", "direction_1", "direction_2", "direction_3")
    size = layers * experts * len(kinds) * 30
    return table(
        {
            **_keys(layers, experts, len(kinds) * 30),
            "kind": [k for k in kinds for _ in range(30)] * (layers * experts),
            "token": _spread(draw, size, vocabulary), "value": draw.normal(0, 0.2, size),
            "share": np.tile(np.repeat([np.nan, 0.31, 0.2, 0.1], 30), layers * experts),
        }
    )  # fmt: skip


def _causal(draw: np.random.Generator, layers: int, experts: int, domains: list[str]) -> Table:
    size, times = layers * experts * len(domains), len(domains)
    ce = draw.lognormal(-5, 1, size)
    return table(
        {
            **_keys(layers, experts, times), "domain": domains * (layers * experts),
            "model": ["dense"] * size, "mode": ["mean"] * size, **_ranged("ce", ce, 0.002),
            "kl": ce * 0.8, "kl_p99": ce * 9, **_ranged("csi", draw.normal(0, 0.01, size), 0.002),
            "z_random": draw.normal(0, 1, size), "percentile": 100 * draw.random(size),
            "p": draw.random(size), "q": draw.random(size) ** 3, "csi_q": draw.random(size) ** 3,
            "documents": draw.integers(5, 80, size), "tokens": draw.integers(100, 20000, size),
            "how": ["exact"] * size,
        }
    )  # fmt: skip


def _examples(
    draw: np.random.Generator, layers: int, experts: int, each: int, lengths: list[int]
) -> Table:
    size = layers * experts * each
    parts = [PANELS[i * len(PANELS) // each] for i in range(each)]
    document = draw.integers(0, len(lengths), size)
    document[:20] = 0
    position = (draw.random(size) * np.array(lengths)[document]).astype(int)
    # Sums of squares of few draws: most tokens weak, some strong, as norms are.
    window = np.clip(draw.chisquare(2, (size, 49)) * 28, 0, 254).astype(np.uint8)
    around = position[:, None] + np.arange(-24, 25)
    window[(around < 0) | (around >= np.array(lengths)[document][:, None])] = 255
    return table(
        {
            **_keys(layers, experts, each), "panel": [p for p, _ in parts] * (layers * experts),
            "shard": [shard for _, shard in parts] * (layers * experts),
            "bin": [i % 10 if parts[i][0] == "spectrum" else None for i in range(each)] * (layers * experts),
            "document": document, "position": position, "norm": draw.lognormal(0, 1, size),
            "share": draw.normal(0.05, 0.1, size), "margin": draw.normal(0, 1, size),
            "ran": draw.random(size) > 0.2,
            "window": [base64.b64encode(row.tobytes()).decode() for row in window],
        }
    )  # fmt: skip


def _quantiles(draw: np.random.Generator, layers: int, experts: int, domains: list[str]) -> Table:
    groups = [(True, None), (False, None), *((True, domain) for domain in domains)]
    times = len(groups)
    size = layers * experts * times
    values = np.sort(draw.lognormal(0, 1, (size, 9)), axis=1)
    return table(
        {
            **_keys(layers, experts, times), "ran": [ran for ran, _ in groups] * (layers * experts),
            "domain": [domain for _, domain in groups] * (layers * experts),
            "tokens": draw.integers(20, 500, size),
            **{f"p{q}": values[:, i] for i, q in enumerate((1, 5, 10, 25, 50, 75, 90, 95, 99))},
        }
    )  # fmt: skip


def _enrichment(draw: np.random.Generator, layers: int, experts: int, domains: list[str]) -> Table:
    concepts = [*domains, "digits", "punctuation", "whitespace", "capitalised", "non-latin"]
    size = layers * experts * len(concepts)
    return table(
        {
            **_keys(layers, experts, len(concepts)), "concept": concepts * (layers * experts),
            "count": draw.poisson(1, size), "extent": draw.exponential(1, size),
            "q": draw.random(size), "replicated": draw.random(size) > 0.5,
        }
    )  # fmt: skip


def _families(draw: np.random.Generator, layers: int, experts: int) -> Table:
    size = layers * experts * 8
    return table(
        {
            **_keys(layers, experts, 8), "neuron": draw.integers(0, 2048, size),
            "neighbour_layer": draw.integers(0, layers, size),
            "neighbour_expert": draw.integers(0, experts, size),
            "neighbour": draw.integers(0, 2048, size), "cosine": draw.random(size),
            "same_expert": draw.random(size) > 0.9,
        }
    )  # fmt: skip


def _energy(draw: np.random.Generator, layers: int, experts: int, domains: list[str]) -> Table:
    """The error is expert -1."""
    times = (experts + 1) * len(domains)
    size = layers * times
    return table(
        {
            "layer": np.repeat(np.arange(layers), times),
            "expert": [*range(experts), -1] * (layers * len(domains)),
            "domain": np.tile(np.repeat(domains, experts + 1), layers).tolist(),
            **_ranged("energy", draw.lognormal(0, 1, size), 0.1),
            **_ranged("energy_later", draw.lognormal(0, 1, size), 0.1),
            "documents": draw.integers(5, 80, size),
        }
    )  # fmt: skip


def _pairs(draw: np.random.Generator, layers: int, experts: int) -> Table:
    size = layers * 100
    layer = np.repeat(np.arange(layers), 100)
    return table(
        {
            "layer_a": layer, "expert_a": draw.integers(0, experts, size), "layer_b": layer,
            "expert_b": draw.integers(0, experts, size), "phi": draw.normal(0, 0.2, size),
            "lift": draw.lognormal(0, 0.5, size), "z": draw.normal(0, 5, size),
            "q": draw.random(size) * 0.05,
        }
    )  # fmt: skip


def _random_weights(draw: np.random.Generator, layers: int) -> Table:
    figures = ("share_token", "share_domain", "cross_terms")
    size = layers * len(figures)
    return table(
        {
            "layer": np.repeat(np.arange(layers), len(figures)), "figure": list(figures) * layers,
            "trained": draw.random(size), "permuted": draw.random(size) / 2,
            "reinitialised": draw.random(size) / 2, "separates": (draw.random(size) > 0.5).tolist(),
        }
    )  # fmt: skip


def _hunt(draw: np.random.Generator, lengths: list[int], labels: list[str]) -> Table:
    document = np.arange(100) % len(lengths)
    position = (draw.random(100) * (np.array(lengths)[document] - 1)).astype(int)
    base = draw.random(100)
    return table(
        {
            "tail": ["loses"] * 50 + ["gains"] * 50, "rank": [*range(50), *range(50)],
            "document": document, "domain": [labels[d] for d in document], "position": position,
            "token": np.zeros(100, dtype=int), "next": np.ones(100, dtype=int),
            "delta": np.r_[np.sort(draw.exponential(1, 50))[::-1], -draw.exponential(0.5, 50)],
            "p_base": base, "p_other": base / 2, "kl": draw.exponential(1, 100),
        }
    )  # fmt: skip


def _means(draw: np.random.Generator, key: str, names: list[str]) -> Table:
    size = len(names)
    return table(
        {
            key: names, **_ranged("delta", draw.normal(0.1, 0.1, size), 0.05),
            **_ranged("kl", draw.random(size), 0.05), "share_of_losses": draw.dirichlet(np.ones(size)),
            "share_of_tokens": draw.dirichlet(np.ones(size)), "documents": draw.integers(5, 80, size),
        }
    )  # fmt: skip


def _prompt(draw: np.random.Generator, layers: int, experts: int) -> dict[str, Any]:
    text = "The <b> cat \U0001f642 sat on the </script> mat and said: \u202etac"
    ends = _ends(text)
    size = len(ends)
    made = []
    for layer in range(layers):
        share = draw.normal(1 / experts, 0.05, (size, experts))
        share += (1 - share.sum(1, keepdims=True)) / experts
        ran = draw.random((size, experts)) > 0.7
        error = np.where(ran, 0, share).sum(1).tolist()
        made.append({"layer": layer, "share": share.tolist(), "ran": ran.tolist(), "error": error})
    parts = {
        name: draw.normal(0, 1, size)
        for name in ("embedding", "attention", "experts", "bias", "error", "constant")
    }
    logit = sum(parts.values())
    at = np.arange(size)
    account = table({"position": at, "token": at, "target": at, **parts, "logit": logit})
    summary = {"accounted": True, "reason": None, "largest_gap": 2e-7, "tolerance": 1e-4}
    return {"text": text, "ends": ends, "layers": made, "account": account, **summary}
