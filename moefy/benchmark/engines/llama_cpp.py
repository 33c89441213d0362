"""llama.cpp as an engine, by its Python package `llama-cpp-python`: a GGUF file, ids in, logits out.

Shapes: V vocabulary.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moefy.benchmark.engines.table import Unavailable

PACKAGE = "llama_cpp"


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
                n_gpu_layers=-1 if torch.cuda.is_available() else 0,
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
        found = self.library.llama_get_logits_ith(self.model.ctx, -1)
        logits_V = np.ctypeslib.as_array(found, shape=(self.model.n_vocab(),))
        return torch.from_numpy(logits_V.copy())[None]
