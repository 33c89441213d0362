"""The neuron kernel, interpreted, against a mask over all neurons in fp64."""

import pytest
import torch
from expert_cases import TOLERANCE, case, error
from hypothesis import given, settings
from hypothesis import strategies as st

from moefy_kernels.expert_mlp import ACTIVATIONS
from moefy_kernels.neuron import neuron


def scored(seed, tokens, width, neurons, dtype=torch.float32, activation="silu", **options):
    """A case whose list is every neuron, and scores of which about a quarter is above 0.75."""
    c = case(seed, tokens, width, neurons, 1, neurons, dtype, activation, **options)
    score = torch.rand(tokens, neurons, generator=torch.Generator().manual_seed(seed))
    ids = torch.arange(neurons).expand(tokens, -1)
    return c.without(expert=ids, weight=(score > 0.75).float()), score


@settings(deadline=None, max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 3),
    width=st.integers(3, 70),
    neurons=st.integers(1, 150),
    gated=st.booleans(),
    biased=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_any_shape(seed, tokens, width, neurons, gated, biased, activation):
    c, score = scored(
        seed, tokens, width, neurons, activation=activation, gated=gated, biased=biased
    )
    assert error(neuron(c.x, c.mlp, score, 0.75, None, c.bias), c.wanted) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes_and_mutations(dtype):
    c, score = scored(0, 3, 64, 100, dtype)
    limit, got = TOLERANCE[dtype], neuron(c.x, c.mlp, score, 0.75)
    assert got.dtype == dtype and error(got, c.wanted) < limit
    dropped = got.clone()
    dropped[0] = 0
    for wrong in (
        torch.zeros_like(got),
        dropped,
        neuron(c.x, c.mlp, score.roll(1, 1), 0.75),
        neuron(c.x, c.mlp, score, 0.0),
    ):
        assert error(wrong, c.wanted) > 10 * limit


def test_a_cap_keeps_the_best():
    c, score = scored(1, 2, 32, 40)
    best = torch.zeros_like(score).scatter(1, score.topk(3, 1).indices, 1.0)
    assert error(neuron(c.x, c.mlp, score, 0.5, 3), c.without(weight=best).wanted) < 1e-5


def test_larger_experts_are_refused():
    c = case(2, 1, 32, 4, 8)
    with pytest.raises(ValueError, match="experts of 8"):
        neuron(c.x, c.mlp, torch.zeros(1, 4), 0.5)


def test_compiles_whole():
    c, score = scored(3, 2, 32, 20)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, s: neuron(x, c.mlp, s, 0.75), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(c.x, score), neuron(c.x, c.mlp, score, 0.75))
