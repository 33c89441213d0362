"""What can be timed, by name.

    eager, compiled                     the dense computation: torch as it is, torch.compile
    masked, views, ..., auto            moefy's backends, as `BACKENDS` names them
    ...+linears                         the same with `moefy.native_linears`, of whole models on CPUs
    auto+compiled, auto+compiled+linears    a whole moefied model under torch.compile
    experts:eager, experts:batched_mm,  transformers' implementations of stock mixtures of experts
    experts:grouped_mm, experts:moefy
    llama.cpp                           llama.cpp on a GGUF file

`layer_engines` and `model_engines` say how each computes a layer and runs a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moefy.errors import MoefyError, unknown_choice
from moefy.experts.backends import BACKENDS
from moefy.experts.backends.base import CPU, GPU

EAGER, COMPILED, AUTO, LLAMA_CPP, ALL = "eager", "compiled", "auto", "llama.cpp", "all"
DENSE = (EAGER, COMPILED)
EXPERTS = ("eager", "batched_mm", "grouped_mm", "moefy")
"""Implementations of transformers' experts; here `experts:` stands before each, alone for all."""
LINEARS, GRAPH = "+linears", "+compiled"
PREFIX = "experts"
MASKED = "masked"
"""The backend that every device has."""


class Unavailable(Exception):
    """Why an engine is not timed; tables list it with this reason."""


@dataclass(frozen=True)
class Choice:
    """An engine by name, and the file or folder it runs where it needs one."""

    name: str
    path: Path | None = None

    @property
    def label(self) -> str:
        """What tables call it: files have names of their own."""
        return self.name if self.path is None or self.experts else self.path.name

    @property
    def dense(self) -> bool:
        """Whether it is one of the dense baselines."""
        return self.base in DENSE

    @property
    def base(self) -> str:
        """The name without what is said of linear maps and of compiling."""
        return self.name.partition("+")[0]

    @property
    def linears(self) -> bool:
        """Whether linear maps are computed by moefy's kernel too."""
        return self.name.endswith(LINEARS)

    @property
    def compiled(self) -> bool:
        """Whether torch.compile makes a graph of the whole model."""
        return self.base == COMPILED or GRAPH in self.name

    @property
    def experts(self) -> str | None:
        """The implementation of transformers' experts that it names."""
        prefix, _, name = self.name.partition(":")
        return name if prefix == PREFIX and name else None


def names() -> list[str]:
    """All engines; backends are read when asked for, so that one registered later is among them."""
    experts = [f"{PREFIX}:{name}" for name in EXPERTS]
    graph = AUTO + GRAPH
    linears = [f"{name}{LINEARS}" for name in (*DENSE, AUTO, graph)]
    return [*DENSE, *BACKENDS, AUTO, graph, *linears, *experts, LLAMA_CPP]


def choose(given: Sequence[str]) -> list[Choice]:
    """The engines of `--engine`, each `NAME` or `NAME=PATH`; nothing or `all` is all of them.

    The eager dense engine is always among them, since something has to be compared with. Raises
    `MoefyError` for names that are unknown and paths that are out of place.
    """
    found: list[Choice] = []
    for text in given or [ALL]:
        name, equals, path = text.partition("=")
        if equals and (name.partition("+")[0] in (*DENSE, *BACKENDS, AUTO, ALL) or not path):
            raise MoefyError(
                f"--engine {text}: only {LLAMA_CPP}=FILE.gguf and {PREFIX}=FOLDER take a path"
            )
        found += [Choice(one, Path(path) if equals else None) for one in _meant(name)]
    with_path = {choice.name for choice in found if choice.path is not None}
    kept = [c for c in found if c.path is not None or c.name not in with_path]
    labelled = {choice.label: choice for choice in [Choice(EAGER), *kept]}
    for choice in kept:
        if labelled[choice.label] != choice:
            raise MoefyError(
                f"--engine {choice.name}={choice.path}: {labelled[choice.label].path} goes by the "
                f"same name, {choice.label}; rename one of them"
            )
    return list(labelled.values())


def _meant(name: str) -> list[str]:
    if name == ALL:
        return names()
    if name == PREFIX:
        return [f"{PREFIX}:{one}" for one in EXPERTS]
    if name not in names():
        raise MoefyError(unknown_choice("engine", name, [*names(), PREFIX, ALL]))
    return [name]


def serve(choice: Choice, device: torch.device) -> None:
    """Raise `Unavailable` where an engine never runs on such a device."""
    on_gpu = device.type == "cuda"
    if choice.experts == "moefy" or (
        choice.name in BACKENDS and CPU not in BACKENDS[choice.name].devices
    ):
        if not on_gpu:
            raise Unavailable("its Triton kernels need a GPU")
    elif on_gpu and (
        choice.linears or (choice.name in BACKENDS and GPU not in BACKENDS[choice.name].devices)
    ):
        raise Unavailable("made for CPUs")
