"""`experts_implementation="moefy"`: stock mixtures of experts give what eager gives, forward and backward."""

import copy
import logging

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from moefy.experts.backends import stock_moe as experts_interface

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=5, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=12, head_dim=16
    ),
}


@pytest.fixture(autouse=True)
def _registered():
    experts_interface.register_experts()


def pair(name):
    """The same model twice: computed by eager, and by moefy's kernels."""
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(CONFIGS[name], experts_implementation="eager")
    ours = AutoModelForCausalLM.from_config(CONFIGS[name], experts_implementation="moefy")
    with torch.no_grad():
        for parameter in eager.parameters():  # 3D weights are not always drawn
            parameter.normal_(0, 0.3)
    ours.load_state_dict(eager.state_dict())
    return eager, ours


def relative(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("tokens", [1, 3, 20, 70])
def test_the_logits_of_eager(name, tokens):
    eager, ours = pair(name)
    ids = torch.randint(64, (1, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = eager(ids).logits
        assert relative(ours(ids).logits, want) < 1e-5
        first = next(m for m in ours.modules() if hasattr(m, "gate_up_proj"))
        first.down_proj.data = first.down_proj.flip(0)
        assert relative(ours(ids).logits, want) > 1e-3  # swapped experts are seen


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradients_of_eager(name):
    eager, ours = pair(name)
    ids = torch.randint(64, (1, 8), generator=torch.Generator().manual_seed(2))
    for model in (eager, ours):
        model(ids, labels=ids).loss.backward()
    wanted = dict(eager.named_parameters())
    seen = 0
    for key, parameter in ours.named_parameters():
        assert relative(parameter.grad, wanted[key].grad) < 1e-4, key
        seen += "experts" in key or "gate" in key
    assert seen >= 4


@pytest.mark.parametrize("tokens", [3, 20, 70])
def test_ids_beyond_the_experts_are_none(tokens):
    eager, ours = pair("mixtral")
    modules = [
        next(m for m in model.modules() if hasattr(m, "gate_up_proj")) for model in (eager, ours)
    ]
    g = torch.Generator().manual_seed(3)
    x, weight = torch.randn(tokens, 32, generator=g), torch.rand(tokens, 3, generator=g)
    ids = torch.randint(6, (tokens, 3), generator=g)  # 5 is no expert; some come twice
    ids[1] = 5
    weight = weight * (ids < 5)
    got = []
    for module in modules:
        module._is_expert_parallel = True
        inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = module(inputs[0], ids, inputs[1])
        y.square().sum().backward()
        # What a weight of no expert would change is nothing, in both.
        got.append((y.detach(), inputs[0].grad, inputs[1].grad * (ids < 5)))
    for ours_, eager_ in zip(got[1], got[0], strict=True):
        assert relative(ours_, eager_) < 1e-5
    assert torch.equal(got[1][0][1], torch.zeros(32))
    with torch.no_grad():
        assert relative(modules[1](x, ids, weight), got[0][0]) < 1e-5


def test_it_is_not_saved(tmp_path):
    _, ours = pair("mixtral")
    ours.save_pretrained(tmp_path)
    assert "moefy" not in (tmp_path / "config.json").read_text()
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="moefy")
    assert again.config._experts_implementation == "moefy"


def test_what_no_kernel_computes_is_left_to_transformers(caplog):
    config = GptOssConfig(
        **SIZES, num_local_experts=4, num_experts_per_tok=2, head_dim=16,
        layer_types=["full_attention"] * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    eager = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    ours = copy.deepcopy(eager)
    ours.set_experts_implementation("moefy")
    ids = torch.arange(6)[None]
    experts_interface._say_once.cache_clear()
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert relative(ours(ids).logits, eager(ids).logits) < 1e-5
    assert [r.message for r in caplog.records if "gate of its own" in r.message] == [
        "GptOssExperts has a gate of its own, which moefy's kernels do not compute; transformers' own do"
    ]
