"""What an engine of `moefy bench` is: a row that says what it computes, where, and by which functions.

An engine computes single layers (`layers`: one call for each layer of a `Case`), runs whole models (`session`:
a prompt at once, then token by token with a cache), or both. `engines/__init__.py` has the table.

Shapes: T tokens, D width, E experts, B sequences, V vocabulary.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

from moefy.benchmark.layers import Case
from moefy.experts.backends.base import CPU, GPU
from moefy.experts.placement import device_of
from moefy.models.library import cache_argument

AUTO, MASKED = "auto", "masked"
"""The backend that chooses among all, and the one that every device has."""
GRAPHS = 64
"""Most graphs of one function: beyond that torch would quietly run without any."""

Call = Callable[[], Tensor]


class Unavailable(Exception):
    """Why an engine is not timed; tables list it with this reason."""


class Session(Protocol):
    """One engine at work on given ids."""

    @property
    def dense(self) -> bool:
        """Whether it runs the dense model."""
        ...

    def reset(self) -> None:
        """Forget all tokens."""
        ...

    def prefill(self) -> Tensor:
        """Run the prompt; the logits `[B, V]` behind it."""
        ...

    def step(self, position: int) -> Tensor:
        """Run the token at a position behind the prompt; the logits `[B, V]` behind it."""
        ...


@dataclass
class Models:
    """The models that engines run, each loaded once."""

    dense: PreTrainedModel
    sparse: PreTrainedModel
    placement: dict[str, Any] = field(default_factory=dict)
    """How others are loaded: as these two were."""
    loaded: dict[Path, Any] = field(default_factory=dict)
    """What engines have loaded from files and folders of their own."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One way to compute layers or to run a model."""

    name: str
    layers: Callable[["Engine", Case], list[Call]] | None = None
    session: Callable[["Engine", Models, Tensor, int], Session] | None = None
    """From ids `[B, T]` and how many of them are the prompt."""
    dense: bool = False
    """Whether it is a baseline."""
    backend: str = ""
    """How a `SparseMlp` computes its experts; empty for engines that do not run one."""
    devices: frozenset[str] = frozenset({CPU, GPU})
    compiled: bool = False
    """Whether `torch.compile` makes a graph of it."""
    linears: bool = False
    """Whether `moefy.native_linears` computes the linear maps of the model too."""
    path: Path | None = None
    """The file or folder it runs instead of the model that is timed."""
    own_size: bool = False
    """Whether what it reads is stored in a way of its own, so that its bytes are not known."""

    @property
    def label(self) -> str:
        """What records and tables call it."""
        name = "compiled" if self.dense else f"{self.name}+compiled"
        return (name if self.compiled else self.name) + "+linears" * self.linears

    def serves(self, level: str, device: torch.device) -> str | None:
        """None, or why it computes nothing of a level (`kernel`, `layer`, `model`) on a device."""
        at = GPU if device.type == GPU else CPU
        if at not in self.devices or (self.linears and at == GPU):
            return "its Triton kernels need a GPU" if at == CPU else "made for CPUs"
        whole = self.linears or (self.compiled and not self.dense)
        if level != "model" and (self.layers is None or whole):
            return "runs whole models: --level model"
        if level == "model" and self.session is None:
            return "computes single layers: --level layer"
        return None

    def prepare(self, level: str, case: Case) -> list[Call]:
        """One call for each layer; raises `Unavailable` where it does not compute the case."""
        self._check(level, case.inputs[0].device)
        assert self.layers is not None
        return self.layers(self, case)

    def begin(self, models: Models, ids_BT: Tensor, prompt: int) -> Session:
        """It on these ids, the first `prompt` of which are the prompt.

        Raises `Unavailable` where it does not run here, `MoefyError` for a path that is none.
        """
        self._check("model", device_of(models.sparse))
        assert self.session is not None
        return self.session(self, models, ids_BT, prompt)

    def _check(self, level: str, device: torch.device) -> None:
        why_not = self.serves(level, device)
        if why_not is not None:
            raise Unavailable(why_not)


class TransformersSession:
    """A transformers model with a cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        ids_BT: Tensor,
        prompt: int,
        *,
        before: Callable[[], object],
        dense: bool = False,
        compiled: bool = False,
    ) -> None:
        """`before` prepares a model that several engines share."""
        self.model, self.dense, self.before = model, dense, before
        self.ids_BT, self.prompt = ids_BT.to(device_of(model)), prompt
        self.forward: Any = model
        self.static: StaticCache | None = None
        self.cache: Any = None
        self.options, self.cache_name = keeping(model, 1), cache_argument(model)
        if compiled:
            self._compile()

    def _compile(self) -> None:
        """Compile with a cache of fixed size, which a first pass lays out as transformers does.

        Raises `Unavailable` for weights that are offloaded.
        """
        if self.model.device.type == "meta":
            raise Unavailable("the weights are offloaded, which cannot be compiled")
        length = self.ids_BT.shape[1]
        self.static = StaticCache(config=self.model.config, max_cache_len=length)
        self.reset()
        self.prefill()
        # All engines compile one forward, each for prompt and token, as it is led and as it chooses.
        torch._dynamo.config.recompile_limit = GRAPHS
        self.forward = torch.compile(self.model, dynamic=False)

    def reset(self) -> None:
        """Begin with an empty cache."""
        self.before()
        if self.static is None:
            self.cache = DynamicCache(config=self.model.config)
        else:
            self.static.reset()
            self.cache = self.static

    def prefill(self) -> Tensor:
        """Run the prompt."""
        return self._run(self.ids_BT[:, : self.prompt])

    def step(self, position: int) -> Tensor:
        """Run one token of every sequence."""
        return self._run(self.ids_BT[:, position, None])

    def _run(self, ids_BT: Tensor) -> Tensor:
        output = self.forward(
            input_ids=ids_BT, use_cache=True, **{self.cache_name: self.cache}, **self.options
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV


def keeping(model: PreTrainedModel, logits: int) -> dict[str, int]:
    """The option that computes only the last n logits, of models that have it."""
    takes = inspect.signature(model.forward).parameters
    return {"logits_to_keep": logits} if "logits_to_keep" in takes else {}
