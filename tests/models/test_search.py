"""The search by structure, on small models whose MLPs it must find, or must not take for one."""

from typing import Any

import pytest
import torch
import transformers
from tiny_models import random_model
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, relu, silu
from transformers import PreTrainedConfig, PreTrainedModel

from moefy.errors import UnsupportedModel
from moefy.models.families import Family
from moefy.models.locate import meta_model, read_mlp, sites
from moefy.models.search import search

D, N = 12, 20


class ToyConfig(PreTrainedConfig):
    model_type = "toy"
    num_hidden_layers = 2


class ToyModel(PreTrainedModel):
    """Layers made by `make`, in a list."""

    config_class = ToyConfig

    def __init__(self, config: ToyConfig, make: Any) -> None:
        super().__init__(config)
        self.blocks = nn.ModuleList(make() for _ in range(config.num_hidden_layers))
        self.post_init()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(D, N)
        self.b = nn.Linear(D, N)
        self.both = nn.Linear(D, 2 * N)
        self.out = nn.Linear(N, D)
        self.norm = nn.LayerNorm(D)
        self.act = nn.ReLU()


class Plain(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(relu(self.a(x)))


class Gated(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x) * silu(self.b(x)))


class GatedOtherWay(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(silu(self.a(x)) * self.b(x))


class Fused(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        g, u = self.both(x).chunk(2, dim=-1)
        return self.out(gelu(g) * u)


class Residual(Mlp):
    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return residual + self.out(gelu(self.a(x), approximate="tanh"))


class NormInside(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.out(self.act(self.a(x))))


class Scaled(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.out(relu(self.a(x)))


class GatedNormInside(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.out(silu(self.a(x)) * self.b(x)))


class UpFirst(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        u, g = self.both(x).chunk(2, dim=-1)
        return self.out(silu(g) * u)


class OtherInput(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(silu(self.a(x)) * self.b(x.flip(-2)))


class Twice(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(relu(self.a(x))) + self.out(relu(self.a(-x)))


class Affine(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x))


class UnknownActivation(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.a(x).sin())


class OwnProduct(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return linear(relu(linear(x, self.a.weight)), self.out.weight)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1)
        return self.o(weights @ self.v(x))


class Layer(nn.Module):
    def __init__(self, *mlps: type[nn.Module]) -> None:
        super().__init__()
        self.attention = Attention()
        self.ffn = nn.ModuleDict({str(i): mlp() for i, mlp in enumerate(mlps)})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(x)
        for mlp in self.ffn.values():
            x = mlp(x, x) if isinstance(mlp, Residual) else mlp(x)
        return x


def toy(*mlps: type[nn.Module], layers: int = 2) -> ToyModel:
    config = ToyConfig()
    config.num_hidden_layers = layers
    made: PreTrainedModel = random_model(lambda c: ToyModel(c, lambda: Layer(*mlps)), config)
    assert isinstance(made, ToyModel)
    return made


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Plain, {"up": "a", "gate": None, "activation": "=relu", "container": ""}),
        (Gated, {"up": "a", "gate": "b", "activation": "=silu", "container": ""}),
        (GatedOtherWay, {"up": "b", "gate": "a", "activation": "=silu", "container": ""}),
        (Fused, {"up": "both", "fused": True, "activation": "=gelu", "container": ""}),
        (
            Residual,
            {"up": "a", "activation": "=gelu_pytorch_tanh", "residual": True, "container": ""},
        ),
        (NormInside, {"up": "a", "activation": "=relu", "act": "act", "container": None}),
    ],
)
def test_mlp_is_found(kind: type[Mlp], expected: dict[str, Any]) -> None:
    model = toy(kind).double()
    (row,) = search(model)
    names = {
        key: f"ffn.0.{value}".rstrip(".") if key in ("up", "gate", "act", "container") else value
        for key, value in expected.items()
        if value is not None
    }
    assert {key: getattr(row, key) for key in names} == names
    assert all(getattr(row, key) is None for key, value in expected.items() if value is None)
    assert (row.layers, row.depth) == (("blocks.{}",), ("=2",))
    assert (row.neurons, row.width, row.down) == (f"={N}", f"={D}", "ffn.0.out")
    with torch.no_grad():
        for site in sites(model):
            mlp = read_mlp(site, model.get_parameter)
            module = model.get_submodule(f"{site.layer}.ffn.0")
            x = torch.randn(7, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
            y = module.norm(mlp(x)) if kind is NormInside else mlp(x)
            got = x + y if kind in (Residual, NormInside) else y
            want = module(x, x) if kind is Residual else module(x)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "mlps",
    [
        (Scaled,),
        (GatedNormInside,),
        (UpFirst,),
        (OtherInput,),
        (Twice,),
        (Affine,),
        (UnknownActivation,),
        (OwnProduct,),
        (Plain, Plain),
        (),
    ],
)
def test_what_is_no_mlp_is_not_taken_for_one(mlps: tuple[type[Mlp], ...]) -> None:
    with pytest.raises(UnsupportedModel, match=r"'toy' is not in the table.*down\(act\(up x\)\)"):
        search(toy(*mlps))


def test_every_layer_must_hold_the_same_mlp() -> None:
    model = toy(Plain, layers=3)
    assert search(model)[0].depth == ("=3",)
    model.blocks[1] = Layer(Gated)
    with pytest.raises(UnsupportedModel, match="not in the table"):
        search(model)


def test_lists_of_other_widths_are_rows_of_their_own() -> None:
    model = toy(Plain)
    model.more = nn.ModuleList([Layer(Gated)])
    rows = search(model)
    assert [row.layers for row in rows] == [("blocks.{}",), ("more.{}",)]
    assert [site.gated for site in sites(model)] == [False, False, True]
    assert [site.index for site in sites(model)] == [0, 1, 2]


def test_the_search_reads_no_weights_and_leaves_the_model_alone() -> None:
    model = toy(Gated)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first: list[Family] = search(model)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())
    assert not any(module._forward_hooks for module in model.modules())
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    assert search(model) == first == search(model.to("meta"))


def test_a_model_of_any_size_is_searched_without_its_weights() -> None:
    config = transformers.StableLmConfig(
        hidden_size=32768,
        intermediate_size=131072,
        num_attention_heads=256,
        num_key_value_heads=8,
        num_hidden_layers=8,
        architectures=["StableLmForCausalLM"],
    )
    found = sites(meta_model(config))
    assert [(site.neurons, site.width, site.activation) for site in found] == [
        (131072, 32768, "silu")
    ] * 8
    assert found[0].family.kind == "decoder"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (transformers.AlbertConfig(hidden_size=64, num_attention_heads=4), "1 MLPs in 12 layers"),
        (transformers.MambaConfig(hidden_size=32, num_hidden_layers=2), "no list of layers"),
        (transformers.CLIPConfig(), "several models"),
    ],
)
def test_other_models_are_refused(config: PreTrainedConfig, words: str) -> None:
    with pytest.raises(UnsupportedModel, match=words) as caught:
        sites(meta_model(config))
    assert "\n" not in str(caught.value)
    assert config.model_type in str(caught.value)
