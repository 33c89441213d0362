"""Every operation of moefy_kernels against a naive fp64 loop; wrong results must fail."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefy.models.mlp import DenseMlp
from moefy_kernels import expert_views_mlp, masked_mlp

OPERATIONS = {"masked": masked_mlp, "views": expert_views_mlp}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def make(seed, tokens, width, experts, size, dtype, gated=True, biased=False):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(dtype)

    neurons = experts * size
    mlp = DenseMlp(
        up_ND=draw(neurons, width),
        down_ND=draw(neurons, width),
        gate_ND=draw(neurons, width) if gated else None,
        up_bias_N=draw(neurons) if biased else None,
        gate_bias_N=draw(neurons) if biased and gated else None,
        down_bias_D=draw(width) if biased else None,
        activation="silu" if gated else "relu",
    )
    x = torch.randn(tokens, width, generator=g).to(dtype)
    mask = torch.rand(tokens, experts, generator=g) < 0.4
    return mlp, x, mask


def naive(mlp, x, mask):
    """One token and one expert at a time, in fp64."""
    mlp, x = mlp.to(torch.float64), x.double()
    size = mlp.neurons // mask.shape[1]
    y = torch.zeros(len(x), mlp.width, dtype=torch.float64)
    for t in range(len(x)):
        for e in mask[t].nonzero()[:, 0].tolist():
            expert = mlp.take(torch.arange(e * size, (e + 1) * size))
            y[t] += expert.hidden(x[t : t + 1])[0] @ expert.down_ND
    return y if mlp.down_bias_D is None else y + mlp.down_bias_D


def error(got, want):
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("name", OPERATIONS)
@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    tokens=st.integers(1, 9),
    width=st.integers(3, 33),
    experts=st.integers(1, 9),
    size=st.integers(1, 7),
    gated=st.booleans(),
    biased=st.booleans(),
)
def test_any_shape(name, seed, tokens, width, experts, size, gated, biased):
    mlp, x, mask = make(seed, tokens, width, experts, size, torch.float64, gated, biased)
    assert error(OPERATIONS[name](x, mlp, mask), naive(mlp, x, mask)) < 1e-12


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [1, 5])
def test_dtypes_and_mutations(name, dtype, tokens):
    mlp, x, mask = make(0, tokens, 64, 8, 16, dtype)
    mask[:, 0], mask[:, 1] = True, False
    want, limit = naive(mlp, x, mask), TOLERANCE[dtype]
    got = OPERATIONS[name](x, mlp, mask)
    assert got.dtype == dtype
    assert error(got, want) < limit
    assert error(torch.zeros_like(got), want) > 10 * limit
    swapped = mask[:, [1, 0, *range(2, 8)]]
    assert error(OPERATIONS[name](x, mlp, swapped), want) > 10 * limit
    dropped = got.clone()
    dropped[-1] = 0
    assert error(dropped, want) > 10 * limit


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("tokens", [1, 6])
def test_no_expert_one_expert_and_all(name, tokens):
    mlp, x, mask = make(1, tokens, 16, 4, 8, torch.float64, biased=True)
    run = OPERATIONS[name]
    assert torch.equal(run(x, mlp, mask & False), mlp.down_bias_D.expand(tokens, -1))
    assert error(run(x, mlp, mask | True), mlp(x)) < 1e-12
    one = torch.zeros_like(mask)
    one[:, 2] = True
    assert error(run(x, mlp, one), naive(mlp, x, one)) < 1e-12


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_down_projection_of_another_dtype(name):
    mlp, x, mask = make(2, 4, 16, 4, 8, torch.float16)
    wide = DenseMlp(**{**vars(mlp), "down_ND": mlp.down_ND.float()})
    got = OPERATIONS[name](x, wide, mask)
    assert got.dtype == torch.float32
    assert error(got, naive(wide, x, mask)) < 4e-3


def test_views_never_copy_a_weight():
    mlp, x, _ = make(3, 1, 256, 16, 64, torch.float32)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, ::2] = True
    with torch.profiler.profile(profile_memory=True) as profile:
        expert_views_mlp(x, mlp, mask)
    largest = max((e.cpu_memory_usage for e in profile.events()), default=0)
    assert largest < 64 * 256 * 4  # one expert's rows of one matrix
