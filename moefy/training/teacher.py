"""Who teaches in recovery: the dense model, which lies inside the moefied one as long as its weights are known.

    teacher = DenseSelf(student, parameters)    # before the first step
    want = teacher(batch)                       # what the dense model says, whatever has been learned since

The dense function is that of the same modules with every expert on. What is trained of its weights is kept
as it was, and put in place for a pass; adapters are switched off. Nothing else is held twice.

Shapes: none of its own.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moefy.data.corpus import Batch
from moefy.evaluation.outputs import Outputs, run_outputs
from moefy.experts.sparse_mlp import SparseMlp, all_experts

Teacher = Callable[[Batch], Outputs]
"""What the dense model puts out for a batch, without a gradient."""


class DenseSelf:
    """The dense model of a moefied one, as it was when this was made."""

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: Sequence[nn.Parameter] = (),
        without: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`parameters` are those of the dense model that will be trained; `without` switches off what
        is learned beside them."""
        self.model, self.without = model, without
        self.first = [(p, p.detach().clone()) for p in parameters]

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """Only `data` changes hands: a graph that holds the parameters stays valid."""
        learned = [p.data for p, _ in self.first]
        for parameter, value in self.first:
            parameter.data = value
        try:
            with uncached():
                yield
        finally:
            for (parameter, _), value in zip(self.first, learned, strict=True):
                parameter.data = value

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Outputs:
        """What it puts out; logits are made later, by the head as it was."""
        with self._as_it_was(), self.without(), all_experts(self.model):
            found = run_outputs(self.model, batch)
        head = found.head
        if head is None:
            return found

        def logits(hidden_BCD: Tensor) -> Tensor:
            with self._as_it_was():
                return head(hidden_BCD)

        return replace(found, head=logits)


def uncached() -> torch.autocast:
    """Autocast as it is, but for its cache: that takes a copy in 16 bits for the same parameter whatever lies
    in it, with a gradient or without."""
    kind = "cuda" if torch.is_autocast_enabled("cuda") else "cpu"
    return torch.autocast(
        kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False
    )


@contextmanager
def sixteen_bits(model: nn.Module, leave: Collection[nn.Parameter] = ()) -> Iterator[None]:
    """What does not learn, and `leave`s not out, lies in the 16 bits that autocast makes of it for every product,
    where that loses nothing: half the memory, and no cast of every matrix in every pass.

    Embeddings still give 32 bits, as the stream that all layers add to.
    """
    wide: list[nn.Parameter] = []
    handles = []
    left = {id(p) for p in leave}
    for module in model.modules():
        if isinstance(module, SparseMlp | nn.Linear | Conv1D | nn.Embedding):
            wide += [
                p
                for p in module.parameters(recurse=False)
                if id(p) not in left and not p.requires_grad and p.dtype == torch.float32
                and torch.equal(p.detach().bfloat16().float(), p)
            ]  # fmt: skip
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(lambda _, __, rows: rows.float()))
    for parameter in wide:
        parameter.data = parameter.data.bfloat16()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in wide:
            parameter.data = parameter.data.float()


def another(dense: PreTrainedModel) -> Teacher:
    """A dense model of its own."""

    @torch.no_grad()
    def teacher(batch: Batch) -> Outputs:
        return run_outputs(dense, batch)

    return teacher
