"""Codes, scales and offsets: what they stand for, how far they are from the weights, what a file keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefy.models.quantised import GROUP, GROUPED, Quantised, QuantisedMlp, quantise, shapes

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


MLPS = st.tuples(
    st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([8, 16]), st.booleans(), st.integers(0, 99),
)  # fmt: skip


def mlp_of(made):
    neurons, width, bits, scale_bits, gated, seed = made
    names = ["up", "gate", "down"] if gated else ["up", "down"]
    matrices = {name: matrix(neurons, width, 1.0, seed + i) for i, name in enumerate(names)}
    return matrices, QuantisedMlp.of(matrices, bits, scale_bits)


@settings(deadline=None, max_examples=60)
@given(MLPS)
def test_an_mlp_holds_what_its_format_says_and_every_matrix_by_itself(made):
    neurons, width, bits, scale_bits, _, _ = made
    matrices, stored = mlp_of(made)
    assert (len(stored), stored.bits, stored.scale_bits) == (neurons, bits, scale_bits)
    got = {name: (tuple(t.shape), t.dtype) for name, t in stored.tensors.items()}
    assert got == shapes(neurons, width, bits, scale_bits, matrices)
    for name, w_ND in matrices.items():
        alone = quantise(w_ND, bits, along=GROUPED[name], scale_bits=scale_bits)
        assert torch.equal(stored.matrix(name).values(), alone.values())
        # Counted from the tensors as it is from the sizes.
        assert stored.overhead(name) == pytest.approx(alone.scale_bits)


@settings(deadline=None, max_examples=60)
@given(MLPS, st.integers(0, 2), st.integers(0, 70))
def test_a_run_of_neurons_has_the_values_of_those(made, group, length):
    matrices, stored = mlp_of(made)
    first = min(group * GROUP, len(stored) // GROUP * GROUP)
    run = slice(first, min(first + length, len(stored)))
    if run.start == run.stop:
        return
    part = stored.take(run)
    assert len(part) == run.stop - run.start
    for name in matrices:
        assert torch.equal(part.matrix(name).values(), stored.matrix(name).values()[run])
    if len(part) > GROUP:
        tail = part.take(slice(GROUP, None))
        assert torch.equal(tail.matrix("down").values(), part.matrix("down").values()[GROUP:])


def test_down_is_not_cut_within_a_group():
    _, stored = mlp_of((64, 8, 4, 8, True, 0))
    part = stored.take(slice(8, None))
    assert torch.equal(part.matrix("up").values(), stored.matrix("up").values()[8:])
    with pytest.raises(ValueError, match="not the first of a group"):
        part.matrix("down")


def test_other_matrices_take_the_place_of_those_of_their_names():
    matrices, stored = mlp_of((40, 33, 4, 8, True, 0))
    other = quantise(2 * matrices["gate"], 4)
    changed = stored.with_matrices({"gate": other})
    assert torch.equal(changed.matrix("gate").values(), other.values())
    for name in ("up", "down"):
        assert torch.equal(changed.matrix(name).values(), stored.matrix(name).values())
    assert torch.equal(stored.matrix("gate").values(), quantise(matrices["gate"], 4).values())
