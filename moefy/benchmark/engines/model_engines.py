"""How each engine runs a whole model: a prompt at once, then token by token with a cache.

Shapes: B sequences, T tokens, V vocabulary.
"""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache

from moefy.benchmark.engines.llama_cpp import LlamaCpp
from moefy.benchmark.engines.table import LLAMA_CPP, PREFIX, Choice, Unavailable, serve
from moefy.errors import MoefyError
from moefy.experts.backends.linears import native_linears
from moefy.experts.backends.stock_moe import register_experts
from moefy.experts.offload import device_of
from moefy.experts.sparse_mlp import use_backend
from moefy.models.library import cache_argument

GRAPHS = 64
"""Most graphs of one function: beyond that torch would quietly run without any."""


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


class TransformersSession:
    """A transformers model with a cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        ids_BT: Tensor,
        prompt: int,
        *,
        dense: bool,
        before: Callable[[], object] | None = None,
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
        if self.before is not None:
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
    """The option that computes only so many last logits, of models that have it."""
    takes = inspect.signature(model.forward).parameters
    return {"logits_to_keep": logits} if "logits_to_keep" in takes else {}


class Models:
    """The models that engines run, each loaded once."""

    def __init__(
        self, dense: PreTrainedModel, sparse: PreTrainedModel, placement: dict[str, Any]
    ) -> None:
        """`placement` is how stock mixtures of experts are loaded: as the other two were."""
        self.dense, self.sparse, self.placement = dense, sparse, placement
        self.stock: dict[Path, Any] = {}
        self.gguf: dict[Path, LlamaCpp] = {}

    def session(self, choice: Choice, ids_BT: Tensor, prompt: int) -> Session:
        """An engine on these ids, the first `prompt` of which are the prompt.

        Raises `Unavailable` where it does not run here, `MoefyError` for a path that is none.
        """
        serve(choice, device_of(self.sparse))
        if choice.dense:
            return TransformersSession(
                self.dense, ids_BT, prompt, dense=True, compiled=choice.compiled,
                before=lambda: native_linears(self.dense, choice.linears),
            )  # fmt: skip
        if choice.name == LLAMA_CPP:
            return self._llama_cpp(choice, ids_BT, prompt)
        if choice.experts is not None:
            return self._experts(choice, ids_BT, prompt)
        return TransformersSession(
            self.sparse, ids_BT, prompt, dense=False, compiled=choice.compiled,
            before=lambda: use_backend(native_linears(self.sparse, choice.linears), choice.base),
        )  # fmt: skip

    def _experts(self, choice: Choice, ids_BT: Tensor, prompt: int) -> Session:
        if choice.path is None:
            raise Unavailable(
                f"needs the model as a stock mixture of experts: moefy export MODEL FOLDER --to "
                f"mixtral, then --engine {PREFIX}=FOLDER"
            )
        name, path = choice.experts, choice.path
        if path not in self.stock:
            self.stock[path] = _load_stock(path, self.placement)
        model = self.stock[path]
        return TransformersSession(
            model, ids_BT, prompt, dense=False,
            before=lambda: model.set_experts_implementation(name),
        )  # fmt: skip

    def _llama_cpp(self, choice: Choice, ids_BT: Tensor, prompt: int) -> Session:
        if choice.path is None:
            raise Unavailable(f"needs a GGUF file: --engine {LLAMA_CPP}=FILE.gguf")
        if not choice.path.is_file():
            raise MoefyError(f"--engine {LLAMA_CPP}={choice.path}: no such file")
        if len(ids_BT) > 1:
            raise Unavailable("runs one sequence at a time here")
        if choice.path not in self.gguf:
            self.gguf[choice.path] = LlamaCpp(choice.path, context=ids_BT.shape[1])
        return self.gguf[choice.path].begin(ids_BT[0].tolist(), prompt)


def _load_stock(path: Path, placement: dict[str, Any]) -> Any:
    """A mixture of experts as transformers loads it."""
    register_experts()
    if not (path / "config.json").is_file():
        raise MoefyError(f"--engine {PREFIX}={path}: not a model folder (no config.json)")
    model = AutoModelForCausalLM.from_pretrained(
        path,
        trust_remote_code=False,
        experts_implementation="eager",
        **{"dtype": "auto", **placement},
    )
    if not model._can_set_experts_implementation():
        raise MoefyError(
            f"--engine {PREFIX}={path}: {type(model).__name__} is no mixture of experts; moefy export "
            "writes one"
        )
    return model.eval()
