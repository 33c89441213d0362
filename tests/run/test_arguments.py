"""Arguments of a wrong type are one line that says which, and what is expected."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_conversion import convert_tiny
from tiny_models import build

import moefy
from moefy.errors import MoefyError
from moefy.run.arguments import check_arguments, checked

WRONG: dict[str, Callable[[Any, Path], Any]] = {
    "experts: ablate: got [3]": lambda m, _: m.experts(ablate=[3]),
    "experts: ablate: got 3": lambda m, _: m.experts(ablate=3),
    "experts: keep: got [(0.5, 1)]": lambda m, _: m.experts(keep=[(0.5, 1)]),
    "experts: scale: got [(0, 1)]": lambda m, _: m.experts(scale=[(0, 1)]),
    "experts: scale: got {(0, 1): 'x'}": lambda m, _: m.experts(scale={(0, 1): "x"}),
    "experts: mode: got 3": lambda m, _: m.experts(mode=3),
    "experts: means: got 'x'": lambda m, _: m.experts(means="x"),
    "hooks: fwd_hooks: got ['x']": lambda m, _: m.hooks(["x"]),
    "hooks: fwd_hooks: got [('x', 3)]": lambda m, _: m.hooks([("x", 3)]),
    "run_with_cache: names_filter: got 3": lambda m, _: m.run_with_cache(names_filter=3),
    "load: folder: got 3": lambda _, __: moefy.load(3),
    "load: verify: got 'no'": lambda _, out: moefy.load(out, verify="no"),
    "open_model: where: got None": lambda _, __: moefy.open_model(None),
    "convert: model: got 3": lambda _, __: moefy.convert(3, "x"),
    "convert: out: got None": lambda _, out: moefy.convert(out, None),
    "convert: recipe: got 0.25": lambda _, out: moefy.convert(out, "x", recipe=0.25),
    "evaluate: documents: got 'x'": lambda _, out: moefy.evaluate(out, documents="x"),
    "evaluate: seed: got None": lambda _, out: moefy.evaluate(out, seed=None),
    "evaluate: device: got 3": lambda _, out: moefy.evaluate(out, device=3),
    "compare: names: got 'teal'": lambda _, out: moefy.compare(out, "teal", [0.5]),
    "compare: budgets: got 0.5": lambda _, out: moefy.compare(out, ["teal"], 0.5),
    "inspect: skip: got 'causal'": lambda _, out: moefy.inspect(out, skip="causal"),
    "inspect: prompts: got 'text'": lambda _, out: moefy.inspect(out, prompts="text"),
    "prune: forget: got 3": lambda _, out: moefy.prune(out, "x", forget=3),
    "recover: recipe: got 'x'": lambda _, out: moefy.recover(out, "x", recipe="x"),
    "export: to: got None": lambda _, out: moefy.export(out, "x", to=None),
    "revert: folder: got None": lambda _, __: moefy.revert(None, "x"),
    "load_tokenizer: folder: got 3": lambda _, __: moefy.load_tokenizer(3),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("arguments")
    convert_tiny("llama", build("llama", root / "source"), root / "out")
    return root / "out"


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_type_is_one_line(words: str, out: Path, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    model = moefy.load(out)
    with pytest.raises(MoefyError) as caught:
        WRONG[words](model, out)
    assert str(caught.value).startswith(f"{words}, expected ")
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.iterdir()]


def test_what_means_the_same_is_taken(out: Path) -> None:
    model = moefy.load(out)
    ids = torch.tensor([[3, 4, 5]])
    pair = (np.int64(0), np.int64(1))
    for pairs in ([(0, 1)], {(0, 1)}, [[0, 1]], [pair], iter([(0, 1)]), np.array([[0, 1]])):
        with model.experts(ablate=pairs, mode="zero"):
            model(ids)
    with model.experts(scale={(0, 1): 2}, mode="zero"), model.hooks([]):
        model(ids)
    model.run_with_cache(ids, names_filter="blocks.0.mlp.hook_out")
    assert moefy.load_tokenizer(str(out)) is None


def plain(
    a: int,
    b: Sequence[str] = (),
    *,
    c: Mapping[str, float] | None = None,
    d: Callable[[int], int] | None = None,
    e: Iterable[tuple[int, str]] = (),
    f: Any = None,
) -> int:
    return a


@pytest.mark.parametrize(
    "given",
    [
        {"a": True}, {"a": 1.0}, {"a": 1, "b": "x"}, {"a": 1, "b": [1]}, {"a": 1, "c": {"x": True}},
        {"a": 1, "d": 3}, {"a": 1, "e": [(1, 2)]}, {"a": 1, "e": [(1, "x", 2)]}, {"a": 1, "e": [1]},
    ],
)  # fmt: skip
def test_annotations_are_read(given: dict[str, Any]) -> None:
    name = [*given][-1]
    with pytest.raises(MoefyError, match=f"plain: {name}: got .*, expected "):
        checked(plain)(**given)
    assert checked(plain)(np.int64(4), ["x"], c={"x": 1}, d=len, e=[(1, "x")], f=object()) == 4
    with pytest.raises(TypeError, match="unexpected keyword"):  # as Python says it
        checked(plain)(1, surprise=2)


def test_defaults_of_the_public_functions_are_what_they_may_be() -> None:
    """Every annotation can be read, and what nobody gave passes."""
    seen = 0
    for name in moefy.__all__:
        function = getattr(moefy, name)
        if inspect.isfunction(function):
            plain_function = inspect.unwrap(function)
            parameters = inspect.signature(plain_function).parameters.values()
            given = {p.name: p.default for p in parameters if p.default is not p.empty}
            check_arguments(plain_function, (), given)
            seen += 1
    assert seen > 15
