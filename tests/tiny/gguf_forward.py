"""What a GGUF file computes, written out: llama.cpp's architectures in a few loops.

Independent of moefy and of transformers: tensors by their names in the file, rotary positions,
YaRN and routing as llama.cpp's `ggml_rope_ext` and `build_moe_ffn` have them.

Shapes: T tokens, D width, V vocabulary, H heads, S their size.
"""

import math
from pathlib import Path
from typing import Any

import torch
from gguf_reading import read, values
from torch import Tensor
from torch.nn.functional import silu


def logits(file: Path, ids: list[int]) -> Tensor:
    """`[T, V]` for one document."""
    keys, stored = read(file)
    kind = keys["general.architecture"]
    size = {k.removeprefix(f"{kind}."): v for k, v in keys.items() if k.startswith(f"{kind}.")}
    held = {name: values(tensor) for name, tensor in stored.items()}
    x_TD = held["token_embd.weight"][ids]
    for layer in range(size["block_count"]):
        own = {
            name.removeprefix(f"blk.{layer}."): value
            for name, value in held.items()
            if name.startswith(f"blk.{layer}.")
        }
        x_TD = x_TD + attention(kind, size, own, held, normed(size, x_TD, own["attn_norm.weight"]))
        x_TD = x_TD + feed_forward(kind, size, own, normed(size, x_TD, own["ffn_norm.weight"]))
    x_TD = normed(size, x_TD, held["output_norm.weight"])
    return x_TD @ held.get("output.weight", held["token_embd.weight"]).T


def normed(size: dict[str, Any], x: Tensor, weight: Tensor) -> Tensor:
    square = x.pow(2).mean(-1, keepdim=True) + size["attention.layer_norm_rms_epsilon"]
    return x * square.rsqrt() * weight


def attention(
    kind: str, size: dict[str, Any], own: dict[str, Tensor], held: dict[str, Tensor], x_TD: Tensor
) -> Tensor:
    heads, groups = size["attention.head_count"], size["attention.head_count_kv"]
    parts = {}
    for name, count in (("q", heads), ("k", groups), ("v", groups)):
        y = x_TD @ own[f"attn_{name}.weight"].T + own.get(f"attn_{name}.bias", 0.0)
        parts[name] = y.view(len(x_TD), count, -1)
        if f"attn_{name}_norm.weight" in own:
            parts[name] = normed(size, parts[name], own[f"attn_{name}_norm.weight"])
    angle_TS, scale = angles(size, len(x_TD), held.get("rope_freqs.weight"))
    q, k = (turned(kind, parts[name], angle_TS) * scale for name in ("q", "k"))
    y = torch.zeros(len(x_TD), heads, parts["v"].shape[-1])
    for head in range(heads):
        group = head // (heads // groups)
        score_TT = q[:, head] @ k[:, group].T / math.sqrt(q.shape[-1])
        score_TT += torch.full_like(score_TT, -math.inf).triu(1)
        y[:, head] = score_TT.softmax(-1) @ parts["v"][:, group]
    return y.flatten(1) @ own["attn_output.weight"].T + own.get("attn_output.bias", 0.0)


def angles(size: dict[str, Any], tokens: int, factors: Tensor | None) -> tuple[Tensor, float]:
    """Angle of every token and pair `[T, S / 2]`, and by what turned vectors are multiplied."""
    dims, base = size["rope.dimension_count"], size["rope.freq_base"]
    scaling, factor = size["rope.scaling.type"], size.get("rope.scaling.factor", 1.0)
    found, scale = [], 1.0
    for i in range(dims // 2):
        frequency = base ** (-2 * i / dims) / (1.0 if factors is None else float(factors[i]))
        if scaling == "linear":
            frequency /= factor
        if scaling == "yarn":
            old = size["rope.scaling.original_context_length"]
            low, high = (
                dims * math.log(old / (beta * 2 * math.pi)) / (2 * math.log(base))
                for beta in (32.0, 1.0)
            )
            low, high = max(0, math.floor(low)), min(dims - 1, math.ceil(high))
            kept = 1 - min(1.0, max(0.0, (i - low) / max(0.001, high - low)))
            frequency = frequency / factor * (1 - kept) + frequency * kept
            scale = 1 + 0.1 * math.log(factor)
        found.append(frequency)
    return torch.arange(tokens)[:, None] * torch.tensor(found, dtype=torch.float64), scale


def turned(kind: str, x_THS: Tensor, angle_TS: Tensor) -> Tensor:
    half = x_THS.shape[-1] // 2
    out = torch.empty_like(x_THS)
    for i in range(half):
        first, second = (2 * i, 2 * i + 1) if kind == "llama" else (i, i + half)
        cos, sin = (f(angle_TS[:, i]).float()[:, None] for f in (torch.cos, torch.sin))
        out[..., first] = x_THS[..., first] * cos - x_THS[..., second] * sin
        out[..., second] = x_THS[..., first] * sin + x_THS[..., second] * cos
    return out


def feed_forward(kind: str, size: dict[str, Any], own: dict[str, Tensor], x_TD: Tensor) -> Tensor:
    if "ffn_gate_inp.weight" not in own:
        return mlp(own, "", x_TD)
    prob_TE = (x_TD @ own["ffn_gate_inp.weight"].T).softmax(-1)
    y_TD = torch.zeros_like(x_TD)
    for token, prob_E in enumerate(prob_TE):
        weights, chosen = prob_E.topk(size["expert_used_count"])
        if kind != "qwen2moe":
            weights = weights / weights.sum()
        for weight, expert in zip(weights, chosen.tolist(), strict=True):
            part = {name: value[expert] for name, value in own.items() if "_exps." in name}
            y_TD[token] += weight * mlp(part, "_exps", x_TD[token])
    if kind == "qwen2moe":
        gate_T = x_TD @ own["ffn_gate_inp_shexp.weight"]
        y_TD = y_TD + (silu(gate_T) / gate_T)[:, None] * mlp(own, "_shexp", x_TD)
    return y_TD


def mlp(own: dict[str, Tensor], kind: str, x: Tensor) -> Tensor:
    gate, up, down = (own[f"ffn_{role}{kind}.weight"] for role in ("gate", "up", "down"))
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T
