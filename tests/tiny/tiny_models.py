"""Tiny real transformers models of every family, with random weights, saved as checkpoints.

    path = build("llama", tmp_path / "llama")
    model = FAMILIES_TINY["llama"].auto.from_pretrained(path)
    model(**example_inputs("llama"))

Every model has 2 layers (an encoder-decoder 2 and 2) of N = 64 neurons. Weights are drawn so large
that each MLP moves the output: a wrong neuron order is seen in the logits.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

NEURONS = 64
VOCAB = 96
LAYERS = 2


@dataclass(frozen=True)
class Tiny:
    """One tiny model: classes of transformers by name, and what differs from the config's defaults."""

    family: str
    config: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def auto(self) -> Any:
        """The class the checkpoint is loaded with."""
        return getattr(transformers, self.model)

    def make_config(self) -> Any:
        return getattr(transformers, self.config)(**self.settings)


_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": NEURONS,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": NEURONS,
    "num_layers": LAYERS,
    "num_heads": 4,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def _decoder(family: str, config: str, model: str, **settings: Any) -> Tiny:
    return Tiny(family, config, model, _DECODER | settings)


FAMILIES_TINY: dict[str, Tiny] = {
    "llama": _decoder("llama", "LlamaConfig", "LlamaForCausalLM"),
    "llama_mlp_bias": _decoder("llama", "LlamaConfig", "LlamaForCausalLM", mlp_bias=True),
    "llama_tied": _decoder("llama", "LlamaConfig", "LlamaForCausalLM", tie_word_embeddings=True),
    "mistral": _decoder("mistral", "MistralConfig", "MistralForCausalLM"),
    "qwen2": _decoder("qwen2", "Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": _decoder("qwen3", "Qwen3Config", "Qwen3ForCausalLM"),
    "gemma": _decoder("gemma", "GemmaConfig", "GemmaForCausalLM"),
    "gemma2": _decoder("gemma2", "Gemma2Config", "Gemma2ForCausalLM"),
    "gemma3_text": _decoder("gemma3_text", "Gemma3TextConfig", "Gemma3ForCausalLM"),
    "gemma3": Tiny(
        "gemma3",
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _DECODER,
            "vision_config": _VISION,
            "mm_tokens_per_image": 4,
            "image_token_index": 90,
            "boi_token_index": 91,
            "eoi_token_index": 92,
        },
    ),
    "phi3": _decoder("phi3", "Phi3Config", "Phi3ForCausalLM"),
    "olmo2": _decoder("olmo2", "Olmo2Config", "Olmo2ForCausalLM"),
    "smollm3": _decoder("smollm3", "SmolLM3Config", "SmolLM3ForCausalLM"),
    "gpt2": Tiny(
        "gpt2",
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCAB,
            "n_embd": NEURONS // 4,
            "n_layer": LAYERS,
            "n_head": 2,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": Tiny(
        "gpt_neox",
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        _ENCODER | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "opt": Tiny(
        "opt",
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "ffn_dim": NEURONS,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "bloom": Tiny(
        "bloom",
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": NEURONS // 4, "n_layer": LAYERS, "n_head": 2},
    ),
    "t5": Tiny("t5", "T5Config", "T5ForConditionalGeneration", _T5),
    "t5_gated": Tiny(
        "t5",
        "T5Config",
        "T5ForConditionalGeneration",
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "bert": Tiny("bert", "BertConfig", "BertForMaskedLM", _ENCODER),
    "bert_base": Tiny("bert", "BertConfig", "BertModel", _ENCODER),
    "roberta": Tiny("roberta", "RobertaConfig", "RobertaForMaskedLM", _ENCODER),
    "distilbert": Tiny(
        "distilbert",
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {
            "vocab_size": VOCAB,
            "dim": 32,
            "hidden_dim": NEURONS,
            "n_layers": LAYERS,
            "n_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "vit": Tiny(
        "vit",
        "ViTConfig",
        "ViTForImageClassification",
        _VISION | {"intermediate_size": NEURONS, "num_hidden_layers": LAYERS, "num_labels": 10},
    ),
}

SEARCHED_TINY: dict[str, Tiny] = {
    "stablelm": _decoder("stablelm", "StableLmConfig", "StableLmForCausalLM"),
    "glm": _decoder("glm", "GlmConfig", "GlmForCausalLM"),
    "starcoder2": _decoder("starcoder2", "Starcoder2Config", "Starcoder2ForCausalLM"),
    "arcee": _decoder("arcee", "ArceeConfig", "ArceeForCausalLM"),
    "gptj": Tiny(
        "gptj",
        "GPTJConfig",
        "GPTJForCausalLM",
        {
            "vocab_size": VOCAB,
            "n_embd": 32,
            "n_inner": NEURONS,
            "n_layer": LAYERS,
            "n_head": 4,
            "rotary_dim": 4,
            "n_positions": 64,
        },
    ),
    "gpt_neo": Tiny(
        "gpt_neo",
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": NEURONS,
            "num_layers": LAYERS,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
    ),
    "mpt": Tiny(
        "mpt",
        "MptConfig",
        "MptForCausalLM",
        {"vocab_size": VOCAB, "d_model": NEURONS // 4, "n_layers": LAYERS, "n_heads": 2},
    ),
    "falcon": Tiny(
        "falcon",
        "FalconConfig",
        "FalconForCausalLM",
        _ENCODER | {"hidden_size": NEURONS // 4, "ffn_hidden_size": NEURONS, "bias": True},
    ),
    "electra": Tiny("electra", "ElectraConfig", "ElectraForMaskedLM", _ENCODER),
    "bart": Tiny(
        "bart",
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "encoder_layers": LAYERS,
            "decoder_layers": LAYERS,
            "encoder_ffn_dim": NEURONS,
            "decoder_ffn_dim": NEURONS,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
    "mt5": Tiny("mt5", "MT5Config", "MT5ForConditionalGeneration", _T5),
}
"""Types that have no row in the table of families and are found by structure."""


def build(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save the tiny model `name` to `folder` (made if absent); the same weights every time."""
    tiny = tiny_model(name)
    model = random_model(tiny.auto, tiny.make_config())
    model.to(dtype).save_pretrained(folder)
    return folder


def tiny_model(name: str) -> Tiny:
    """The entry `name` of either table."""
    return (FAMILIES_TINY | SEARCHED_TINY)[name]


def random_model(kind: Any, config: Any) -> PreTrainedModel:
    """A model of class `kind` with seeded weights of unit gain, biases and norms away from 0 and 1."""
    with torch.random.fork_rng():
        model: PreTrainedModel = kind(config).eval()
    generator = torch.Generator().manual_seed(0)
    done: set[int] = set()
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in done:
                    done.add(id(parameter))
                    _draw(module, parameter, generator)
    return model


def example_inputs(name: str) -> dict[str, Tensor]:
    """Inputs of the tiny model `name`: two texts of 12 and 8 tokens padded on the right, or two
    images."""
    generator = torch.Generator().manual_seed(1)
    family = tiny_model(name).family
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 90, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    inputs = {"input_ids": ids * mask, "attention_mask": mask}
    if family in ("t5", "mt5", "bart"):
        inputs["decoder_input_ids"] = torch.randint(3, 90, (2, 7), generator=generator)
    return inputs


def _draw(module: nn.Module, parameter: Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim < 2:
        parameter.add_(0.2 * noise)
        return
    inputs = parameter.shape[0] if isinstance(module, Conv1D) else parameter[0].numel()
    parameter.copy_(noise / inputs**0.5 if not isinstance(module, nn.Embedding) else noise / 2)
