"""A part of the inspection from a module of one's own: one class and one row."""

import sys
import types

import numpy as np
import pytest
import torch
from tiny_conversion import convert_tiny
from tiny_models import build

import moefy
from moefy.inspection.inspect import PARTS, describe, listened
from moefy.inspection.part import Pass, gather
from moefy.inspection.texts import read
from moefy.run.processes import Processes

SOURCE = """
from dataclasses import dataclass

import numpy as np

from moefy.inspection.part import Largest, PassPart, State
from moefy.inspection.record import of_experts


@dataclass
class Kept(State):
    largest: Largest


class Loudest(PassPart[Kept]):
    def begin(self, ledger):
        return Kept(Largest(np.zeros(ledger.experts)))

    def take(self, state, ledger):
        state.largest.merge(ledger.norm_TE.amax(0).cpu().numpy())

    def rows(self, layer):
        return {"experts": of_experts(layer, {"loudest": self.layers[layer].largest.total})}
"""


@pytest.fixture
def loudest(monkeypatch):
    module = types.ModuleType("loudest")
    monkeypatch.setitem(sys.modules, "loudest", module)
    exec(SOURCE, vars(module))
    monkeypatch.setitem(PARTS, "loudest", module.Loudest)
    return module.Loudest


@pytest.fixture
def case(tmp_path):
    convert_tiny("llama", build("llama", tmp_path / "s"), tmp_path / "o")
    model = moefy.load(tmp_path / "o")
    generator = torch.Generator().manual_seed(5)
    docs = [torch.randint(3, 90, (6 + i % 17,), generator=generator).tolist() for i in range(60)]
    return model, read(model, docs)


def test_a_part_of_ones_own_has_columns_beside_the_others(case, loudest):
    experts = describe(Pass(*case, controls=False))["experts"]
    later, loud = np.array(experts["norm_max"]), np.array(experts["loudest"])
    assert (loud >= later).all() and loud.max() > 0
    assert list(experts).index("loudest") > list(experts).index("load")


class Second(Processes):
    """The first of two processes; the second has sent this."""

    def __init__(self, part):
        super().__init__(2, 0)
        object.__setattr__(self, "sent", part)

    def all(self, items):
        return [*items, self.sent]


def test_what_two_processes_heard_of_it_is_what_one_hears(case, loudest):
    numbers = range(len(case[1].batches))
    (whole,) = listened(Pass(*case), [loudest])
    (first,) = listened(Pass(*case), [loudest], [*numbers[::2]])
    (second,) = listened(Pass(*case), [loudest], [*numbers[1::2]])
    for layer in whole.layers:
        gather([first], [layer], Second(second.part(layer)))
    assert first.tables() == whole.tables()
