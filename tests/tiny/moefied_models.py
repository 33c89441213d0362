"""Moefied models to look into: the demo models, and tiny ones with shared experts and of other kinds."""

from pathlib import Path
from typing import Any

import torch
from tiny_conversion import RECIPE, convert_tiny
from tiny_models import build, example_inputs
from torch import Tensor

from moefy.conversion.convert import convert
from moefy.data.corpus import load_corpus
from moefy.recipe import override

ROOT = Path(__file__).parents[2]
_PLAIN = {"partition.method": "random", "compensation.name": "none", "router.epochs": 1}
_DEMO = {"partition.expert_size": 64, "partition.tokens": 256, "router.tokens": 512}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "demo_llama": ("llama", {}),
    "demo_opt": ("opt", {}),
    "shared": ("qwen2", {"partition.shared": 2}),
    "encoder": ("bert", {}),
    "seq2seq": ("t5", {}),
    "bloom": ("bloom", {}),
    "compensated": ("opt", {"compensation.name": "mean_residual"}),
    "centred": ("llama", {"compensation.name": "centred"}),
    "gates": ("llama", {"router.name": "self_gating"}),
    "look_ahead": ("opt", {"router.look_ahead": True, "router.name": "mlp"}),
    "static": ("opt", {"selection.name": "prompt_static"}),
}


def make(kind: str, folder: Path) -> Path:
    """Convert a model of `KINDS`; its folder."""
    name, settings = KINDS[kind]
    out = folder / kind
    if kind.startswith("demo"):
        recipe = override(RECIPE, {**_PLAIN, **_DEMO, **settings})
        corpus = load_corpus().take(64)
        convert(ROOT / "moefy" / "demo" / name, out, recipe=recipe, corpus=corpus, quiet=True)
    else:
        source = build(name, folder / f"{kind}-source")
        convert_tiny(name, source, out, settings={**_PLAIN, **settings})
    return out


def inputs_for(kind: str) -> dict[str, Tensor]:
    """Two texts; those of tiny models are padded on the right to 12 tokens."""
    if not kind.startswith("demo"):
        return example_inputs(KINDS[kind][0])
    ids = torch.randint(3, 3000, (2, 16), generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids}
