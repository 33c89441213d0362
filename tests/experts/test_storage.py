"""Nobody but `moefy.experts` and the kernels counts on how a SparseMlp stores its weights."""

import ast
from pathlib import Path

import pytest
import torch
from torch import nn

from moefy.models.families import Family
from moefy.models.locate import Site, permute, read_mlp

ROOT = Path(__file__).parents[2]
STORED = {"up_ND", "gate_ND", "down_ND"}


def reaches_in(tree):
    """Matrices taken of a module, or of its `weights` on the way past."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in STORED:
            of = node.value
            if isinstance(of, ast.Attribute) and of.attr == "weights":
                yield ast.unparse(node)
            if isinstance(of, ast.Name) and of.id in ("module", "sparse"):
                yield ast.unparse(node)
        if isinstance(node, ast.Constant) and node.value in STORED:
            yield node.value


def test_matrices_of_a_module_are_not_reached_for():
    allowed = ("experts", "models", "methods")  # the last two know of DenseMlp alone
    for file in (ROOT / "moefy").rglob("*.py"):
        if file.relative_to(ROOT / "moefy").parts[0] not in allowed:
            assert list(reaches_in(ast.parse(file.read_text()))) == [], file


@pytest.mark.parametrize(
    "text", ["module.up_ND.T", "x = module.weights.down_ND", "getattr(m, 'gate_ND')"]
)
def test_the_rule_sees_what_it_forbids(text):
    assert list(reaches_in(ast.parse(text)))


class Mixture(nn.Module):
    """Experts that lie in one tensor, as transformers' mixtures have them."""

    def __init__(self, experts, neurons, width):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * neurons, width))
        self.down = nn.Parameter(torch.randn(experts, width, neurons))


def test_a_site_may_be_an_mlp_inside_an_expert_of_a_mixture():
    E, N, D = 3, 8, 5
    model = nn.ModuleDict({"layer": Mixture(E, N, D)})
    family = Family(
        model_type="made-up", kind="decoder", layers=("layer",), up="gate_up", down="down",
        activation="=silu", neurons=f"={N}", width=f"={D}", depth=("=1",), fused=True,
    )  # fmt: skip
    site = Site(
        index=0, layer="layer", family=family, neurons=N, width=D, activation="silu", gated=True,
        biases=frozenset(), expert=1,
    )  # fmt: skip
    assert site.parameters == ("layer.gate_up", "layer.down")
    mlp, x = read_mlp(site, model.get_parameter), torch.randn(4, D)
    gate, up = (x @ model["layer"].gate_up[1].T).chunk(2, dim=-1)
    want = (nn.functional.silu(gate) * up) @ model["layer"].down[1].T
    torch.testing.assert_close(mlp(x), want)
    # Its neurons in another order are the same function; the other experts stay as they are.
    order = torch.randperm(N)
    for name in site.parameters:
        before = model.get_parameter(name).detach()
        after = permute(site, name, before, order)
        assert not torch.equal(after[1], before[1])
        assert torch.equal(after[[0, 2]], before[[0, 2]])
        model.get_parameter(name).data = after
    torch.testing.assert_close(read_mlp(site, model.get_parameter)(x), want)
