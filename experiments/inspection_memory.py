"""Peak memory of the descriptive pass of `moefy inspect` over the length of the text.

python experiments/inspection_memory.py 100000 1000000    # writes benchmarks/records/inspect_memory.json

A tiny Llama with random weights reads documents that repeat a few patterns with variations. Every
length is measured in a process of its own, whose memory is its own, with random partitions and all.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moefy import convert, load
from moefy.inspection.inspect import describe
from moefy.inspection.part import Pass
from moefy.inspection.texts import read
from moefy.recipe import PartitionRecipe, Recipe, RouterRecipe
from moefy.run.computing import machine, versions
from moefy.run.memory import peak_memory

RECORD = Path("benchmarks/records/inspect_memory.json")
LENGTH, VOCABULARY = 256, 1024
RECIPE = Recipe(
    density=0.5,
    context=LENGTH,
    partition=PartitionRecipe(method="kmeans", expert_size=16, tokens=1024),
    router=RouterRecipe(name="linear", tokens=2048, epochs=1, batch_size=256),
)


def documents(tokens: int) -> list[list[int]]:
    """Documents of `LENGTH` token ids: 50 patterns, a tenth of whose tokens are drawn anew in each."""
    random = np.random.default_rng(0)
    patterns = random.zipf(1.3, size=(50, LENGTH)) % (VOCABULARY - 3) + 3
    found = []
    for number in range(-(-tokens // LENGTH)):
        drawn = random.integers(3, VOCABULARY, size=LENGTH)
        ids = np.where(random.random(LENGTH) < 0.1, drawn, patterns[number % len(patterns)])
        found.append(ids.tolist())
    return found


def build(folder: Path) -> Path:
    """A tiny model, converted."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=LENGTH,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "source")
    convert(folder / "source", folder / "out", recipe=RECIPE, corpus=documents(40_000), quiet=True)
    return folder / "out"


def one(folder: Path, tokens: int) -> dict[str, Any]:
    """What this process takes to read and describe so many tokens."""
    model = load(folder)
    before = psutil.Process().memory_info().rss
    reading = read(model, documents(tokens), tokens=tokens)
    after = psutil.Process().memory_info().rss
    began = time.perf_counter()
    describe(Pass(model, reading))
    return {
        "tokens": int(reading.tokens_Q.sum()),
        "documents": len(reading.documents),
        "before_reading": before,
        "after_reading": after,
        "peak": peak_memory(),
        "seconds": round(time.perf_counter() - began, 1),
    }


def measured(lengths: list[int]) -> list[dict[str, Any]]:
    """`one` of every length, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        found = []
        for tokens in lengths:
            command = [sys.executable, __file__, "--of", str(Path(folder) / "out"), str(tokens)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokens", type=int, nargs="+")
    parser.add_argument(
        "--of", type=Path, help="A converted model: measure one length in this process."
    )
    args = parser.parse_args()
    if args.of:
        print(json.dumps(one(args.of, args.tokens[0])))
        return
    runs = measured(args.tokens)
    few, many = runs[0], runs[-1]
    each = (many["peak"] - few["peak"]) / max(1, many["tokens"] - few["tokens"])
    record = {
        "kind": "inspect_memory", "runs": runs, "bytes_per_token": round(each, 1),
        "machine": machine(), "versions": versions(),
    }  # fmt: skip
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    for run in runs:
        print(f"{run['tokens']:>9} tokens  peak {run['peak'] / 1e6:.0f} MB  {run['seconds']} s")


if __name__ == "__main__":
    main()
