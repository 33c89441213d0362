"""An inspection in two processes: the tables of one, and what happens when a process dies."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from children import LAUNCH
from state_size import Sizes, state_bytes
from tiny_conversion import convert_tiny
from tiny_models import build

import moefy
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.inspection.experts.examples import Best, Records
from moefy.inspection.inspect import PARTS, listened, merged
from moefy.inspection.part import Pass, gather
from moefy.inspection.routing import RoutingSampler, drawn_documents
from moefy.inspection.texts import read
from moefy.run.processes import Processes

CODE = """
import os, signal, sys
sys.path[:0] = {paths!r}
import moefy, moefy.inspection.inspect
module = sys.modules["moefy.inspection.inspect"]

def dying(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if {dies} and os.environ["RANK"] == "1":
    module.gather = dying
found = moefy.inspect({model!r}, **{settings!r})
print("tables", sorted(found.tables), flush=True)
"""
SETTINGS = {"tokens": 20_000, "causal_tokens": 1500, "quiet": True}


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A model and a text of several batches of either shard."""
    folder = tmp_path_factory.mktemp("inspected")
    convert_tiny("llama", build("llama", folder / "source"), folder / "model")
    generator = torch.Generator().manual_seed(7)
    lines = []
    for number in range(700):
        ids = torch.randint(3, 90, (8 + number % 24,), generator=generator) // 2 * 2 + number % 2
        domain = "low" if number % 2 else "high"
        lines.append({"domain": domain, "source_id": str(number), "input_ids": ids.tolist()})
    text = folder / "text.jsonl"
    text.write_text("\n".join(map(json.dumps, lines)))
    return folder / "model", text


def launch(tmp_path, case, out, *, dies=False) -> subprocess.CompletedProcess[str]:
    root, (model, text) = Path(__file__).parents[2], case
    script = tmp_path / "run.py"
    settings = {**SETTINGS, "corpora": {"text": str(text)}, "out": str(out)}
    paths = [str(root), str(root / "kernels"), str(root / "tests" / "tiny")]
    script.write_text(CODE.format(paths=paths, model=str(model), settings=settings, dies=dies))
    command = [sys.executable, *LAUNCH, str(script)]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=600)


def same(one, two, where):
    """Figures are six digits of sums that were added up in another order."""
    assert one.keys() == two.keys(), where
    for name, column in one.items():
        assert len(column) == len(two[name]), (where, name)
        if any(isinstance(value, float) for value in column):
            assert [v is None for v in two[name]] == [v is None for v in column], (where, name)
            known = [v for v in column if v is not None]
            again = [v for v in two[name] if v is not None]
            assert again == pytest.approx(known, rel=2e-5, abs=1e-9), (where, name)
        else:
            assert two[name] == column, (where, name)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(case, tmp_path):
    one = moefy.inspect(
        str(case[0]), corpora={"text": str(case[1])}, out=tmp_path / "one", **SETTINGS
    )
    done = launch(tmp_path, case, tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("tables ['") == 1 and done.stdout.count("tables []") == 1
    two = json.loads((tmp_path / "two" / "inspection.json").read_text())
    first = json.loads((tmp_path / "one" / "inspection.json").read_text())
    assert first["tables"].keys() == two["tables"].keys()
    for name, table in first["tables"].items():
        same(table, two["tables"][name], name)
    assert first["texts"] == two["texts"]
    assert len(one.tables["causal"]["layer"]) > 0 and len(one.tables["examples"]["layer"]) > 0


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run(case, tmp_path):
    done = launch(tmp_path, case, tmp_path / "out", dies=True)
    assert done.returncode != 0
    assert not (tmp_path / "out" / "inspection.json").exists()


class Taken(Processes):
    """The first of two processes, the second of which has sent all its parts."""

    def __init__(self, sent):
        super().__init__(2, 0)
        object.__setattr__(self, "sent", iter(sent))

    def all(self, items):
        return [*items, next(self.sent)]


def heard(model, reading, batches, seed=0):
    """The parts of a process that has heard these batches, by name."""
    chosen_Q = drawn_documents(reading.tokens_Q, 6000, seed)
    sampler = partial(RoutingSampler, chosen_Q=chosen_Q)
    makers = PARTS | {"routing": sampler}
    numbers = list(range(len(reading.batches)) if batches is None else batches)
    return dict(
        zip(makers, listened(Pass(model, reading, seed), makers.values(), numbers), strict=True)
    )


@pytest.fixture(scope="module")
def loaded(case):
    model = moefy.load(case[0])
    reading = read(model, {"text": str(case[1])}, tokens=20_000)
    assert len(reading.batches) > 3
    return model, reading


def test_parts_merge_into_the_whole(loaded):
    model, reading = loaded
    layers, numbers = list(sparse_mlps(model)), range(len(reading.batches))
    whole, first = heard(model, reading, numbers), heard(model, reading, numbers[::2])
    others = heard(model, reading, numbers[1::2]).values()
    sent = [other.part(layer) for layer in layers for other in others]
    gather(list(first.values()), layers, Taken(sent))
    got, want = (merged(part.tables() for part in parts.values()) for parts in (first, whole))
    assert got.keys() == want.keys()
    for name, table in want.items():
        same(table, got[name], name)
    one, two = whole["routing"].sample(), first["routing"].sample()
    assert (one.tokens.ids_T == two.tokens.ids_T).all()
    assert (one.tokens.document_T == two.tokens.document_T).all()
    assert all((a == b).all() for a, b in zip(one.packed, two.packed, strict=True))


def test_of_equal_keys_the_first_token_stands_first():
    best, other = Best(1, 2), Best(1, 2)

    def records(document):
        blank = {name: [[0.0, 0.0]] for name in ("norm_EN", "share_EN", "margin_EN", "ran_EN")}
        values = {"key_EN": [[5.0, 1.0]], "document_EN": [document], "position_EN": [[3, 4]]}
        arrays = {k: torch.tensor(v).numpy() for k, v in {**blank, **values}.items()}
        return Records(**arrays, window_ENW=best.total.window_ENW)

    best.total, other.total = records([7, 8]), records([2, 9])
    best.merge(other.total)
    assert best.total.document_EN.tolist() == [[2, 7]]


def arrays(part):
    """Every array in what a listener sends, once."""
    if hasattr(part, "nbytes"):
        yield part
    elif isinstance(part, dict):
        for value in part.values():
            yield from arrays(value)
    elif isinstance(part, list | tuple):
        for value in part:
            yield from arrays(value)
    elif hasattr(part, "__dict__"):
        yield from arrays(vars(part))


def test_the_formulas_of_state_are_what_listeners_hold(loaded):
    model, reading = loaded
    modules = sparse_mlps(model)
    parts = heard(model, reading, None)
    module = next(iter(modules.values()))
    sizes = Sizes(
        layers=len(modules), width=module.weights.width, neurons=module.weights.neurons,
        experts=module.experts, shared=module.shared, tokens=len(parts["routing"].sample().tokens),
        documents=len(reading.documents), blocks=len(parts["contributions"].work.blocks),
        concepts=len(parts["predictivity"].names),
    )  # fmt: skip
    want = state_bytes(sizes)
    for name, part in parts.items():
        held = {id(a): a for layer in modules for a in arrays(part.part(layer))}
        assert sum(a.nbytes for a in held.values()) == want.get(name, 0), name


def test_a_large_model_holds_little():
    llama = Sizes(
        layers=32, width=4096, neurons=14336, experts=448, shared=0, tokens=10**6, documents=4000,
        blocks=512, concepts=19,
    )  # fmt: skip
    assert sum(state_bytes(llama).values()) < 8e9


@pytest.mark.slow
def test_memory_does_not_grow_with_what_is_read():
    sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))
    try:
        from inspection_memory import measured
    finally:
        sys.path.pop(0)
    few, many = measured([5_000, 50_000])
    assert many["tokens"] > 8 * few["tokens"]
    text = many["after_reading"] - few["after_reading"]
    assert many["peak"] - few["peak"] < 60e6 + text
