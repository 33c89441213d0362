"""Decoding on a CPU end to end: dense and moefied by torch, by moefy and by llama.cpp, all in one run.

    python experiments/cpu_model.py runs/cpu_model                 # records cpu_model_<density>.json
    python experiments/cpu_model.py runs/cpu_model --tiny          # a rehearsal in seconds, no records

A Llama-shaped model with random weights (2048 wide, 8 layers of 8192 neurons, bf16), in 64 experts of 128
neurons: seconds mean something, quality does not. llama.cpp runs moefy's own export of the same conversion,
in bf16 and in its Q8_0, and the dense model beside it. Needs the extra `gguf`, and for its rows
llama-cpp-python.
"""

import argparse
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import torch
from rich import print
from transformers import LlamaConfig, LlamaForCausalLM

from moefy import convert
from moefy.benchmark.bench import bench
from moefy.benchmark.record import speed_lines, speed_rows
from moefy.exporting.export import export
from moefy.recipe import load, override
from moefy.run.tables import terminal

RECORDS = Path("benchmarks/records")
TOKENIZER = Path("moefy/demo/llama")
SHAPE = {"hidden_size": 2048, "num_hidden_layers": 8, "intermediate_size": 8192}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 3072}
TINY = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 256}
DENSITIES = (0.1, 0.25, 0.5)


def make(folder: Path, shape: dict[str, int]) -> None:
    """Write the dense model, with the tokenizer of a demo model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape, **HEADS, max_position_embeddings=512, tie_word_embeddings=False, dtype="bfloat16"
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for file in TOKENIZER.glob("*token*"):
        shutil.copy(file, folder)


def corpus(work: Path) -> Path:
    """The beginnings of the bundled documents: quality means nothing here and should not take long."""
    out = work / "corpus.jsonl"
    documents = map(json.loads, (TOKENIZER.parent / "corpus.jsonl").read_text().splitlines())
    short = ({**document, "text": document["text"][:300]} for document in documents)
    out.write_text("\n".join(json.dumps(document) for document in short) + "\n")
    return out


def gguf(source: Path, out: Path, *, quantized: bool) -> Path:
    """Write a GGUF file unless it is there."""
    if not out.exists():
        export(source, out, to="gguf", quantize="q8_0" if quantized else None)
    return out


def measure(
    work: Path, density: float, prompt: int, samples: int, generated: int
) -> dict[str, object]:
    """Convert at a density, export, and time everything side by side."""
    source, out = work / "dense", work / f"moefied-{density}"
    if not out.exists():
        recipe = override(
            load("export"),
            {
                "density": density, "partition.method": "contiguous", "partition.experts": 64,
                "partition.tokens": 512, "router.tokens": 512, "router.epochs": 1,
            },
        )  # fmt: skip
        convert(source, out, recipe=recipe, corpus=corpus(work))
    files = []
    if find_spec("llama_cpp"):
        for quantized in (False, True):
            kind = "-q8_0" if quantized else ""
            files.append(gguf(source, work / f"dense{kind}.gguf", quantized=quantized))
            name = f"export-{density}{kind}.gguf"
            files.append(gguf(out, work / name, quantized=quantized))
    return bench(
        out,
        engines=["auto"],
        compiled=True,
        linears=True,
        gguf=files,
        prompt_tokens=prompt,
        generated=generated,
        samples=samples,
        dtype="bfloat16",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--tiny", action="store_true")
    # torch has no product in bf16 for prompts on CPUs without 16-bit arithmetic: minutes for 64 tokens.
    parser.add_argument("--prompt", type=int, default=8)
    parser.add_argument("--densities", type=float, nargs="*", default=DENSITIES)
    given = parser.parse_args()
    if not (given.work / "dense" / "config.json").exists():
        make(given.work / "dense", TINY if given.tiny else SHAPE)
    for density in given.densities:
        samples, generated = (5, 4) if given.tiny else (5, 12)
        record = measure(given.work, density, given.prompt, samples, generated)
        print(terminal(*speed_rows(record)), *speed_lines(record), sep="\n")
        if not given.tiny:
            (RECORDS / f"cpu_model_{density}.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
