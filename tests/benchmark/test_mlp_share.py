"""The share of MLPs in the time of a dense model, with one that is slow on purpose."""

from functools import partial
from time import perf_counter

import pytest
import torch
from tiny_models import build

from moefy.benchmark.costs import amdahl, mlp_share
from moefy.experts.loading import load_dense
from moefy.models.checkpoint import Checkpoint

IDS = torch.arange(3, 27).view(2, 12)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_share_is_that_of_a_clock(family, tmp_path):
    model = load_dense(Checkpoint.open(build(family, tmp_path)))
    path = {"llama": "model.layers.0.mlp", "opt": "model.decoder.layers.0.fc2"}[family]
    slow, step = model.get_submodule(path), partial(model, IDS)
    forward = slow.forward

    def slower(*given):
        until = perf_counter() + 0.2
        while perf_counter() < until:
            pass
        return forward(*given)

    with torch.no_grad():
        before = mlp_share(model, [step] * 3)
        slow.forward = slower
        after = mlp_share(model, [step])
    assert 0 < before < after < 1 and after > 0.8
    hooks = (h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks))
    assert not any(hooks)
    assert amdahl(0.8, 0.25) == pytest.approx(2.5)
