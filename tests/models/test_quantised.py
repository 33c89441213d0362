"""Codes, scales and offsets: what they stand for, how far they are from the weights, what a file keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefy.models.quantised import GROUP, Quantised, quantise

MATRICES = st.tuples(
    st.integers(1, 80), st.integers(1, 80), st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([0, 1]), st.sampled_from([8, 16]), st.floats(1e-2, 30), st.integers(0, 99),
)  # fmt: skip


def matrix(rows, columns, scale, seed):
    return scale * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def by_hand(q, n, d):
    """One weight, as the definition says."""
    group = (n, d // GROUP) if q.along else (n // GROUP, d)
    scale, offset = float(q.scale[group]), float(q.offset[group])
    if q.most_O is not None:
        at = n if q.along else d
        scale, offset = scale * float(q.most_O[0, at]) / 255, offset * float(q.most_O[1, at]) / 255
    return int(q.codes_ND[n, d]) * scale - offset


@settings(deadline=None, max_examples=60)
@given(MATRICES)
def test_values_are_the_definitions_and_near_the_weights(made):
    rows, columns, bits, along, scale_bits, size, seed = made
    w = matrix(rows, columns, size, seed)
    q = quantise(w, bits, along=along, scale_bits=scale_bits)
    values = q.values()
    for n, d in ((0, 0), (rows - 1, columns - 1), (rows // 2, columns // 3)):
        assert values[n, d] == pytest.approx(by_hand(q, n, d), rel=1e-5, abs=1e-6 * size)
    scale, _ = q.scales()
    step = scale.repeat_interleave(GROUP, along).narrow(along, 0, w.shape[along])
    # Half a step, and what rounding a scale (of up to 2^bits steps) and an offset to 8 bits may move.
    spread = w.abs().amax()
    moved = 0 if scale_bits == 16 else (2**bits * 1.01 * float(scale.max()) + spread) / 255
    assert ((values - w).abs() <= step / 2 + moved + 2e-3 * spread).all()


@settings(deadline=None, max_examples=60)
@given(MATRICES)
def test_a_file_gives_the_matrix_back(made):
    rows, columns, bits, along, scale_bits, size, seed = made
    q = quantise(matrix(rows, columns, size, seed), bits, along=along, scale_bits=scale_bits)
    kept = q.tensors()
    assert kept["codes"].shape == (bits, rows, -(-columns // 8))
    again = Quantised.of_tensors(kept, columns, along)
    assert torch.equal(again.values(), q.values())
    assert again.bits_per_weight == q.bits_per_weight
    # The top planes alone are the top bits of every code.
    for planes in range(1, bits):
        top = Quantised.of_tensors({**kept, "codes": kept["codes"][:planes]}, columns, along)
        assert torch.equal(top.codes_ND, q.codes_ND >> (bits - planes))


@pytest.mark.parametrize("along", [0, 1])
def test_rough_values_are_the_means_of_what_they_stand_for(along):
    q = quantise(matrix(64, 64, 1.0, 0), 4, along=along)
    for planes in (1, 2, 3):
        scale, offset = q.scales()
        scale, offset = (s.repeat_interleave(GROUP, along) for s in (scale, offset))
        step = 2 ** (4 - planes)
        first = (q.codes_ND // step * step).float()
        all_of_them = torch.stack([first + i for i in range(step)]) * scale - offset
        torch.testing.assert_close(q.rough(planes), all_of_them.mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(q.rough(4), q.values())


@pytest.mark.parametrize("scale_bits", [8, 16])
@pytest.mark.parametrize("along", [0, 1])
def test_numbers_of_such_a_grid_stay(along, scale_bits):
    q = quantise(matrix(96, 96, 1.0, 1), 4, along=along, scale_bits=16)
    again = quantise(q.values(), 4, along=along, scale_bits=scale_bits).values()
    error = (again - q.values()).norm() / q.values().norm()
    assert error < (1e-3 if scale_bits == 16 else 1e-2)


@pytest.mark.parametrize("along", [0, 1])
def test_runs_of_neurons_are_views_of_the_same_numbers(along):
    q = quantise(matrix(96, 40, 1.0, 2), 4, along=along)
    assert torch.equal(q.take(slice(32, 96)).values(), q.values()[32:96])
    if along == 0:
        with pytest.raises(ValueError, match="group"):
            q.take(slice(8, 96))


def test_bits_are_counted_with_scales():
    w = matrix(1536, 576, 1.0, 0)
    assert quantise(w, 4, scale_bits=16).bits_per_weight == 5.0
    assert quantise(w, 4).bits_per_weight == pytest.approx(4.5 + 32 / 576)
    assert quantise(w, 4, along=0).bits_per_weight == pytest.approx(4.5 + 32 / 1536)
