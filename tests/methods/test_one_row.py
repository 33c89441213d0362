"""A router with settings, a partition and a backend from a module of one's own: one definition and one row each."""

import sys
import types

import pytest
import torch
from tiny_conversion import RECIPE, convert_tiny
from tiny_models import build, example_inputs

import moefy
from moefy.errors import RecipeError
from moefy.experts.backends import BACKENDS, fastest
from moefy.experts.moefied import of
from moefy.experts.sparse_mlp import use_backend
from moefy.methods.partition import METHODS
from moefy.methods.tables import ROUTERS, listing
from moefy.models.artefact import read_artefact

SOURCE = '''
import math
from dataclasses import dataclass

import torch

from moefy.experts.backends.base import Backend
from moefy.methods.base import Router
from moefy.methods.partition import Method
from moefy_kernels import masked_mlp

calls = []


class Powers(Router):
    """Powers: scores of a projection, to a power."""

    trainable = False

    @dataclass(frozen=True, kw_only=True)
    class Settings(Router.Settings):
        """What a recipe may set."""

        power: int
        offset: float = 0.5

    def __init__(self, width, experts, power, offset):
        super().__init__()
        self.power, self.offset = power, offset
        self.register_buffer("weight", torch.linspace(-1, 1, width * experts).view(experts, width))

    def forward(self, x_TD, mlp):
        """Scores."""
        return (x_TD.float() @ self.weight.T) ** self.power + self.offset


def combed(mlp, x_TD, num_experts, seed):
    """Combed: neurons dealt out like cards."""
    assert len(x_TD)
    return torch.arange(mlp.neurons) % num_experts


def counted(x_TD, weights, mask_TE):
    calls.append(len(x_TD))
    return masked_mlp(x_TD, weights, mask_TE)


METHOD = Method(combed, reads_tokens=True)
BACKEND = Backend(
    compute=counted,
    seconds=lambda work: 0.0,
    serves=lambda request: "single tokens only" if len(request.x_TD) > 1 else None,
    devices=frozenset({"cpu"}),
    instead="views",
)
'''


@pytest.fixture
def mine(monkeypatch):
    module = types.ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    exec(SOURCE, vars(module))
    monkeypatch.setitem(ROUTERS, "powers", module.Powers)
    monkeypatch.setitem(METHODS, "combed", module.METHOD)
    monkeypatch.setitem(BACKENDS, "counted", module.BACKEND)
    fastest.cache_clear()
    yield module
    fastest.cache_clear()


@pytest.fixture
def folder(mine, tmp_path):
    settings = {
        "router.name": "powers", "router.settings.power": "3", "partition.method": "combed",
        "compensation.name": "none",
    }  # fmt: skip
    convert_tiny("llama", build("llama", tmp_path / "in"), tmp_path / "out", settings=settings)
    return tmp_path / "out"


def test_all_three_are_used_by_a_conversion(mine, folder):
    artefact = read_artefact(folder)
    assert artefact.recipe["router"]["settings"] == {"power": 3}
    entry = artefact.layers[0]
    assert entry.router["settings"] == {"power": 3, "offset": 0.5}
    model = moefy.load(folder)
    module = of(model).mlps[0]
    assert isinstance(module.router, mine.Powers)
    assert (module.router.power, module.router.offset) == (3, 0.5)
    inputs = example_inputs("llama")
    with torch.no_grad():
        use_backend(model, "masked")
        want = model(**inputs).logits
        use_backend(model, "counted")
        assert torch.allclose(model(**inputs).logits, want, atol=1e-5)
        assert module.chosen == "views" and not mine.calls
        for name in ("counted", "auto"):
            use_backend(model, name)
            model(input_ids=inputs["input_ids"][:1, :1])
            assert module.chosen == "counted"
    assert mine.calls == [1] * 2 * len(of(model).mlps)


def test_they_are_listed(mine):
    tables = listing()
    assert tables["routers"]["powers"] == "Powers: scores of a projection, to a power."
    assert tables["methods"]["combed"] == "Combed: neurons dealt out like cards."


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"router.settings.powre": "3"}, "did you mean 'power'"),
        ({"router.settings.power": "much"}, "router.power: got 'much', expected int"),
        ({"router.settings.power": "true"}, "router.power: got True, expected int"),
        ({}, "router.power is missing"),
    ],
)
def test_settings_are_strict(mine, tmp_path, settings, message):
    source = build("llama", tmp_path / "in")
    with pytest.raises(RecipeError, match=message):
        convert_tiny(
            "llama", source, tmp_path / "out", settings={"router.name": "powers", **settings}
        )


def test_a_recipe_without_settings_of_its_own_is_written_as_before():
    assert "settings" not in moefy.recipe.to_dict(RECIPE)["router"]
