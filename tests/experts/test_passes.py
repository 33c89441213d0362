"""What listeners hear of a pass, and that nothing of them stays behind."""

import pytest
import torch

from moefy.data.corpus import load_corpus
from moefy.data.inputs import read_batches
from moefy.experts.moefied import of
from moefy.experts.passes import observing, walk, watching
from moefy.experts.sparse_mlp import all_experts


class Everything:
    def __init__(self):
        self.heard = []

    def hear(self, heard):
        self.heard.append(heard)


@pytest.fixture
def batch(made, load):
    moefied = of(load("demo_llama"))
    return read_batches(moefied.checkpoint, moefied.kind, load_corpus().take(5), 64)[0]


@torch.no_grad()
def test_listeners_hear_every_layer_without_its_padding(load, batch):
    model, listener = load("demo_llama"), Everything()
    with observing(model, batch, listener, scores=True):
        walk(model, batch)
    modules = of(model).mlps
    assert [one.layer for one in listener.heard] == list(modules)
    for one in listener.heard:
        module = modules[one.layer]
        assert one.module is module and len(one.x_TD) == int(batch.mask().sum())
        documents = torch.arange(len(batch.samples)).repeat_interleave(batch.mask().sum(1))
        assert torch.equal(one.document_T, documents)
        assert torch.equal(one.mask_TE, module.mask(one.x_TD))
        assert torch.allclose(one.scores_TE, module.router(one.x_TD, module.routed))


@torch.no_grad()
def test_there_are_no_scores_where_none_are_asked_for_or_made(load, batch):
    model, listener = load("demo_llama"), Everything()
    with observing(model, batch, listener):
        walk(model, batch)
    with all_experts(model), observing(model, batch, listener, scores=True):
        walk(model, batch)
    assert all(one.scores_TE is None for one in listener.heard)


@torch.no_grad()
def test_observers_and_hooks_are_gone_behind_it_also_after_an_error(load, batch):
    model = load("demo_llama")
    modules = of(model).mlps

    def refuse(layer, x_TD, mask_TE):
        raise ValueError(layer)

    with pytest.raises(ValueError, match="0"), watching(modules, refuse):
        walk(model, batch)
    with observing(model, batch, Everything(), scores=True):
        assert all(module.hooked and module.observer for module in modules.values())
    assert not any(module.hooked or module.observer for module in modules.values())
