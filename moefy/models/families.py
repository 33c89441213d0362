"""Where the MLPs are in each type of model, as data: one row per `model_type`.

A row names modules, relative to a layer, and config keys. It knows nothing of tensors, files or
heads; `moefy.models.locate` turns a row and a model into sites. A config rule is a key (`"ffn_dim"`), a key
of a sub-config (`"text_config.hidden_size"`), a multiple (`"4*hidden_size"`), or alternatives tried
from left to right until one is set (`"n_inner|4*n_embd"`); `"=gelu"` and `"=64"` are constants.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["decoder", "encoder", "encoder-decoder", "image"]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """How one type of model holds its attention: the output projection sees the heads side by side."""

    blocks: tuple[str, ...]
    """Paths of the attention modules, `{}` for the index, matched at the end of a module path."""
    output: str
    """The projection from all heads to D, relative to the block."""
    heads: str
    """Config rule of H, the number of heads."""
    groups: str
    """Config rule of the number of heads that keys and values have."""
    head_dim: str
    """Config rule of the width of one head; where it gives nothing, it is that of the projection."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one type of model holds its MLPs. Module names are relative to the layer."""

    model_type: str
    """`model_type` of `config.json`."""
    kind: Kind
    """What the model reads and writes; decides which data it takes and how it is measured."""
    layers: tuple[str, ...]
    """Paths of the layers, `{}` for the index, matched at the end of a module path; in the order
    in which the model runs them (encoder before decoder)."""
    up: str
    """The projection from D to N whose output is not passed through the activation if there is a
    gate; the only such projection if there is none."""
    down: str
    """The projection from N to D."""
    gate: str | None = None
    """The projection from D to N whose output is passed through the activation."""
    plain_up: str | None = None
    """Takes the place of `up` where a model of this type has no gate (T5 before version 1.1)."""
    container: str | None = None
    """The module that SparseMlp replaces; None is a splice: SparseMlp in place of `up`, identities
    in place of `act` and `down`."""
    act: str | None = None
    """The activation module, for a splice."""
    activation: str
    """Config rule that gives a key of transformers' `ACT2FN`."""
    neurons: str
    """Config rule of N, the number of neurons."""
    width: str
    """Config rule of D, the width of the model."""
    depth: tuple[str, ...]
    """Config rules of the number of layers, one for each entry of `layers`."""
    refuse: tuple[str, ...] = ()
    """Config keys that, when true, make the MLP compute something else."""
    fused: bool = False
    """`up` holds one tensor: the gate rows, then the up rows."""
    transposed: bool = False
    """Weights are stored `[in, out]` (transformers' `Conv1D`)."""
    residual: bool = False
    """The container's forward takes `(hidden, residual)` and adds the residual."""
    attention: Attention | None = None
    """Where the heads are; None where that is not known."""


def config_value(config: Any, rule: str) -> Any:
    """What a rule gives for `config`, any object with attributes; None where nothing is set."""
    if rule.startswith("="):
        return int(rule[1:]) if rule[1:].isdigit() else rule[1:]
    for alternative in rule.split("|"):
        factor, _, path = alternative.rpartition("*")
        value = config
        for key in path.split("."):
            value = getattr(value, key, None)
        if value is not None:
            return value * int(factor) if factor else value
    return None


def _attention(*blocks: str, output: str, config: str = "", **rules: str) -> Attention:
    """Rules as most configs have them; `config` is the sub-config they are keys of."""
    heads = rules.get("heads", f"{config}num_attention_heads")
    return Attention(
        blocks=blocks,
        output=output,
        heads=heads,
        groups=f"{config}num_key_value_heads|{heads}",
        head_dim=rules.get("head_dim", f"{config}head_dim"),
    )


def _llama_like(model_type: str, activation: str = "hidden_act") -> Family:
    return Family(
        model_type=model_type,
        kind="decoder",
        layers=("layers.{}",),
        gate="mlp.gate_proj",
        up="mlp.up_proj",
        down="mlp.down_proj",
        container="mlp",
        activation=activation,
        neurons="intermediate_size",
        width="hidden_size",
        depth=("num_hidden_layers",),
        attention=_attention("layers.{}.self_attn", output="o_proj"),
    )


def _bert_like(model_type: str) -> Family:
    return Family(
        model_type=model_type,
        kind="encoder",
        layers=("encoder.layer.{}",),
        up="intermediate.dense",
        down="output.dense",
        act="intermediate.intermediate_act_fn",
        activation="hidden_act",
        neurons="intermediate_size",
        width="hidden_size",
        depth=("num_hidden_layers",),
        attention=_attention("encoder.layer.{}.attention", output="output.dense"),
    )


def _table(rows: Iterable[Family]) -> dict[str, Family]:
    return {row.model_type: row for row in rows}


FAMILIES: dict[str, Family] = _table(
    [
        _llama_like("llama"),
        _llama_like("mistral"),
        _llama_like("qwen2"),
        _llama_like("qwen3"),
        _llama_like("gemma"),
        _llama_like("gemma2", "hidden_activation"),
        _llama_like("gemma3_text", "hidden_activation"),
        _llama_like("olmo2"),
        _llama_like("smollm3"),
        Family(
            model_type="gemma3",
            kind="decoder",
            layers=("language_model.layers.{}",),
            gate="mlp.gate_proj",
            up="mlp.up_proj",
            down="mlp.down_proj",
            container="mlp",
            activation="text_config.hidden_activation",
            neurons="text_config.intermediate_size",
            width="text_config.hidden_size",
            depth=("text_config.num_hidden_layers",),
            attention=_attention(
                "language_model.layers.{}.self_attn", output="o_proj", config="text_config."
            ),
        ),
        Family(
            model_type="phi3",
            kind="decoder",
            layers=("layers.{}",),
            up="mlp.gate_up_proj",
            down="mlp.down_proj",
            container="mlp",
            activation="hidden_act",
            neurons="intermediate_size",
            width="hidden_size",
            depth=("num_hidden_layers",),
            fused=True,
            attention=_attention("layers.{}.self_attn", output="o_proj"),
        ),
        Family(
            model_type="gpt2",
            kind="decoder",
            layers=("h.{}",),
            up="mlp.c_fc",
            down="mlp.c_proj",
            container="mlp",
            activation="activation_function",
            neurons="n_inner|4*n_embd",
            width="n_embd",
            depth=("n_layer",),
            transposed=True,
            attention=_attention("h.{}.attn", output="c_proj", heads="n_head"),
        ),
        Family(
            model_type="gpt_neox",
            kind="decoder",
            layers=("layers.{}",),
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
            container="mlp",
            activation="hidden_act",
            neurons="intermediate_size",
            width="hidden_size",
            depth=("num_hidden_layers",),
            attention=_attention("layers.{}.attention", output="dense"),
        ),
        Family(
            model_type="opt",
            kind="decoder",
            layers=("decoder.layers.{}",),
            up="fc1",
            down="fc2",
            act="activation_fn",
            activation="activation_function",
            neurons="ffn_dim",
            width="hidden_size",
            depth=("num_hidden_layers",),
            attention=_attention("decoder.layers.{}.self_attn", output="out_proj"),
        ),
        Family(
            model_type="bloom",
            kind="decoder",
            layers=("h.{}",),
            up="mlp.dense_h_to_4h",
            down="mlp.dense_4h_to_h",
            container="mlp",
            # BloomGelu: the tanh approximation in the same order of operations as `gelu_fast`.
            activation="=gelu_fast",
            neurons="4*hidden_size",
            width="hidden_size",
            depth=("n_layer",),
            refuse=("slow_but_exact",),
            residual=True,
            attention=_attention("h.{}.self_attention", output="dense", heads="n_head"),
        ),
        Family(
            model_type="t5",
            kind="encoder-decoder",
            layers=("encoder.block.{}.layer.1", "decoder.block.{}.layer.2"),
            gate="DenseReluDense.wi_0",
            up="DenseReluDense.wi_1",
            plain_up="DenseReluDense.wi",
            down="DenseReluDense.wo",
            container="DenseReluDense",
            activation="dense_act_fn",
            neurons="d_ff",
            width="d_model",
            depth=("num_layers", "num_decoder_layers|num_layers"),
            attention=_attention(
                "encoder.block.{}.layer.0.SelfAttention",
                "decoder.block.{}.layer.0.SelfAttention",
                "decoder.block.{}.layer.1.EncDecAttention",
                output="o",
                heads="num_heads",
                head_dim="d_kv",
            ),
        ),
        _bert_like("bert"),
        _bert_like("roberta"),
        Family(
            model_type="distilbert",
            kind="encoder",
            layers=("transformer.layer.{}",),
            up="ffn.lin1",
            down="ffn.lin2",
            container="ffn",
            activation="activation",
            neurons="hidden_dim",
            width="dim",
            depth=("n_layers",),
            attention=_attention(
                "transformer.layer.{}.attention", output="out_lin", heads="n_heads"
            ),
        ),
        Family(
            model_type="vit",
            kind="image",
            layers=("layers.{}",),
            up="mlp.fc1",
            down="mlp.fc2",
            container="mlp",
            activation="hidden_act",
            neurons="intermediate_size",
            width="hidden_size",
            depth=("num_hidden_layers",),
            attention=_attention("layers.{}.attention", output="o_proj"),
        ),
    ]
)
