"""Streamed conversion of checkpoints that nobody would want to hold in memory, and how it grows.

python experiments/streaming_bars.py large     # 12 GB in bf16, converted with `fast`, evaluated lazily, removed
python experiments/streaming_bars.py growth    # small ones: time and memory over layers, width and tokens
python experiments/streaming_bars.py follow    # demo models: routers fitted on sparse or on dense inputs
python experiments/streaming_bars.py metric    # demo models: what densities are allocated by
python experiments/streaming_bars.py ranks     # demo model: fitting in two processes of one thread, and in one
python experiments/streaming_bars.py table     # docs/streaming.md: what was measured, and an extrapolation

`growth` and `follow` measure what their records lack, variant by variant: they can be stopped and go on.
Remove the record to measure anew.

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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import fill
from safetensors.torch import load_file, save_file
from scipy.optimize import nnls
from transformers import LlamaConfig

from moefy import convert
from moefy.conversion import in_memory as tuning
from moefy.conversion import streamed as streaming
from moefy.evaluation.folder import evaluate as evaluate_folder
from moefy.recipe import Recipe, override
from moefy.run.computing import machine

RECORDS = Path("benchmarks/records")
TOKENIZER = Path("moefy/demo/llama")
LARGE = {"layers": 23, "width": 4096, "neurons": 14336, "vocabulary": 128256, "heads": 32, "kv": 8}
SMALL = {"layers": 4, "width": 1024, "neurons": 3584, "vocabulary": 128256, "heads": 8, "kv": 2}
METRICS = ("fisher", "stream", "equal")
REAL = {
    "Llama-3 8B": {**LARGE, "layers": 32},
    "Llama-3 70B": {**LARGE, "layers": 80, "width": 8192, "neurons": 28672, "heads": 64},
    "Llama-3.1 405B": {**LARGE, "layers": 126, "width": 16384, "neurons": 53248, "heads": 128},
}


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
        "peak_memory_after": record["peak_memory_after"],
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


def growth(work: Path, variant: dict[str, Any]) -> dict[str, Any]:
    """One small checkpoint, made and converted."""
    make(work / "source", variant["shape"], shard=1e8)
    return converted(work / "source", work / "out", f"partition.tokens={variant['tokens']}")


def follow(work: Path, variant: dict[str, Any]) -> dict[str, Any]:
    """What carrying the sparse states is worth: or the same recipe, fitted on what dense layers send."""
    plain, out = streaming.stream, work / " ".join(variant.values())
    recipe = Recipe.named(variant["recipe"], density=0.25)
    streaming.stream = partial(plain, follow=variant["inputs"] == "sparse")
    convert(f"moefy/demo/{variant['model']}", out, recipe=recipe, stream=True, overwrite=True)
    streaming.stream = plain
    found = evaluate_folder(out, documents=44)
    return {"kl": found["total"]["kl"]["mean"], "ffn_density": found["ffn_density"]}


VARIANTS: dict[str, tuple[Callable[..., dict[str, Any]], list[dict[str, Any]]]] = {
    # One thing is changed at a time.
    "growth": (growth, [
        {"shape": {**SMALL, **change}, "tokens": tokens}
        for change, tokens in (
            *(({"layers": n}, 4096) for n in (2, 4, 8)),
            *(({"width": d, "neurons": 7 * d // 2, "heads": d // 128}, 4096) for d in (512, 2048)),
            *(({}, t) for t in (2048, 8192)),
        )
    ]),
    "follow": (follow, [
        {"model": model, "recipe": recipe, "inputs": inputs}
        for model in ("llama", "opt")
        for recipe in ("largest_inputs", "export")
        for inputs in ("sparse", "dense")
    ]),
}  # fmt: skip


def fill_in(work: Path, what: str, *, one: bool) -> None:
    """Measure the variants that the record lacks, and write it after each; with `one` only the next."""
    measure, variants = VARIANTS[what]
    file, here = RECORDS / f"stream_{what}.json", machine()
    kept = json.loads(file.read_text()) if file.exists() else {"rows": [], "machine": here}
    alike = {**kept["machine"], "when": ""} == {**here, "when": ""}
    rows = kept["rows"] if alike else []  # figures of two machines do not belong in one table
    missing = [v for v in variants if not any(v.items() <= row.items() for row in rows)]
    for variant in missing[:1] if one else missing:
        rows.append({**variant, **measure(work, variant)})
        print(json.dumps(rows[-1]), flush=True)
        save({"rows": rows}, f"stream_{what}")


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


def layer_weights(shape: dict[str, int]) -> int:
    """Weights of one layer, norms left out."""
    D, N = shape["width"], shape["neurons"]
    kv = D // shape["heads"] * shape["kv"]
    return 2 * D * D + 2 * D * kv + 3 * D * N


def layer_bytes(shape: dict[str, int]) -> int:
    """Memory for one layer in 16 bits, and its MLP once more in fp32."""
    return 2 * layer_weights(shape) + 4 * 3 * shape["width"] * shape["neurons"]


class Growth:
    """What the small conversions say of larger ones, for as many tokens as `fast` reads.

    Least squares of relative errors, no coefficient below 0. Seconds: a constant, one part that grows
    with the width (logits), and for each layer one that grows with its weights and one with the width
    (tokens, of which all models see the same number). Memory: what is more of the first pass, one layer in
    16 bits and its MLP once more in fp32, which are known, and of the comparison of logits at the end,
    which needs no layer; beside both a constant and a part that grows with the width. Written in the first
    pass: the checkpoint, and the states before the first layer and behind every layer.
    """

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows = [row for row in rows if row["tokens"] == 4096]
        # Where equal densities turn out to be the better ones, the second pass is made twice.
        again = [1 + (row["kept"] == "uniform") for row in self.rows]
        self.first = self._fitted([1] * len(again), [row["seconds"]["stream"] for row in self.rows])
        self.second = self._fitted(again, [row["seconds"]["verify"] for row in self.rows])
        terms = np.array([[1, s["width"]] for s in self._shapes()])
        peaks = [row["peak_memory_after"]["stream"] for row in self.rows]
        layers = [layer_bytes(shape) for shape in self._shapes()]
        self.layer = _least(terms, [p - b for p, b in zip(peaks, layers, strict=True)])
        self.logits = _least(terms, [row["peak_memory"] for row in self.rows])
        states = [
            (row["written"]["stream"] - 1) * row["checkpoint_bytes"]
            / (row["shape"]["width"] * (row["shape"]["layers"] + 1))
            for row in self.rows
        ]  # fmt: skip
        self.states = statistics.mean(states)

    def _shapes(self) -> list[dict[str, int]]:
        return [row["shape"] for row in self.rows]

    def _fitted(self, passes: list[int], seconds: list[float]) -> Any:
        terms = [self._terms(s, n) for s, n in zip(self._shapes(), passes, strict=True)]
        return _least(np.array(terms), seconds)

    def _terms(self, shape: dict[str, int], passes: int = 1) -> list[float]:
        layers = passes * shape["layers"]
        return [1, shape["width"], layers * layer_weights(shape), layers * shape["width"]]

    def seconds(self, shape: dict[str, int]) -> tuple[float, float]:
        """First pass, second pass."""
        terms = np.array(self._terms(shape))
        return float(terms @ self.first), float(terms @ self.second)

    def peak(self, shape: dict[str, int]) -> float:
        """Bytes of memory."""
        terms = np.array([1, shape["width"]])
        return float(max(terms @ self.layer + layer_bytes(shape), terms @ self.logits))

    def written(self, shape: dict[str, int]) -> float:
        """Times the checkpoint."""
        states = self.states * shape["width"] * (shape["layers"] + 1)
        return 1 + states / checkpoint_bytes(shape)

    def read(self, shape: dict[str, int]) -> float:
        """Times the checkpoint: its headers are read again, whatever its size."""
        more = [(row["read"]["stream"] - 1) * row["checkpoint_bytes"] for row in self.rows]
        return 1 + statistics.mean(more) / checkpoint_bytes(shape)


def _least(terms: Any, wanted: list[float]) -> Any:
    found, _ = nnls(terms / np.array(wanted)[:, None], np.ones(len(wanted)))
    return found


def checkpoint_bytes(shape: dict[str, int]) -> int:
    """In 16 bits, with an output embedding of its own; norms are left out."""
    embeddings = 2 * shape["vocabulary"] * shape["width"]
    return 2 * (shape["layers"] * layer_weights(shape) + embeddings)


def table() -> str:
    """Markdown: the large run, the growth, whether one says the other, the extrapolation."""
    big = json.loads((RECORDS / "stream_large.json").read_text())
    small = json.loads((RECORDS / "stream_growth.json").read_text())
    said = Growth(small["rows"])
    return "\n\n".join(
        "\n".join(lines)
        for lines in (
            _large_rows(big), _growth_rows(small["rows"]),
            _check_rows(said, big), _real_rows(said, big, small["rows"]),
        )
    )  # fmt: skip


def _large_rows(big: dict[str, Any]) -> list[str]:
    weights, read, written = big["checkpoint_bytes"], big["read"], big["written"]
    lines = [
        "| `large` | measured |", "| --- | --- |",
        f"| checkpoint | {weights / 1e9:.1f} GB in bf16, {big['shards']} shards, "
        f"{big['shape']['layers']} layers, width {big['shape']['width']}, "
        f"{big['shape']['neurons']} neurons |",
        f"| peak resident memory | **{big['peak_memory'] / 1e9:.2f} GB** |",
        f"| read, first pass | {read['stream']:.2f}x of the checkpoint |",
        f"| written, first pass | {written['stream']:.2f}x, states between layers included |",
        f"| read for verification | {read['hash the source']:.2f}x source hashed, "
        f"{read['verify']:.2f}x second pass, {read['hash the result']:.2f}x result hashed |",
        f"| minutes on {big['threads']} threads | {big['seconds']['in all'] / 60:.0f} beside other work on "
        f"both cores; {big['seconds_alone'] / 60:.0f} for the same conversion alone |",
    ]  # fmt: skip
    if "lazy_evaluation" in big:
        lazy = big["lazy_evaluation"]
        lines.append(
            f"| `moefy eval`, weights on disk | {lazy['tokens']} tokens in {lazy['seconds']:.0f} s, "
            f"peak {lazy['peak_memory'] / 1e9:.1f} GB, nearly all of it pages of the mapped checkpoint, "
            "which the system drops when it needs them |"
        )
    return lines


def _growth_rows(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "`growth`, two threads, other work that was running held still meanwhile:", "",
        "| layers | width | neurons | tokens to partition | first pass, s | second pass, s | "
        "peak in the first, GB | peak in all, GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in sorted(rows, key=lambda r: (r["tokens"], r["shape"]["width"], r["shape"]["layers"])):
        s, twice = row["shape"], " (made twice)" if row["kept"] == "uniform" else ""
        lines.append(
            f"| {s['layers']} | {s['width']} | {s['neurons']} | {row['tokens']} | "
            f"{row['seconds']['stream']:.1f} | {row['seconds']['verify']:.1f}{twice} | "
            f"{row['peak_memory_after']['stream'] / 1e9:.2f} | {row['peak_memory'] / 1e9:.2f} |"
        )
    return lines


def _check_rows(said: Growth, big: dict[str, Any]) -> list[str]:
    shape = big["shape"]
    minutes = sum(said.seconds(shape)) / 60
    return [
        "What those small conversions, fitted (`Growth` in the script), say of `large`, and what was measured:",
        "", "| `large` | from `growth` | measured |", "| --- | --- | --- |",
        f"| peak resident memory, GB | {said.peak(shape) / 1e9:.2f} | {big['peak_memory'] / 1e9:.2f} |",
        f"| read, first pass | {said.read(shape):.2f}x | {big['read']['stream']:.2f}x |",
        f"| written, first pass | {said.written(shape):.2f}x | {big['written']['stream']:.2f}x |",
        f"| minutes, both passes | {minutes:.0f} | "
        f"{big['seconds_alone'] / 60:.0f} with hashes, alone |",
    ]  # fmt: skip


def _real_rows(said: Growth, big: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    slower = big["seconds_alone"] / sum(said.seconds(big["shape"]))
    hashed = sum(big["seconds"][f"hash the {what}"] for what in ("source", "result"))
    widest = max(row["shape"]["width"] for row in said.rows)
    alike = [row["seconds"]["verify"] for row in rows if row["shape"] == SMALL]
    lines = [
        f"**Extrapolated, not measured.** All of it rests on `growth`, widths up to {widest}, and the last column "
        f"on `large` too: alone that took {slower:.1f} times as long as `growth` says. Hours are those of both "
        "passes on two cores without 16-bit arithmetic, the second pass made once; hashes add "
        f"{1e12 / big['checkpoint_bytes'] * hashed / 3600:.1f} hours per TB (in `large`). They are rough: "
        "the second passes of the same shape above, which differ only in the tokens to partition, took "
        f"{min(alike):.0f} to {max(alike):.0f} s.",
        "",
        "| model | checkpoint, GB | read, first pass | written, first pass | peak memory, GB | hours | "
        "hours, scaled by `large` |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for name, real in REAL.items():
        hours = sum(said.seconds(real)) / 3600
        lines.append(
            f"| {name} | {checkpoint_bytes(real) / 1e9:.0f} | {said.read(real):.2f}x | "
            f"{said.written(real):.2f}x | {said.peak(real) / 1e9:.1f} | {hours:.1f} | "
            f"{slower * hours:.1f} |"
        )
    return lines


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
    parser.add_argument("--one", action="store_true", help="growth, follow: one variant, then stop")
    parser.add_argument("--keep", action="store_true", help="leave the folders where they are")
    args = parser.parse_args()
    work = Path(args.work) / args.what
    if args.what == "table":
        fill(Path("docs/streaming.md"), "streaming", table())
        fill(Path("docs/streaming.md"), "ranks", ranks_table())
        fill(Path("docs/streaming.md"), "metric", metric_table())
        fill(Path("docs/experiments.md"), "follow", follow_table())
        return
    if args.what in VARIANTS:
        fill_in(work, args.what, one=args.one)
    elif args.what == "large":
        save(large(work, LARGE), "stream_large")
    else:
        save({"metric": metric, "ranks": ranks}[args.what](work), f"stream_{args.what}")
    if not args.keep:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
