"""Run a language model without its logits, and have those of a few positions later.

    with short_logits(model) as trunk:
        model(**inputs)                       # logits of two positions alone
    head = Head(model, inputs, trunk.last, trunk.given)
    logits_1CV = head(trunk.hidden[:1, :8])   # of any hidden states, by the model's own code

Logits of a whole batch may take more memory than the model. The modules that hold the layers hand on
the hidden states of two positions in place of all, so that the model itself makes logits of those;
called again with the same modules handing on other hidden states, it makes logits of these. What it
does to them (biases, scales, caps) is therefore its own code, and no family is known here.

Shapes: B documents, T positions, C positions of a chunk, D width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

SHOWN = 2
"""Positions of the first document that logits are made of at once, to compare others with."""


@dataclass
class Trunk:
    """What the modules in front of the head gave in one pass."""

    hidden: Tensor | None = None
    """Last hidden states `[B, T, D]`; None where they did not pass by."""
    last: str = ""
    """Path of the module that gave them."""
    given: dict[str, Any] = field(default_factory=dict)
    """By path, without a gradient; of `last` all but its hidden states."""


@dataclass(frozen=True)
class Head:
    """The code of a model behind its last hidden states."""

    model: PreTrainedModel
    inputs: dict[str, Any]
    last: str
    """Path of the module that gives the last hidden states."""
    given: dict[str, Any]
    """What every module in front of the head gives, by path."""

    def __call__(self, hidden_BCD: Tensor) -> Tensor:
        """Logits `[B, C, V]` of these hidden states."""
        given = self.given | {self.last: _with_hidden(self.given[self.last], hidden_BCD)}
        modules = {path: self.model.get_submodule(path) for path in given}
        own = {path: vars(module).get("forward") for path, module in modules.items()}
        for path, module in modules.items():
            vars(module)["forward"] = partial(_handed_on, given[path])
        try:
            logits: Tensor = self.model.forward(**self.inputs).logits
        finally:
            for path, module in modules.items():
                del vars(module)["forward"]
                if own[path] is not None:
                    vars(module)["forward"] = own[path]
        return logits


@contextmanager
def short_logits(model: PreTrainedModel) -> Iterator[Trunk]:
    """While it lasts, one pass of `model` makes logits of its first positions alone.

    Nothing changes, and `hidden` stays None, for models without an output embedding or whose layers
    are called by the model itself.
    """
    found, running = Trunk(), [0]
    paths, last = _trunk(model)

    def enter(_: nn.Module, __: Any) -> None:
        running[0] += 1

    def leave(path: str, _: nn.Module, __: Any, given: Any) -> Any:
        running[0] -= 1
        if running[0]:
            return None
        hidden = _hidden(given)
        if hidden is None:
            return None
        if not last.startswith(f"{path}."):
            found.given[path] = _with_hidden(given, hidden.detach())
            return None
        found.hidden, found.last = hidden, path
        found.given[path] = _with_hidden(given, hidden.new_empty(0))
        return _with_hidden(given, hidden[:1, :SHOWN])

    handles = []
    for path in paths:
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(partial(leave, path)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _trunk(model: PreTrainedModel) -> tuple[list[str], str]:
    """Modules that hold lists of layers, and the list whose layers run last; none without a head."""
    head = model.get_output_embeddings()
    if head is None:
        return [], ""
    names = {module: path for path, module in model.named_modules()}
    modules = {p: module for module, p in names.items() if isinstance(module, nn.ModuleList)}
    lists = list(modules)
    if model.config.is_encoder_decoder:
        decoder = f"{names[model.get_decoder()]}."
        of_last = [path for path in lists if path.startswith(decoder)]
    else:
        of_last = lists
    if not of_last:
        return [], ""
    last = max(of_last, key=lambda path: len(modules[path]))
    parents: dict[str, None] = {}
    for path in lists:
        parts = path.split(".")[:-1]
        parents |= dict.fromkeys(".".join(parts[: n + 1]) for n in range(len(parts)))
    own = f"{names[head]}."
    return [
        path
        for path in parents
        if not own.startswith(f"{path}.")
        and not isinstance(model.get_submodule(path), nn.ModuleList)
    ], last


def _handed_on(given: Any, *_: Any, **__: Any) -> Any:
    return given


def _hidden(given: Any) -> Tensor | None:
    """The hidden states `[B, T, D]` in what a module gave."""
    if isinstance(given, ModelOutput):
        given = given.get("last_hidden_state")
    elif isinstance(given, tuple):
        given = given[0]
    return given if isinstance(given, Tensor) and given.ndim == 3 else None


def _with_hidden(given: Any, hidden: Tensor) -> Any:
    if isinstance(given, ModelOutput):
        changed: Any = given  # a data class whenever it is one of these
        return replace(changed, last_hidden_state=hidden)
    return (hidden, *given[1:]) if isinstance(given, tuple) else hidden
