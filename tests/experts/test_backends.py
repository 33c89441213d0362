"""The kernels as backends of a SparseMlp: the same function as masked dense, whatever the layer has."""

import pytest
import torch
from tiny_conversion import convert_tiny
from tiny_models import build, example_inputs

import moefy
from moefy.experts.backends import BACKENDS
from moefy.experts.backends import gpu as kernel_backends
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps, use_backend
from moefy.methods.tables import COMPENSATIONS, ROUTERS, SELECTIONS
from moefy.models.mlp import DecidedMlp, DenseMlp, activation_function
from moefy_kernels import masked_mlp

KERNELS = ["decode", "union", "grouped"]


def layer(gated=True, activation="silu", biased=False, centred=False, neurons=48, width=24):
    g = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=g) / shape[-1] ** 0.5

    return (
        DenseMlp(
            up_ND=draw(neurons, width),
            down_ND=draw(neurons, width),
            activation=activation,
            gate_ND=draw(neurons, width) if gated else None,
            up_bias_N=draw(neurons) if biased else None,
            gate_bias_N=draw(neurons) if biased and gated else None,
            down_bias_D=draw(width) if biased else None,
            centre_N=draw(neurons) if centred else None,
        ),
        torch.randn(5, width, generator=g),
        torch.rand(5, 6, generator=g) < 0.4,
    )


def relative(got, want):
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_new", "relu", "relu2"])
def test_every_layer_as_masked_dense(name, activation):
    for gated, bare in ((True, False), (activation == "silu", True)):
        mlp, x, mask = layer(gated, activation, biased=not bare, centred=not bare)
        assert kernel_backends.fits(mlp)
        assert relative(BACKENDS[name].compute(x, mlp, mask), masked_mlp(x, mlp, mask)) < 1e-5


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("gated", [True, False])
def test_gates_that_a_router_has_computed_are_not_computed_again(name, gated):
    mlp, x, mask = layer(gated, biased=True)
    decided = DecidedMlp(mlp, activation_function("silu")(mlp.deciding(x)))
    want = masked_mlp(x, mlp, mask)
    assert kernel_backends.fits(decided)
    assert relative(BACKENDS[name].compute(x, decided, mask), want) < 1e-5
    # They are what is used: with other gates the output is another one.
    other = DecidedMlp(mlp, 2 * decided.active_TN)
    bias = mlp.down_bias_D
    assert relative(BACKENDS[name].compute(x, other, mask) - bias, 2 * (want - bias)) < 1e-5


def test_what_no_kernel_computes_is_said():
    assert not kernel_backends.fits(layer(activation="tanh")[0])
    centred = layer(centred=True)[0]
    assert not kernel_backends.fits(DecidedMlp(centred, torch.zeros(1, 48)))


@pytest.mark.parametrize("name", KERNELS)
def test_a_layer_that_no_kernel_computes_runs_masked(name):
    mlp, x, mask = layer(activation="tanh")
    module = SparseMlp(
        mlp, experts=6, shared=0, router=ROUTERS["linear"](24, 6),
        selection=SELECTIONS["topk"](k=2), compensation=COMPENSATIONS["none"](24, 6, 0),
    )  # fmt: skip
    module.backend = name
    assert torch.equal(module.compute(x, mask, mlp), masked_mlp(x, mlp, mask))
    assert module.chosen == "masked"


@pytest.mark.parametrize(
    ("name", "family"),
    [("decode", "opt"), ("union", "gpt2"), ("union", "llama"), ("grouped", "llama")],
)
def test_a_moefied_model_gives_the_same_logits(name, family, tmp_path):
    convert_tiny(family, build(family, tmp_path / "source"), tmp_path / "out")
    model = moefy.load(tmp_path / "out").eval()
    inputs = {name: value[:, :3] for name, value in example_inputs(family).items()}
    with torch.no_grad():
        use_backend(model, "masked")
        want = model(**inputs).logits
        use_backend(model, name)
        got = model(**inputs).logits
    assert {module.chosen for module in sparse_mlps(model).values()} == {name}
    assert relative(got, want) < 1e-5
