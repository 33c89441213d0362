"""Routing stretched to the experts of a shape: as many of them as asked for, as correlated as the model's."""

import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "experiments" / "real_routing.py"


@pytest.fixture(scope="module")
def text_lists():
    return runpy.run_path(str(SCRIPT))["text_lists"]


def share(expert_TK, experts):
    """Share of the experts that any token runs."""
    return len(expert_TK.unique()) / experts


def scores():
    """64 experts, some more popular than others; neighbouring tokens are alike."""
    g = torch.Generator().manual_seed(0)
    walk = torch.randn(32, 64, generator=g).cumsum(0)
    return walk + 3 * torch.randn(64, generator=g)


@pytest.mark.parametrize("experts", [28, 64, 112, 448])
def test_every_token_runs_k_different_experts(text_lists, experts):
    expert_TK = text_lists(scores(), experts, experts // 4)
    assert expert_TK.shape == (32, experts // 4)
    assert int(expert_TK.min()) >= 0 and int(expert_TK.max()) < experts
    assert bool((expert_TK.diff(dim=1) > 0).all())


def test_the_union_is_that_of_the_model(text_lists):
    score = scores()
    model = score.topk(16, 1).indices
    for tokens in (1, 4, 32):
        wanted = share(model[:tokens], 64)
        for experts in (64, 128, 448):
            got = share(text_lists(score[:tokens], experts, experts // 4), experts)
            assert got == pytest.approx(wanted)
    independent = torch.rand(32, 64, generator=torch.Generator().manual_seed(1))
    assert share(text_lists(independent, 448, 112), 448) > 1.2 * share(model, 64)
