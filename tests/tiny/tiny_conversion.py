"""Conversions of tiny models, small enough to run dozens of times."""

import json
import time
from pathlib import Path
from typing import Any

import torch
from children import start
from tiny_models import tiny_model

from moefy.conversion.convert import convert
from moefy.models.artefact import ADAPTER, META, SIDE
from moefy.models.checkpoint import Checkpoint, sha256
from moefy.recipe import PartitionRecipe, Recipe, RouterRecipe, override

RECIPE = Recipe(
    density=0.5,
    context=32,
    partition=PartitionRecipe(method="kmeans", expert_size=8, tokens=128),
    router=RouterRecipe(name="linear", tokens=256, epochs=2, batch_size=64),
)


def corpus_for(name: str) -> list[Any]:
    """Documents in memory: token ids, or images."""
    g = torch.Generator().manual_seed(3)
    if tiny_model(name).family == "vit":
        return list(torch.randn(16, 3, 16, 16, generator=g))
    return [torch.randint(3, 90, (8 + i % 17,), generator=g).tolist() for i in range(48)]


def much_text() -> list[list[int]]:
    """Too much to be learned by heart."""
    g = torch.Generator().manual_seed(5)
    return [torch.randint(3, 90, (30,), generator=g).tolist() for _ in range(800)]


def convert_tiny(name: str, source: Path, out: Path, **options: Any) -> dict[str, Any]:
    settings = options.pop("settings", {})
    return convert(
        source,
        out,
        recipe=override(RECIPE, settings),
        corpus=corpus_for(name),
        quiet=True,
        **options,
    )


def rehash(folder: Path) -> None:
    """Let a folder say that it holds what it does."""
    meta = json.loads((folder / META).read_text())
    hashes = {} if meta["form"] == ADAPTER else Checkpoint.open(folder).hashes()
    meta["sha256"] = hashes | {SIDE: sha256(folder / SIDE)}
    (folder / META).write_text(json.dumps(meta))


def kill_conversion(name: str, source: Path, out: Path, after: str, **options: Any) -> None:
    """Begin a conversion in another process; kill it once `after` exists in its work folder."""
    code = (
        "from tiny_conversion import convert_tiny; from pathlib import Path\n"
        f"convert_tiny({name!r}, Path({str(source)!r}), Path({str(out)!r}), **{options!r})"
    )
    process = start(code).process
    mark = out.parent / f".{out.name}.moefy-unfinished" / after
    while process.is_alive() and not mark.exists():
        time.sleep(0.001)
    process.kill()
    process.join()
