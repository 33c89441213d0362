"""Whether a bench tells rounding, which swaps experts of like score, from engines that choose wrongly."""

import pytest
import torch
from tiny_conversion import convert_tiny
from tiny_models import build

from moefy.bench.choices import Chosen, choosing, moved_on, others
from moefy.bench.engines import Unavailable
from moefy.modeling import load
from moefy.routed import midpoint
from moefy.sparse_mlp import sparse_mlps


@pytest.fixture
def model(tmp_path):
    convert_tiny("llama", build("llama", tmp_path / "in"), tmp_path / "out")
    return load(tmp_path / "out")


IDS = torch.arange(3, 27).view(2, 12)


def ran(model, lead=None):
    logits = []
    with torch.no_grad(), choosing(model, lead) as chosen:
        for ids in (IDS, IDS.flip(1)):
            logits.append(model(ids).logits)
            chosen.next_pass()
    return torch.stack(logits), chosen.made


def disturb(model, change):
    with torch.no_grad():
        for layer in sparse_mlps(model).values():
            for parameter in layer.router.parameters():
                parameter.copy_(change(parameter))


def test_an_engine_that_is_led_computes_the_experts_of_the_reference(model):
    own = [layer.selection for layer in sparse_mlps(model).values()]
    want, lead = ran(model)
    assert [len(layer) for layer in lead] == [2] * len(own)
    assert [layer.selection for layer in sparse_mlps(model).values()] == own
    disturb(model, lambda parameter: -parameter)
    got, made = ran(model, lead)
    assert torch.equal(got, want)
    assert not torch.equal(ran(model)[0], want)
    # What it would have chosen is seen all the same.
    with pytest.raises(Unavailable, match=r"chooses other experts"):
        others(made, lead, torch.float32)
    other = ran(model, moved_on(lead))[0]
    assert (other - want).norm() > 0.02 * want.norm()


def test_swaps_among_ties_are_counted_and_others_refused(model):
    _, lead = ran(model)
    assert others(ran(model, lead)[1], lead, torch.float32) == 0
    generator = torch.Generator().manual_seed(0)

    def noise(parameter, size):
        drawn = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        return parameter + size * parameter.std() * drawn

    disturb(model, lambda parameter: noise(parameter, 1e-4))
    assert others(ran(model, lead)[1], lead, torch.float32) < 0.05
    disturb(model, lambda parameter: noise(parameter, 0.5))
    with pytest.raises(Unavailable, match=r"standard deviations"):
        others(ran(model, lead)[1], lead, torch.bfloat16)


def test_the_margin_is_that_of_the_scores():
    scores = torch.tensor([[4.0, 2.0, 1.9, -3.0]])
    mask = torch.tensor([[True, True, False, False]])
    lead = [[Chosen(mask, scores)] * 50]
    close = torch.tensor([[True, False, True, False]])  # half of 0.1 from the boundary
    made = [[Chosen(mask, scores)] * 49 + [Chosen(close, scores)]]
    deviation = float(scores.std())
    assert midpoint(scores, mask).item() == pytest.approx(1.95)
    assert 0.05 / deviation == pytest.approx(0.0169, abs=1e-3)
    assert others(made, lead, torch.float32) == pytest.approx(2 / 200)
    # The same number of swaps, but of an expert that clearly runs.
    far = torch.tensor([[False, True, True, False]])
    with pytest.raises(Unavailable, match=r"0.69 standard"):
        others([[*made[0][:49], Chosen(far, scores)]], lead, torch.bfloat16)
    # Ties alone, but too many.
    with pytest.raises(Unavailable, match=r"50.0% of all choices"):
        others([[Chosen(close, scores)] * 50], lead, torch.float32)


def test_a_choice_without_scores_counts_by_its_share(model):
    mask = torch.tensor([[True, False, True, False]])
    lead = [[Chosen(mask, None)] * 10]
    assert others(lead, lead, torch.float32) == 0
    with pytest.raises(Unavailable, match=r"100.0% of all choices"):
        others(moved_on(lead), lead, torch.float32)
