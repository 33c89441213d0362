"""Streamed conversion of checkpoints that nobody would want to hold in memory, and how it grows.

python scripts/streaming_bars.py large     # 12 GB in bf16, converted with `fast`, evaluated lazily, removed
python scripts/streaming_bars.py growth    # small ones: time and memory over layers, width and tokens
python scripts/streaming_bars.py follow    # demo models: routers fitted on sparse or on dense inputs
python scripts/streaming_bars.py metric    # demo models: what densities are allocated by
python scripts/streaming_bars.py ranks     # demo model: fitting in two processes of one thread, and in one
python scripts/streaming_bars.py table     # docs/streaming.md: what was measured, and an extrapolation

The checkpoints are Llama-shaped with random weights: seconds, bytes and memory mean something, quality
does not. Every conversion runs in a process of its own, whose memory is its own.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pages import fill
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from moefy import convert, streaming, tuning
from moefy.measure import evaluate_folder
from moefy.provenance import machine
from moefy.recipe import Recipe, override

RECORDS = Path("benchmarks/records")
TOKENIZER = Path("moefy/demo/llama")
LARGE = {"layers": 23, "width": 4096, "neurons": 14336, "vocabulary": 128256, "heads": 32, "kv": 8}
SMALL = {"layers": 4, "width": 1024, "neurons": 3584, "vocabulary": 8192, "heads": 8, "kv": 2}
METRICS = ("fisher", "stream", "equal")
REAL = {
    "Llama-3 8B": {"layers": 32, "width": 4096, "neurons": 14336, "vocabulary": 128256, "kv": 1024},
    "Llama-3 70B": {"layers": 80, "width": 8192, "neurons": 28672, "vocabulary": 128256, "kv": 1024},
    "Llama-3.1 405B": {
        "layers": 126, "width": 16384, "neurons": 53248, "vocabulary": 128256, "kv": 1024,
    },
}  # fmt: skip


def make(folder: Path, shape: dict[str, int], shard: float = 1.0e9) -> None:
    """Write a checkpoint of this shape with weights whose sizes are spread as those of trained ones are."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    D, N, heads = shape["width"], shape["neurons"], shape["heads"]
    config = LlamaConfig(
        vocab_size=shape["vocabulary"], hidden_size=D, intermediate_size=N,
        num_hidden_layers=shape["layers"], num_attention_heads=heads,
        num_key_value_heads=shape["kv"], max_position_embeddings=8192, tie_word_embeddings=False,
        dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (TOKENIZER / name).exists():
            shutil.copy(TOKENIZER / name, folder / name)
    random = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int, gain: float = 1.0, spread: float = 0.3) -> torch.Tensor:
        """Normal entries; rows differ in size (log-normal), as neurons and heads of trained models do."""
        value = torch.randn(rows, columns, generator=random)
        size = torch.exp(spread * torch.randn(rows, 1, generator=random))
        return value.mul_(size * gain / math.sqrt(columns)).bfloat16()

    def norm() -> torch.Tensor:
        """Gains around 1, and a few channels far above, as in trained models."""
        gain = torch.exp(0.2 * torch.randn(D, generator=random))
        gain[torch.randperm(D, generator=random)[: max(1, D // 1000)]] *= 8
        return gain.bfloat16()

    kv, small = D // heads * shape["kv"], 1 / math.sqrt(2 * shape["layers"])
    pieces: dict[str, torch.Tensor] = {}
    files: dict[str, dict[str, int]] = {}

    def put(name: str, value: torch.Tensor, last: bool = False) -> None:
        pieces[name] = value
        if last or sum(v.nbytes for v in pieces.values()) > shard:
            file = f"model-{len(files) + 1:05d}.safetensors"
            save_file(pieces, folder / file, metadata={"format": "pt"})
            files[file] = {key: v.nbytes for key, v in pieces.items()}
            pieces.clear()

    put("model.embed_tokens.weight", matrix(shape["vocabulary"], D, 0.02 * math.sqrt(D)))
    for index in range(shape["layers"]):
        at = f"model.layers.{index}"
        for name, rows, columns, gain in (
            ("self_attn.q_proj", D, D, 1.0), ("self_attn.k_proj", kv, D, 1.0),
            ("self_attn.v_proj", kv, D, 1.0), ("self_attn.o_proj", D, D, small),
            ("mlp.gate_proj", N, D, 1.0), ("mlp.up_proj", N, D, 1.0), ("mlp.down_proj", D, N, small),
        ):  # fmt: skip
            put(f"{at}.{name}.weight", matrix(rows, columns, gain))
        put(f"{at}.input_layernorm.weight", norm())
        put(f"{at}.post_attention_layernorm.weight", norm())
    put("model.norm.weight", norm())
    put("lm_head.weight", matrix(shape["vocabulary"], D), last=True)
    index = {
        "metadata": {"total_size": sum(sum(held.values()) for held in files.values())},
        "weight_map": {name: file for file, held in files.items() for name in held},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def moefy(*args: str) -> tuple[dict[str, Any], float]:
    """One verb in a process of its own; what it says as JSON, and its seconds."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "moefy", *args, "--json"],
        stdout=subprocess.PIPE, check=True, env={**os.environ, "OMP_NUM_THREADS": threads()},
    )  # fmt: skip
    return json.loads(done.stdout), time.perf_counter() - began


def threads() -> str:
    return os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))


def converted(source: Path, out: Path, *settings: str) -> dict[str, Any]:
    """Convert, streamed, with `fast`; what the record says of time, bytes and memory."""
    pairs = [part for pair in settings for part in ("--set", pair)]
    found, seconds = moefy(
        "convert", str(source), str(out), "--recipe", "fast", "--density", "0.25", "--stream",
        "--overwrite", *pairs,
    )  # fmt: skip
    record, quality = found["conversion"], found["evaluation"]
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    return {
        "checkpoint_bytes": size,
        "shards": len(list(source.glob("*.safetensors"))),
        "threads": int(threads()),
        "seconds": {**record["seconds"], "in all": round(seconds, 1)},
        "read": {k: v / size for k, v in record["bytes_read"].items()},
        "written": {k: v / size for k, v in record["bytes_written"].items()},
        "peak_memory": record["peak_memory"],
        "all_experts_relative_error": record["all_experts_relative_error"],
        "evaluated_tokens": quality["tokens"],
        "ffn_density": quality["ffn_density"],
        "kept": record["tuning"]["budget"]["kept"],
    }


def large(work: Path, shape: dict[str, int]) -> dict[str, Any]:
    source, out = work / "source", work / "moefied"
    began = time.perf_counter()
    make(source, shape)
    print(f"made {source} in {time.perf_counter() - began:.0f} s", flush=True)
    record: dict[str, Any] = {"shape": shape, "recipe": "fast", **converted(source, out)}
    save(record, "stream_large")
    evaluated, seconds = moefy("eval", str(out), "--documents", "2")
    record["lazy_evaluation"] = {
        "documents": evaluated["documents"], "tokens": evaluated["tokens"],
        "seconds": round(seconds, 1), "peak_memory": evaluated["peak_memory"],
        "kl": evaluated["total"]["kl"]["mean"],
    }  # fmt: skip
    return record


def growth(work: Path) -> dict[str, Any]:
    """One thing is changed at a time."""
    rows = []
    variants = [
        *({"layers": n} for n in (2, 4, 8)),
        *({"width": d, "neurons": 7 * d // 2, "heads": d // 128} for d in (512, 2048)),
        *({"tokens": t} for t in (2048, 8192)),
    ]
    for change in variants:
        tokens = change.pop("tokens", 4096)
        shape = {**SMALL, **change}
        make(work / "source", shape, shard=1e8)
        found = converted(work / "source", work / "out", f"partition.tokens={tokens}")
        rows.append({"shape": shape, "tokens": tokens, **found})
        print(shape, tokens, found["seconds"], found["peak_memory"] / 1e9, flush=True)
    return {"rows": rows}


def follow(work: Path) -> dict[str, Any]:
    """What carrying the sparse states is worth: the same recipes, fitted on what dense layers send."""
    rows = []
    plain = streaming.stream
    for name in ("llama", "opt"):
        for recipe in ("default", "export"):
            chosen = Recipe.named(recipe, density=0.25)
            for sparse in (True, False):
                streaming.stream = partial(plain, follow=sparse)
                out = work / f"{name} {recipe} {sparse}"
                convert(f"moefy/demo/{name}", out, recipe=chosen, stream=True, overwrite=True)
                found = evaluate_folder(out, documents=44)
                rows.append(
                    {
                        "model": name, "recipe": recipe,
                        "inputs": "sparse" if sparse else "dense",
                        "kl": found["total"]["kl"]["mean"], "ffn_density": found["ffn_density"],
                    }
                )  # fmt: skip
                print(rows[-1], flush=True)
    streaming.stream = plain
    return {"rows": rows}


def metric(work: Path) -> dict[str, Any]:
    """KL of `fast` with densities by the Fisher metric, by the residual stream, and all equal."""
    rows, fits = [], tuning._fits
    for name, density in (("llama", 0.25), ("opt", 0.2)):
        kl = {}
        for how in METRICS:
            recipe = Recipe.named("fast", density=density)
            if how == "equal":
                recipe = override(recipe, {"budget.name": "uniform"})
            # Without room for a backward pass the residual stream has to do.
            tuning._fits = fits if how == "fisher" else lambda *_: False
            found = convert(
                f"moefy/demo/{name}", work / f"{name} {how}", recipe=recipe, overwrite=True
            )
            kl[how] = found["evaluation"]["total"]["kl"]["mean"]
        rows.append({"model": name, "density": density, "kl": kl})
        print(rows[-1], flush=True)
    tuning._fits = fits
    return {"rows": rows}


def ranks(work: Path) -> dict[str, Any]:
    """Seconds of every stage with two processes of one thread each, and with one, taken in turn."""
    launcher = (
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m",
    )  # fmt: skip
    runs: dict[str, list[dict[str, float]]] = {"one": [], "two": []}
    for number in range(3):
        for name, how in (("one", ()), ("two", launcher)):
            out = work / f"{name}{number}"
            subprocess.run(
                [
                    sys.executable, "-m", *how, "moefy", "convert", "moefy/demo/llama", str(out),
                    "--recipe", "moefication", "--density", "0.25", "--overwrite", "--quiet",
                ],
                check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            record = json.loads((out / "records.json").read_text())["conversion"]
            runs[name].append(record["seconds"])
    medians = {
        name: {stage: statistics.median(run[stage] for run in found) for stage in found[0]}
        for name, found in runs.items()
    }
    faster = {stage: medians["one"][stage] / medians["two"][stage] for stage in ("measure", "fit")}
    first, second = (load_file(work / f"{n}0" / "moefy.safetensors") for n in ("one", "two"))
    apart = max(
        float((first[n].double() - second[n].double()).norm() / first[n].double().norm())
        for n in first if first[n].any()
    )  # fmt: skip
    print(faster, apart, flush=True)
    return {
        "recipe": "moefication", "model": "llama", "seconds": medians, "times_faster": faster,
        "largest_relative_difference": apart,
    }  # fmt: skip


def save(record: dict[str, Any], name: str) -> None:
    text = json.dumps(record | {"machine": machine()}, indent=1) + "\n"
    (RECORDS / f"{name}.json").write_text(text, encoding="utf-8")


def layer_parameters(shape: dict[str, int], kv: int) -> int:
    D, N = shape["width"], shape["neurons"]
    return 2 * D * D + 2 * D * kv + 3 * D * N


def table() -> str:
    """Markdown: the large run, the growth, the extrapolation."""
    big = json.loads((RECORDS / "stream_large.json").read_text())
    small = json.loads((RECORDS / "stream_growth.json").read_text())
    lines = ["| what | measured |", "| --- | --- |"]
    weights, read, written = big["checkpoint_bytes"], big["read"], big["written"]
    lines += [
        f"| checkpoint | {weights / 1e9:.1f} GB in bf16, {big['shards']} shards, "
        f"{big['shape']['layers']} layers, width {big['shape']['width']}, "
        f"{big['shape']['neurons']} neurons |",
        f"| peak resident memory | {big['peak_memory'] / 1e9:.2f} GB |",
        f"| read, first pass | {read['stream']:.2f}x of the checkpoint |",
        f"| written, first pass | {written['stream']:.2f}x, states between layers included |",
        f"| read for verification | {read['hash the source']:.2f}x source hashed, "
        f"{read['verify']:.2f}x second pass, {read['hash the result']:.2f}x result hashed |",
        f"| seconds on {big['threads']} threads | {big['seconds']['stream']:.0f} first pass, "
        f"{big['seconds']['verify']:.0f} second pass, {big['seconds']['in all']:.0f} in all |",
    ]
    if "lazy_evaluation" in big:
        lazy = big["lazy_evaluation"]
        lines.append(
            f"| `moefy eval`, weights on disk | {lazy['tokens']} tokens in {lazy['seconds']:.0f} s, "
            f"peak {lazy['peak_memory'] / 1e9:.2f} GB |"
        )
    lines += [
        "", "| layers | width | neurons | tokens to partition | first pass, s | second pass, s | peak, GB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in small["rows"]:
        s = row["shape"]
        lines.append(
            f"| {s['layers']} | {s['width']} | {s['neurons']} | {row['tokens']} | "
            f"{row['seconds']['stream']:.1f} | {row['seconds']['verify']:.1f} | "
            f"{row['peak_memory'] / 1e9:.2f} |"
        )
    shape = big["shape"]
    kv = shape["width"] // shape["heads"] * shape["kv"]
    one = layer_parameters(shape, kv)
    rate = (big["seconds"]["stream"] + big["seconds"]["verify"]) / (one * shape["layers"])
    base = min(row["peak_memory"] for row in small["rows"])
    slope = (big["peak_memory"] - base) / one
    lines += [
        "", "Extrapolated, not measured: time grows with the weights of all layers, memory with those of one.",
        "", "| model | checkpoint, GB | time on this machine, hours | peak memory, GB |",
        "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, real in REAL.items():
        layer = layer_parameters(real, real["kv"])
        total = layer * real["layers"] + 2 * real["vocabulary"] * real["width"]
        hours = rate * layer * real["layers"] / 3600
        lines.append(
            f"| {name} | {2 * total / 1e9:.0f} | {hours:.1f} | {(base + slope * layer) / 1e9:.1f} |"
        )
    return "\n".join(lines) + "\n"


def ranks_table() -> str:
    found = json.loads((RECORDS / "stream_ranks.json").read_text())
    one, two = found["seconds"]["one"], found["seconds"]["two"]
    lines = [
        "| stage | one process, s | two processes, s | times faster |", "| --- | --- | --- | --- |",
        *(
            f"| {stage} | {one[stage]:.1f} | {two[stage]:.1f} | {faster:.2f} |"
            for stage, faster in found["times_faster"].items()
        ),
        "",
        f"Llama demo, recipe `{found['recipe']}` (k-means experts, a router trained per layer), one thread a "
        "process, medians of three runs in turn; largest relative difference of any tensor "
        f"{found['largest_relative_difference']:.1g}.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def follow_table() -> str:
    rows = json.loads((RECORDS / "stream_follow.json").read_text())["rows"]
    lines = [
        "| model | recipe | KL, sparse inputs | KL, dense inputs |",
        "| --- | --- | --- | --- |",
    ]
    for sparse, dense in zip(rows[::2], rows[1::2], strict=True):
        figures = f"{sparse['kl']:.4f} | {dense['kl']:.4f}"
        lines.append(f"| {sparse['model']} | `{sparse['recipe']}` | {figures} |")
    return "\n".join(lines) + "\n"


def metric_table() -> str:
    rows = json.loads((RECORDS / "stream_metric.json").read_text())["rows"]
    lines = [
        "| model | FFN density | backward pass | residual stream | equal densities |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        kl = " | ".join(f"{row['kl'][how]:.4f}" for how in METRICS)
        lines.append(f"| {row['model']} | {row['density']} | {kl} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["large", "growth", "follow", "metric", "ranks", "table"])
    parser.add_argument("--work", default="runs/streaming")
    parser.add_argument("--keep", action="store_true", help="leave the folders where they are")
    args = parser.parse_args()
    work = Path(args.work) / args.what
    if args.what == "table":
        fill(Path("docs/streaming.md"), "streaming", table())
        fill(Path("docs/streaming.md"), "ranks", ranks_table())
        fill(Path("docs/streaming.md"), "metric", metric_table())
        fill(Path("docs/experiments.md"), "follow", follow_table())
        return
    if args.what == "large":
        save(large(work, LARGE), "stream_large")
    else:
        run = {"growth": growth, "follow": follow, "metric": metric, "ranks": ranks}[args.what]
        save(run(work), f"stream_{args.what}")
    if not args.keep:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
