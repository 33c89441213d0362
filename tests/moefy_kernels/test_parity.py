"""What decode, union and grouped share, interpreted, against their twin in fp64; wrong results must fail."""

import pytest
import torch
from expert_cases import TF32, TOLERANCE, case, cases, error, far_apart, matrix_units, run, views
from hypothesis import given, settings
from hypothesis import strategies as st

from moefy_kernels.expert_mlp import ACTIVATIONS

TOKENS = {"decode": 4, "union": 20, "grouped": 140}
of_all_kernels = pytest.mark.parametrize("name", TOKENS)


@of_all_kernels
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_any_shape(name, data):
    c = data.draw(cases(TOKENS[name]))
    assert error(run(name, c), c.wanted) < 1e-5


@of_all_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(name, activation):
    for dtype in (torch.float32, torch.bfloat16):
        c = case(0, 3, 64, 8, 16, 3, dtype, activation)
        with matrix_units():
            got = run(name, c)
        assert error(got, c.wanted) < TOLERANCE[dtype]
        if dtype == torch.float32:  # 16 bits do not tell one GELU from the other
            others = (c.mlp._replace(activation=a) for a in ACTIVATIONS if a != activation)
            assert all(error(got, c.without(mlp=mlp).wanted) > 1e-4 for mlp in others)


@of_all_kernels
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dtypes_and_mutations(name, dtype):
    c = case(0, 5, 64, 8, 16, 3, dtype)
    limit = TOLERANCE[dtype]
    with matrix_units():
        got = run(name, c)
        swapped = run(name, c.without(expert=(c.expert + 1) % 8))
        unweighted = run(name, c.without(weight=torch.ones_like(c.weight)))
        everything = torch.arange(8, dtype=torch.int32).expand(5, -1)
        unmasked = run(name, c.without(expert=everything, weight=torch.ones(5, 8)))
    dropped = got.clone()
    dropped[-1] = 0
    assert got.dtype == dtype
    assert error(got, c.wanted) < limit
    assert error(unweighted, c.wanted) > 5 * limit
    for wrong in (torch.zeros_like(got), dropped, swapped, unmasked):
        assert error(wrong, c.wanted) > 10 * limit


@of_all_kernels
def test_views_are_read_as_they_lie(name):
    c = case(3, 6, 32, 4, 8, 2, biased=True)
    assert error(run(name, views(c), c.matrix.T.contiguous().T), c.wanted) < 1e-5


@of_all_kernels
def test_a_down_projection_of_another_dtype(name):
    c = case(4, 5, 32, 4, 8, 2, torch.float16)
    wide = c.without(mlp=c.mlp._replace(down_EFD=c.mlp.down_EFD.float()))
    got = run(name, wide)
    assert got.dtype == torch.float32
    assert error(got, wide.wanted) < 3e-3


@of_all_kernels
def test_offsets_beyond_int32(name):
    c = case(5, 2, 32, 3, 4, 2, torch.float16)
    c = c.without(expert=torch.full_like(c.expert, 2))
    matrices = ("up_EFD", "down_EFD", "gate_EFD")
    far = c.mlp._replace(**{matrix: far_apart(getattr(c.mlp, matrix)) for matrix in matrices})
    assert error(run(name, c.without(mlp=far)), c.wanted) < 3e-3


SETTINGS = {
    "set_float32_matmul_precision": lambda on: torch.set_float32_matmul_precision(
        "high" if on else "highest"
    ),
    "allow_tf32": lambda on: setattr(torch.backends.cuda.matmul, "allow_tf32", on),
    "fp32_precision": lambda on: setattr(
        torch.backends.cuda.matmul, "fp32_precision", "tf32" if on else "ieee"
    ),
}


@pytest.fixture(params=SETTINGS)
def tf32(request):
    """TF32 is on, in one of the ways that torch has."""
    SETTINGS[request.param](True)
    yield
    SETTINGS[request.param](False)


@pytest.mark.parametrize(
    ("name", "follows"), [("decode", False), ("union", True), ("grouped", True)]
)
def test_products_of_matrices_follow_torch_into_tf32(tf32, name, follows):
    c = case(6, 12, 64, 6, 16, 3)
    with matrix_units():
        found = error(run(name, c), c.wanted)
    assert 1e-4 < found < TF32 if follows else found < 1e-5
