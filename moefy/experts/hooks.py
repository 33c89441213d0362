"""See what runs inside a moefied model, and change it, by the names that TransformerLens has taught.

    logits, cache = model.run_with_cache(input_ids)
    cache["blocks.1.mlp.hook_expert_mask"]                       # [b, p, E]
    logits = model.run_with_hooks(input_ids, fwd_hooks=[("blocks.1.mlp.hook_expert_mask", fn)])
    with model.hooks(fwd_hooks=[(lambda name: name.endswith("hook_moe_error"), fn)]):
        model.generate(input_ids)

`fn(tensor, hook)` returns a tensor that takes the place of the one it was given, or None; `hook.name`
is the name. `docs/hooks.md` says what each point holds.

Shapes: b sequences, p positions, E experts (the shared ones first), D width.
"""

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from moefy.errors import MoefyError
from moefy.experts.routed import EXPERT_OUT, OF_ALL, POINTS, SCORES, alone, say_once
from moefy.experts.sparse_mlp import sparse_mlps
from moefy.models.answers import answer_of
from moefy.run.arguments import checked

Which = str | Callable[[str], bool]
"""The name of a hook point, or a function that says yes to some."""


@dataclass(frozen=True)
class Hook:
    """What a hook function is told of the point it is at."""

    name: str
    """`blocks.{layer}.mlp.{point}`, layers counted over all MLPs of the model, encoder before decoder."""

    def layer(self) -> int:
        """The number of the layer."""
        return int(self.name.split(".")[1])


HookFunction = Callable[[Tensor, Hook], Tensor | None]


@checked
@contextmanager
def hooks(
    model: PreTrainedModel, fwd_hooks: Iterable[tuple[Which, HookFunction]]
) -> Iterator[PreTrainedModel]:
    """While this lasts, call functions at hook points, in the order given.

    A point whose value needs every expert has its layer computed from all neurons, the same function
    in another order of sums. Raises `MoefyError` for a name that no point has, and where another thread
    runs the model: it may not until this ends.
    """
    points = _points(model)
    with alone(sparse_mlps(model).values()), ExitStack() as handles:
        for which, function in fwd_hooks:
            for name in _chosen(points, which):
                if name.rpartition(".")[2] in OF_ALL:
                    say_once(
                        f"{', '.join(OF_ALL)} need every expert: layers hooked there compute all "
                        "neurons, and are as slow as the dense model's"
                    )
                handle = points[name].register_forward_hook(_calling(function, Hook(name)))
                handles.callback(handle.remove)
        yield model


@checked
def run_with_hooks(
    model: PreTrainedModel,
    *args: Any,
    fwd_hooks: Iterable[tuple[Which, HookFunction]] = (),
    **kwargs: Any,
) -> Tensor:
    """Call the model with these hooks in place: its logits, or last hidden states where it has none.

    Raises `MoefyError` for a name that no hook point has.
    """
    with hooks(model, fwd_hooks):
        return _output(model, model(*args, **kwargs))


@checked
def run_with_cache(
    model: PreTrainedModel,
    *args: Any,
    names_filter: Which | Sequence[str] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Call the model and keep what passes by hook points: logits, and tensors (detached) by name.

    `names_filter` is a name, several, or a function of a name. None is every point but
    `hook_expert_out`, which takes the memory of E outputs and has to be asked for.

    Raises `MoefyError` for a name that no point has, and for a named point that was not reached.
    """
    asked: list[Which]
    if names_filter is None:
        asked = [lambda name: not name.endswith(EXPERT_OUT)]
    elif isinstance(names_filter, str) or callable(names_filter):
        asked = [names_filter]
    else:
        asked = list(names_filter)
    cache: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Hook) -> None:
        cache[hook.name] = value.detach()

    logits = run_with_hooks(model, *args, fwd_hooks=[(which, keep) for which in asked], **kwargs)
    for which in asked:
        if isinstance(which, str) and which not in cache:
            raise MoefyError(_missed(which))
    return logits, cache


def _missed(name: str) -> str:
    why = (
        "nothing was scored: all_experts was on, or the selection (prompt_static) runs what the "
        "prompt has chosen; hook hook_expert_mask, or run the prompt"
        if name.endswith(SCORES)
        else "its layer did not run; give the inputs that make it (an encoder-decoder needs both)"
    )
    return f"{name}: not come by in this pass: {why}"


def _points(model: nn.Module) -> dict[str, nn.Module]:
    """Every hook point of a model by its name."""
    return {
        f"blocks.{layer}.mlp.{point}": module.get_submodule(point)
        for layer, module in sparse_mlps(model).items()
        for point in POINTS
    }


def _chosen(points: dict[str, nn.Module], which: Which) -> list[str]:
    if not isinstance(which, str):
        found = [name for name in points if which(name)]
        if not found:
            raise MoefyError(f"a function chose none of the hook points; {_known(points)}")
        return found
    if which not in points:
        close = difflib.get_close_matches(which, points, n=1, cutoff=0.0)
        raise MoefyError(
            f"unknown hook point '{which}'; did you mean '{close[0]}'? {_known(points)}"
        )
    return [which]


def _known(points: dict[str, nn.Module]) -> str:
    return (
        f"known: blocks.0 to blocks.{len(points) // len(POINTS) - 1}, each with {', '.join(POINTS)}"
    )


def _calling(function: HookFunction, hook: Hook) -> Callable[[nn.Module, Any, Tensor], Any]:
    def call(_: nn.Module, __: Any, value: Tensor) -> Tensor | None:
        return function(value, hook)

    return call


def _output(model: PreTrainedModel, result: Any) -> Tensor:
    """Logits, or what a model without any puts out (`moefy.models.answers`)."""
    found: Tensor = result[answer_of(model).field]
    return found
