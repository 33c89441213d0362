"""Engines that run what `moefy export` writes: transformers' stock mixtures of experts, and llama.cpp.

Of single layers, experts are copied into transformers' modules. llama.cpp runs a GGUF file by its Python
package `llama-cpp-python`: ids in, logits out.

Shapes: T tokens, D width, E experts, K experts that run, B sequences, V vocabulary.
"""

from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from moefy.benchmark.engines.base import (
    Call,
    Engine,
    Models,
    Session,
    TransformersSession,
    Unavailable,
)
from moefy.benchmark.layers import Case
from moefy.errors import MoefyError
from moefy.experts.backends.stock_moe import register_experts
from moefy.experts.sparse_mlp import SparseMlp
from moefy.methods.tables import COMPENSATIONS, SELECTIONS
from moefy.models.mlp import DenseMlp
from moefy.run.computing import now
from moefy.run.memory import free_memory

PACKAGE = "llama_cpp"


def stock_layers(implementation: str, engine: Engine, case: Case) -> list[Call]:
    """The experts by an implementation of transformers, the router as its blocks have it."""
    for module, mask_TE in zip(case.layers.modules, case.masks, strict=True):
        reason = _not_stock(module, case.routed)
        counts_T = mask_TE.sum(1)
        if reason is None and bool((counts_T != counts_T[0]).any()):
            reason = "tokens run different numbers of experts"
        if reason is not None:
            raise Unavailable(f"not as a stock mixture of experts: {reason}")
        if implementation == "batched_mm":
            _check_fits(int(mask_TE.sum()) * module.expert_size, module.weights)
    register_experts()

    def compute(
        experts: Any, module: SparseMlp, x_TD: Tensor, ones_TK: Tensor, index_TK: Tensor | None
    ) -> Tensor:
        if index_TK is None:  # as the block of a stock mixture of experts chooses
            scores_TE = module.router(x_TD, module.routed).float()
            eps = getattr(module.selection, "eps", 1.0)
            index_TK = torch.softmax(scores_TE * eps, dim=-1).topk(ones_TK.shape[1], dim=-1).indices
        experts.config._experts_implementation = implementation
        y_TD: Tensor = experts(x_TD, index_TK, ones_TK)
        return y_TD

    calls: list[Call] = []
    for experts, module, x_TD, mask_TE in zip(
        case.layers.experts, case.layers.modules, case.inputs, case.masks, strict=True
    ):
        k = int(mask_TE[0].sum())
        index_TK = None if case.routed else mask_TE.int().topk(k, dim=1).indices.sort(1).values
        calls.append(partial(compute, experts, module, x_TD, x_TD.new_ones(len(x_TD), k), index_TK))
    return calls


def _not_stock(module: SparseMlp, routed: bool) -> str | None:
    """What of a layer a stock mixture of experts does not have; None where it has all."""
    mlp = module.running
    if mlp.gate_ND is None:
        return "the MLP has no gate"
    if not (mlp.up_bias_N is mlp.gate_bias_N is mlp.down_bias_D is mlp.centre_N is None):
        return "the MLP has biases"
    if not routed:
        return None
    if module.shared:
        return "some experts are shared"
    if not isinstance(module.selection, (SELECTIONS["topk"], SELECTIONS["softmax_topk"])):
        return f"the selection {type(module.selection).__name__}"
    if module.computes_gate:
        return "the router computes the gates"
    if not isinstance(module.compensation, COMPENSATIONS["none"]):
        return "there is a compensation"
    return None


def _check_fits(rows: int, mlp: DenseMlp) -> None:
    """Raise `Unavailable` if a copy of `rows` rows of every matrix leaves no memory for the rest."""
    copied = rows * mlp.matrices * mlp.width * mlp.up_ND.element_size()
    free = torch.cuda.mem_get_info()[0] if mlp.up_ND.is_cuda else free_memory()
    if copied > free / 2:
        raise Unavailable(
            f"copies the weights of every token's experts, {copied / 1e9:.1f} GB; "
            f"{free / 1e9:.1f} GB are free"
        )


def stock_session(
    implementation: str, engine: Engine, models: Models, ids_BT: Tensor, prompt: int
) -> Session:
    """The folder of the engine, a stock mixture of experts, in transformers."""
    path = engine.path
    if path is None:
        raise Unavailable(
            "needs the model as a stock mixture of experts: moefy export MODEL FOLDER --to mixtral, then "
            f"--experts {implementation}=FOLDER"
        )
    if path not in models.loaded:
        models.loaded[path] = _load_stock(path, models.placement)
    model = models.loaded[path]
    return TransformersSession(
        model, ids_BT, prompt, before=lambda: model.set_experts_implementation(implementation)
    )


def _load_stock(path: Path, placement: dict[str, Any]) -> Any:
    """A mixture of experts as transformers loads it."""
    register_experts()
    model = AutoModelForCausalLM.from_pretrained(
        path,
        trust_remote_code=False,
        experts_implementation="eager",
        **{"dtype": "auto", **placement},
    )
    if not model._can_set_experts_implementation():
        raise MoefyError(
            f"--experts {path}: {type(model).__name__} is no mixture of experts; moefy export writes one"
        )
    return model.eval()


def llama_cpp(engine: Engine, models: Models, ids_BT: Tensor, prompt: int) -> Session:
    """The file of the engine in llama.cpp."""
    path = engine.path
    if path is None:
        raise Unavailable("needs a GGUF file: --gguf FILE")
    if len(ids_BT) > 1:
        raise Unavailable("runs one sequence at a time here")
    if path not in models.loaded:
        models.loaded[path] = LlamaCpp(path, context=ids_BT.shape[1])
    session: LlamaCpp = models.loaded[path]
    return session.begin(ids_BT[0].tolist(), prompt)


class LlamaCpp:
    """One GGUF file on as many threads as torch has; a session on one sequence."""

    def __init__(self, path: Path, *, context: int) -> None:
        """`context` is the most tokens of a sequence; raises `Unavailable` without the package."""
        if find_spec(PACKAGE) is None:
            raise Unavailable('llama-cpp-python is not installed: pip install "moefy[llama-cpp]"')
        self.library = import_module(PACKAGE)
        threads = torch.get_num_threads()
        try:
            self.model: Any = self.library.Llama(
                model_path=str(path), n_ctx=context, n_batch=context, n_ubatch=context,
                n_threads=threads, n_threads_batch=threads, logits_all=False, verbose=False,
                n_gpu_layers=-1 if now().on_gpu else 0,
            )  # fmt: skip
        except ValueError as error:
            raise Unavailable(f"does not load: {error}") from None
        self.ids: list[int] = []
        self.prompt = 0

    @property
    def dense(self) -> bool:
        """Whether the file holds no experts, by its own metadata."""
        metadata = self.model.metadata
        architecture = metadata.get("general.architecture", "")
        return int(metadata.get(f"{architecture}.expert_count", 0)) == 0

    def begin(self, ids: list[int], prompt: int) -> "LlamaCpp":
        """A session on these ids, the first `prompt` of which are the prompt."""
        if max(ids) >= self.model.n_vocab():
            raise Unavailable(
                f"knows {self.model.n_vocab()} tokens, the prompt has token {max(ids)}: another model"
            )
        self.ids, self.prompt = ids, prompt
        return self

    def reset(self) -> None:
        """Forget all tokens."""
        self.model.reset()

    def prefill(self) -> Tensor:
        """Run the prompt; the logits `[1, V]` behind it."""
        return self._run(self.ids[: self.prompt])

    def step(self, position: int) -> Tensor:
        """Run one token; the logits `[1, V]` behind it."""
        return self._run([self.ids[position]])

    def _run(self, ids: list[int]) -> Tensor:
        self.model.eval(ids)
        # The context keeps the logits of the last token alone; asking for them waits for it.
        pointer = self.library.llama_get_logits_ith(self.model.ctx, -1)
        logits_V = np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab(),))
        return torch.from_numpy(logits_V.copy())[None]
