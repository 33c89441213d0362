"""The memory that `moefy convert --dry-run` names beside the memory that a conversion takes.

python experiments/memory_bars.py /path/to/SmolLM2-135M    # writes benchmarks/records/memory.json

Three shapes: the bundled demo model (vocabulary 3k), a folder of SmolLM2-135M (49k), and a Llama with
random weights and 256k tokens that reads with SmolLM2's tokenizer. Each is converted in a process of its
own; counted is the largest resident memory less that after importing. Exits with 1 where the estimate
is off by more than `WITHIN`, or the second model takes more than `BEYOND` beyond its weights.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moefy.cli.quickstart import demo_models
from moefy.conversion.convert import convert
from moefy.conversion.plan import plan
from moefy.models.checkpoint import Checkpoint
from moefy.recipe import load, override
from moefy.run.computing import machine, versions
from moefy.run.memory import peak_memory

RECORD = Path("benchmarks/records/memory.json")
WITHIN, BEYOND = 0.25, 1e9
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def build(folder: Path, tokenizer: Path) -> Path:
    """A shallow Llama with random weights, nearly all of them in its embedding."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2**18, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER:
        shutil.copy(tokenizer / name, folder)
    return folder


def one(model: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Convert in this process: estimate and peak, in bytes."""
    before = psutil.Process().memory_info().rss
    recipe = override(load(settings.pop("recipe", "largest_inputs")), settings)
    todo = plan(Checkpoint.open(model), recipe, "bundled")
    with tempfile.TemporaryDirectory() as folder:
        convert(model, Path(folder) / "out", recipe=recipe, quiet=True)
    peak = peak_memory() - before
    return {
        "parameters": todo.parameters,
        "weights": todo.weights,
        "estimate": todo.memory,
        "peak": peak,
        "ratio": round(todo.memory / peak, 3),
        "beyond_the_model": peak - todo.weights,
    }


def measured(model: Path, settings: dict[str, str]) -> dict[str, Any]:
    """`one`, in a process of its own."""
    command = [sys.executable, __file__, "--of", str(model), "--set", json.dumps(settings)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="Folder of SmolLM2-135M.")
    parser.add_argument("--set", type=json.loads, default={}, help="Settings of the recipe, JSON.")
    parser.add_argument("--of", action="store_true", help="Measure this one model here.")
    args = parser.parse_args()
    if args.of:
        print(json.dumps(one(args.model, args.set)))
        return 0
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        wide = build(Path(folder), args.model)
        models = {"demo llama": demo_models()["llama"], "SmolLM2-135M": args.model, "256k": wide}
        for name, model in models.items():
            runs[name] = run = measured(model, args.set)
            print(
                f"{name:<14} estimate {run['estimate'] / 1e9:.2f} GB  peak {run['peak'] / 1e9:.2f} GB  "
                f"ratio {run['ratio']:.2f}  beyond the model {run['beyond_the_model'] / 1e9:.2f} GB"
            )
    record = {
        "kind": "memory", "settings": args.set, "runs": runs, "machine": machine(),
        "versions": versions(),
    }  # fmt: skip
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    off = [name for name, run in runs.items() if abs(run["ratio"] - 1) > WITHIN]
    large = runs["SmolLM2-135M"]["beyond_the_model"] > BEYOND
    return int(bool(off) or large)


if __name__ == "__main__":
    sys.exit(main())
