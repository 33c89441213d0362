"""Run a batch, and listen: to the inputs of modules, or to the experts that run; with or without logits.

    with watching(sparse_mlps(model), lambda layer, x_TD, mask_TE: ...):   # anything that runs
        model(ids)
    with observing(model, batch, listener, scores=True):                    # padding left out
        walk(model, batch)                                                  # listener.hear(Heard(...))

    with short_logits(model) as trunk:
        model(**inputs)                       # logits of two positions alone
    head = Head(model, inputs, trunk.last, trunk.given)
    logits_1CV = head(trunk.hidden[:1, :8])   # of any hidden states, by the model's own code

Logits of a whole batch may take more memory than the model. The modules that hold the layers hand on
the hidden states of two positions in place of all, so that the model itself makes logits of those;
called again with the same modules handing on other hidden states, it makes logits of these. What it
does to them (biases, scales, caps) is therefore its own code, and no family is known here.

Shapes: B documents, T tokens (where one listens, without padding), C positions of a chunk, D width, E experts,
V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from moefy.data.corpus import Batch
from moefy.experts.moefied import of
from moefy.experts.placement import device_of
from moefy.experts.routed import SCORES, Routed, alone
from moefy.experts.sparse_mlp import SparseMlp
from moefy.models.answers import answer_of, arguments
from moefy.models.library import hidden_of
from moefy.models.locate import Place, side_of

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
    head, answer = model.get_output_embeddings(), answer_of(model)
    if head is None or not answer.tokens or answer.field != "logits":
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


Observer = Callable[[int, Tensor, Tensor], None]
"""Called with the number of a module, its input `[T, D]` and the mask of all its experts `[T, E]`."""


@contextmanager
def watching(modules: Mapping[int, Routed], observer: Observer) -> Iterator[None]:
    """While this lasts, call `observer` whenever one of these modules runs, padding included."""
    with alone(modules.values()):
        before = {number: module.observer for number, module in modules.items()}
        try:
            for number, module in modules.items():
                module.observer = partial(observer, number)
            yield
        finally:
            for number, module in modules.items():
                module.observer = before[number]


@dataclass(frozen=True)
class Heard:
    """One layer in one forward pass, padding left out."""

    layer: int
    side: str
    """Whose tokens it reads: `encoder` or `decoder`."""
    batch: Batch
    module: Routed
    """The SparseMlp that ran, or the SparseHeads."""
    x_TD: Tensor
    mask_TE: Tensor
    """Which of the `S + E` experts ran."""
    scores_TE: Tensor | None
    """The router's scores of the routed experts; None unless asked for and computed."""
    document_T: Tensor
    """Row of the batch that each token belongs to."""


class Listener(Protocol):
    """Whatever keeps sums over forward passes."""

    def hear(self, heard: Heard) -> None:
        """Take in one layer in one forward pass."""


@contextmanager
def observing(
    model: PreTrainedModel,
    batch: Batch,
    *listeners: Listener,
    heads: Listener | None = None,
    scores: bool = False,
) -> Iterator[None]:
    """Let the listeners hear every MLP while this batch is run, and `heads` every attention block.

    With `scores` they hear what routers of MLPs give as well.
    """
    moefied = of(model)
    with ExitStack() as stack:
        scored = stack.enter_context(_scores(moefied.mlps)) if scores else {}
        mlps = _Ears(batch, moefied.mlps, moefied.sites, listeners, scored)
        stack.enter_context(watching(moefied.mlps, mlps))
        if heads is not None:
            blocks = _Ears(batch, moefied.blocks, moefied.heads, (heads,), {})
            stack.enter_context(watching(moefied.blocks, blocks))
        yield


@dataclass(frozen=True)
class _Ears:
    """The observer that tells listeners of a batch."""

    batch: Batch
    modules: Mapping[int, Routed]
    places: Sequence[Place]
    listeners: tuple[Listener, ...]
    scored: dict[int, Tensor]

    def __call__(self, number: int, x_TD: Tensor, mask_TE: Tensor) -> None:
        side, documents = side_of(self.places[number]), len(self.batch.samples)
        rows = torch.arange(documents, device=x_TD.device)
        document_T, scores_TE = rows.repeat_interleave(len(x_TD) // documents), None
        if number in self.scored:
            scores_TE = self.scored.pop(number)
        mask_BT = self.batch.mask(side)
        if mask_BT is not None:
            keep_T = mask_BT.flatten().to(x_TD.device)
            x_TD, mask_TE, document_T = x_TD[keep_T], mask_TE[keep_T], document_T[keep_T]
            scores_TE = None if scores_TE is None else scores_TE[keep_T]
        module = self.modules[number]
        heard = Heard(number, side, self.batch, module, x_TD, mask_TE, scores_TE, document_T)
        for listener in self.listeners:
            listener.hear(heard)


@contextmanager
def _scores(modules: Mapping[int, SparseMlp]) -> Iterator[dict[int, Tensor]]:
    """What every router gave in the pass under way, by layer."""
    scored: dict[int, Tensor] = {}

    def keep(number: int, _: nn.Module, __: object, scores: Tensor) -> None:
        scored[number] = scores.reshape(-1, scores.shape[-1])

    handles = [
        module.get_submodule(SCORES).register_forward_hook(partial(keep, number))
        for number, module in modules.items()
    ]
    try:
        yield scored
    finally:
        for handle in handles:
            handle.remove()


def run(model: PreTrainedModel, batch: Batch) -> object:
    """One forward pass without a cache, on the device of the model."""
    return model(**inputs_of(model, batch))


def walk(model: PreTrainedModel, batch: Batch) -> None:
    """`run` for those who listen alone: logits are made of two positions only."""
    whole = "pixel_values" in batch.inputs or "labels" in batch.inputs
    with nullcontext() if whole else short_logits(model):
        run(model, batch)


def inputs_of(
    model: PreTrainedModel, batch: Batch, device: torch.device | None = None
) -> dict[str, Any]:
    """What a model is called with: the batch on its device, or on `device`, without a cache."""
    where = device or device_of(model)
    inputs: dict[str, Any] = {name: value.to(where) for name, value in batch.inputs.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    elif "use_cache" in arguments(type(model)) or model.can_generate():
        inputs["use_cache"] = False
    return inputs


def listen(
    model: nn.Module, places: Sequence[Place], observer: Callable[[Any, Tensor], None]
) -> list[torch.utils.hooks.RemovableHandle]:
    """Call `observer` with every place and its input `[T, D]` in every forward pass; returns the hooks."""

    def hook(site: Place) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Any]], None]:
        def pre(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            hidden = hidden_of(args, kwargs, site.width)
            observer(site, hidden.detach().reshape(-1, site.width))

        return pre

    modules = [model.get_submodule(site.module) for site in places]
    return [
        module.register_forward_pre_hook(hook(site), with_kwargs=True)
        for module, site in zip(modules, places, strict=True)
    ]
