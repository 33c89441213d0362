"""One model that several threads share: each gets what it would get alone, or is refused."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from moefied_models import KINDS, inputs_for
from tiny_models import example_inputs
from torch import Tensor, nn
from transformers import PreTrainedModel

import moefy
from moefy.errors import MoefyError
from moefy.evaluation.outputs import values_of
from moefy.experts.passes import watching
from moefy.experts.routed import Routed, Turn, all_experts
from moefy.experts.sparse_mlp import sparse_mlps

SETTINGS = {
    "heads": ("llama", {"attention.density": 0.5, "attention.hidden": 16}),
    "heads of t5": ("t5", {"attention.density": 0.5, "attention.hidden": 16}),
}
IN_USE = "give each thread a copy.deepcopy"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, made: Callable[[str], Path]) -> Any:
    """A model by kind, its inputs, and others for another thread."""
    from tiny_conversion import convert_tiny
    from tiny_models import build

    folder, done = tmp_path_factory.mktemp("threads"), {}

    def get(kind: str) -> tuple[PreTrainedModel, dict[str, Tensor], dict[str, Tensor]]:
        if kind in SETTINGS and kind not in done:
            name, settings = SETTINGS[kind]
            done[kind] = folder / f"{name}-out"
            plain = {"partition.method": "random", "compensation.name": "none"}
            convert_tiny(
                name, build(name, folder / name), done[kind], settings={**plain, **settings}
            )
        where = done[kind] if kind in SETTINGS else made(kind)
        first = example_inputs(SETTINGS[kind][0]) if kind in SETTINGS else inputs_for(kind)
        second = {name: value[:1, 2:9].contiguous() for name, value in first.items()}
        return moefy.load(where, dtype=torch.float64), first, second

    return get


@torch.no_grad()
def run(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return values_of(model, model(**inputs))


def elsewhere(run: Callable[[], Any]) -> Any:
    """What a function gives in another thread, while this one waits."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


@pytest.mark.parametrize(
    "kind", ["demo_llama", "look_ahead", "static", "seq2seq", "centred", *SETTINGS]
)
def test_a_pass_of_another_thread_between_any_two_modules(kind: str, shared: Any) -> None:
    model, first, second = shared(kind)
    alone = run(model, first), run(model, second)
    routed = [module for module in model.modules() if isinstance(module, Routed)]
    for module in routed:
        others: list[Tensor] = []

        def between(*_: Any, others: list[Tensor] = others) -> None:
            if not others:  # the other thread comes by as well
                others.append(torch.empty(0))
                others.append(elsewhere(lambda: run(model, second)))

        handle = module.register_forward_pre_hook(between)
        together = run(model, first)
        handle.remove()
        assert torch.equal(together, alone[0])
        assert torch.equal(others[1], alone[1])


@torch.no_grad()
def test_two_generations_step_by_step(shared: Any) -> None:
    """Threads take turns at every token; what the prompt chose stays with its cache."""
    model, first, second = shared("static")
    inputs = ({"input_ids": first["input_ids"][:, :6]}, {"input_ids": second["input_ids"]})
    alone = [model.generate(**one, max_new_tokens=8, do_sample=False) for one in inputs]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            found = pool.map(
                lambda one: model.generate(**one, max_new_tokens=8, do_sample=False), inputs
            )
            assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def changes(model: PreTrainedModel) -> dict[str, Any]:
    """All that changes what a model's passes do, for as long as it lasts."""
    return {
        "all_experts": all_experts(model),
        "hooks": model.hooks([("blocks.0.mlp.hook_expert_mask", lambda value, hook: None)]),
        "experts": model.experts(ablate=[(0, 0)], mode="zero"),
        "an observer": watching(sparse_mlps(model), lambda *_: None),
    }


@pytest.mark.parametrize("name", ["all_experts", "hooks", "experts", "an observer"])
def test_what_changes_all_passes_is_of_one_thread(name: str, shared: Any) -> None:
    model, first, second = shared("demo_llama")
    alone, refused = run(model, second), []
    with changes(model)[name]:
        with changes(model)[name], pytest.raises(MoefyError, match=IN_USE):
            elsewhere(lambda: run(model, second))
        with pytest.raises(MoefyError, match=IN_USE):
            elsewhere(lambda: run(model, second))
        with pytest.raises(MoefyError, match=IN_USE):
            elsewhere(lambda: changes(model)["hooks"].__enter__())
        run(model, first)

    def amid(*_: Any) -> None:
        def enter() -> None:
            with pytest.raises(MoefyError, match=IN_USE), changes(model)[name]:
                pass
            refused.append(True)

        elsewhere(enter)

    handle = sparse_mlps(model)[0].register_forward_pre_hook(amid)
    run(model, first)
    handle.remove()
    assert refused == [True]
    assert torch.equal(elsewhere(lambda: run(model, second)), alone)


def test_a_pass_that_fails_is_over(shared: Any) -> None:
    model, first, _ = shared("demo_llama")
    with pytest.raises(IndexError):
        elsewhere(lambda: run(model, {"input_ids": torch.tensor([[10**6]])}))
    with all_experts(model):
        run(model, first)


def test_a_thread_that_died_in_its_pass_holds_nothing() -> None:
    turn = Turn()
    elsewhere(turn.enter)
    with turn.alone():
        turn.enter()


def test_layers_that_come_and_go_are_run_by_one_thread_at_a_time() -> None:
    turn = Turn()
    turn.single = True
    turn.enter()
    with pytest.raises(MoefyError, match="offloaded: one thread at a time"):
        elsewhere(turn.enter)
    turn.leave()
    elsewhere(turn.enter)


def test_all_experts_in_all_experts(shared: Any) -> None:
    model, first, _ = shared("demo_llama")
    with all_experts(model):
        dense = run(model, first)
        with all_experts(model):
            pass
        assert torch.equal(run(model, first), dense)
    assert not torch.equal(run(model, first), dense)


def test_a_copy_has_a_turn_of_its_own(shared: Any) -> None:
    model, _, second = shared("demo_llama")
    again = copy.deepcopy(model)
    turns = [{id(m.turn) for m in one.modules() if isinstance(m, Routed)} for one in (model, again)]
    assert len(turns[0]) == len(turns[1]) == 1 and turns[0] != turns[1]
    alone = run(model, second)
    with all_experts(model):
        assert torch.equal(elsewhere(lambda: run(again, second)), alone)
    assert isinstance(pickle.loads(pickle.dumps(Turn())), Turn)


def test_models_are_loaded_in_several_threads(made: Callable[[str], Path]) -> None:
    kinds = [kind for kind in KINDS if kind in ("demo_llama", "shared", "seq2seq", "static")]
    types = (torch.float64, torch.bfloat16)
    tasks = [(made(kind), dtype) for kind in kinds for dtype in types] * 2
    alone = [moefy.load(folder, dtype=dtype).state_dict() for folder, dtype in tasks]
    with ThreadPoolExecutor(4) as pool:
        loaded = pool.map(lambda task: moefy.load(task[0], dtype=task[1]).state_dict(), tasks)
        for found, want in zip(loaded, alone, strict=True):
            assert found.keys() == want.keys()
            for name, value in want.items():
                assert found[name].dtype == value.dtype and torch.equal(found[name], value)
