"""Cached decode of a whole Llama-shaped model on a GPU, and how much of Amdahl's limit the experts reach.

    python experiments/gpu_decode.py OUT          # Llama-3 8B's shape, random weights; OUT/gpu_decode.json
    python experiments/gpu_decode.py OUT --tiny   # a small one, also on a CPU: a rehearsal

One token at a time with a static cache, every step one CUDA graph, decoder layers compiled in all variants.
*dense* is stock; *no MLP* has none, which bounds what any MLP could save; *moefied* runs a share of the
experts, linear router and selection included. The limit is Amdahl's: what is left of the dense MLP's time
at that density, and all of the rest.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import DEVICE, captured, timed
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.methods.tables import COMPENSATIONS, ROUTERS, SELECTIONS
from moefy.models.library import passing
from moefy.models.mlp import DenseMlp
from moefy.run.computing import machine

DENSITY = 0.25
LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 128,
}  # fmt: skip


class NoMlp(nn.Module):
    """In the place of an MLP: nothing."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.zeros_like(hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    shape = TINY if args.tiny else LLAMA_3_8B
    model = random_model(shape)
    seconds = {"dense": step(model)}
    mlps = [layer.mlp for layer in model.model.layers]
    for layer in model.model.layers:
        layer.mlp = NoMlp()
    seconds["no MLP"] = step(model)
    found = {}
    for size in (32,) if args.tiny else (32, 128):
        for layer, mlp in zip(model.model.layers, mlps, strict=True):
            layer.mlp = moefied(mlp, size)
        seconds[f"moefied, experts of {size}"] = step(model)
        found[str(size)] = sorted({m.chosen for m in sparse_mlps(model).values()})
    rest = seconds["no MLP"]
    limit = rest + DENSITY * (seconds["dense"] - rest)
    record: dict[str, Any] = {
        "kind": "GPU decode", "shape": shape, "density": DENSITY, "seconds": seconds,
        "mlp_share": 1 - rest / seconds["dense"], "chosen": found,
        "amdahl_speedup": seconds["dense"] / limit,
        "speedup": {name: seconds["dense"] / value for name, value in seconds.items()},
        "of_amdahl": {
            name: limit / value for name, value in seconds.items() if name.startswith("moefied")
        },
        "machine": machine(),
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu_decode.json").write_text(json.dumps(record, indent=1))
    print({key: record[key] for key in ("speedup", "amdahl_speedup", "of_amdahl", "chosen")})


def random_model(shape: dict[str, int]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with DEVICE:
        model = LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=1024))
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def moefied(mlp: nn.Module, size: int) -> SparseMlp:
    """The MLP in experts of neurons that follow each other; its weights are shared, not copied."""
    neurons, width = mlp.gate_proj.weight.shape
    experts = neurons // size
    router = ROUTERS["linear"](width, experts)
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=width**-0.5)
    sparse = SparseMlp(
        DenseMlp(
            gate_ND=mlp.gate_proj.weight, up_ND=mlp.up_proj.weight,
            down_ND=mlp.down_proj.weight.T.contiguous(), activation="silu",
        ),
        experts=experts, shared=0, router=router.to(DEVICE, torch.bfloat16),
        selection=SELECTIONS["topk"](k=round(DENSITY * experts)),
        compensation=COMPENSATIONS["none"](width, experts, 0),
    )  # fmt: skip
    sparse.density = DENSITY
    return sparse.requires_grad_(False)


@torch.no_grad()
def step(model: LlamaForCausalLM, samples: int = 20) -> float:
    """Median seconds of one decoded token behind 128."""
    torch._dynamo.reset()
    if DEVICE.type == "cuda":
        for layer in model.model.layers:
            layer.compile(fullgraph=True)
    cache = passing(model, StaticCache(config=model.config, max_cache_len=256))
    ids = torch.ones(1, 128, dtype=torch.long, device=DEVICE)
    model(ids, **cache)
    position = torch.tensor([128], device=DEVICE)

    def decode(_: int) -> object:
        return model(
            ids[:, :1], **cache, cache_position=position,
            position_ids=position[None],
        ).logits  # fmt: skip

    replay = captured(decode, 1)
    return statistics.median(timed(replay) for _ in range(samples))


if __name__ == "__main__":
    main()
