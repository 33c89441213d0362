"""A transformers model whose weights stay on disk, run layer by layer instead of batch by batch.

    layerwise = LayerwiseModel(checkpoint, torch.float32)
    hidden = layerwise.enter(batch)                      # what the first layer reads
    for index in range(len(layerwise.sites)):
        with layerwise.layer(index):                     # its weights are in memory now
            hidden = layerwise.run(index, batch, hidden)
    outputs = layerwise.leave(batch, hidden)             # moefy.evaluation.outputs

The stock model itself says what is called with what: masks, positions and whatever else its layers are
given are taken from its own forward pass, in which layers hand on what they get. A model fits where
every layer turns hidden states into hidden states and nothing else passes between layers.

Shapes: B documents, T positions, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from torch.nn.functional import linear

from moefy.data.corpus import Batch
from moefy.errors import UnsupportedModel
from moefy.evaluation.outputs import Outputs, run_outputs
from moefy.experts.loading import moefied
from moefy.experts.passes import inputs_of
from moefy.experts.placement import StoredMlp, stored_names
from moefy.experts.sparse_mlp import SparseMlp, sparse_mlps
from moefy.models.artefact import Artefact
from moefy.models.checkpoint import Checkpoint
from moefy.models.config import read_config
from moefy.models.library import find_hidden, hidden_of
from moefy.models.locate import Site, meta_model, sites
from moefy.run.computing import now
from moefy.run.memory import give_back

SLICE = 16384
"""Rows of the output embedding that are in memory at a time."""


@dataclass(frozen=True)
class _LayerCall:
    """With what a layer was called."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Tensor:
        """The hidden states, which come first or by their name."""
        return hidden_of(self.args, self.kwargs)

    @property
    def others(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """All but the hidden states."""
        given = self.put(None)
        return given.args, given.kwargs

    def put(self, hidden: Tensor | None) -> "_LayerCall":
        """The same call with other hidden states."""
        place = find_hidden(self.args, self.kwargs)
        if isinstance(place, int):
            return _LayerCall((*self.args[:place], hidden, *self.args[place + 1 :]), self.kwargs)
        return _LayerCall(self.args, {**self.kwargs, place: hidden})


class _Reached(Exception):
    """The layer that was asked for is called: the rest of the pass is of no use."""


class LayerwiseModel:
    """A model of which only the layer in use is in memory."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, artefact: Artefact | None = None
    ) -> None:
        """`artefact` makes it the moefied model of a folder in full form; `require_a_chain` says of
        which checkpoints there can be one."""
        config = read_config(checkpoint)
        with init_empty_weights(include_buffers=False):
            self.model = type(meta_model(config))._from_config(config, dtype=dtype)
        self.model.eval()
        self.model.tie_weights()
        self.checkpoint, self.dtype = checkpoint, dtype
        self.device = now().where
        self.names = stored_names(self.model, checkpoint)
        self.sites = sites(self.model)
        if artefact is not None:
            moefied(self.model, artefact, permute=False)
        self.layers = [self.model.get_submodule(site.layer) for site in self.sites]
        self.in_tuple = False
        """Whether layers return their hidden states in a tuple."""
        self._entered: Tensor | None = None
        self._stop: int | None = None
        self._called: _LayerCall | None = None
        self._filling = 0.0
        """What embeddings hold while only calls of layers are of interest."""
        self._tried: set[int] = set()
        for index, layer in enumerate(self.layers):
            layer.forward = partial(self._pass, index)
        self._load_rest()

    def stored(self, name: str) -> str:
        """The stored tensor of a parameter, or of the one that it is tied to."""
        tied: dict[str, str] = self.model.all_tied_weights_keys
        return self.names[name if name in self.names else tied[name]]

    def _load_rest(self) -> None:
        """All that belongs to no layer, but the embeddings: of those single rows are read."""
        below = tuple(f"{site.layer}." for site in self.sites)
        read, written = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        skip: set[int] = set()
        owners = {module: name for name, module in self.model.named_modules()}
        if isinstance(read, nn.Embedding):
            skip.add(id(read))
            rows = self.checkpoint.map(self.stored(f"{owners[read]}.weight"))
            # Of use to gradients alone, and its row may not be among those that are read.
            read.padding_idx = None
            read.register_forward_pre_hook(partial(self._look_up, rows))
            read.register_forward_hook(partial(_put_back, read.weight))
        if type(written) is nn.Linear:
            skip.add(id(written))
            stored = self.stored(f"{owners[written]}.weight")
            bias = None
            if written.bias is not None:
                bias = self.checkpoint.read(self.stored(f"{owners[written]}.bias"))
                bias = bias.to(self.device, self.dtype)
            vars(written)["forward"] = partial(self._sliced, stored, bias)
        for path, module in self.model.named_modules():
            if id(module) in skip or f"{path}.".startswith(below):
                continue
            for name, _ in list(module.named_parameters(path, recurse=False)):
                self._set(self.model, name, self.checkpoint.read(self.stored(name)))
        # Buffers are small: those that are stored are read, also the layers', and all are at hand.
        for name, buffer in list(self.model.named_buffers()):
            value = self.checkpoint.read(self.names[name]) if name in self.names else buffer
            set_module_tensor_to_device(
                self.model, name, self.device, value=value, dtype=buffer.dtype
            )
        for module in sparse_mlps(self.model).values():
            module.router.to(self.device)
            module.compensation.to(self.device)

    def _set(self, module: nn.Module, name: str, value: Tensor) -> None:
        set_module_tensor_to_device(module, name, self.device, value=value, dtype=self.dtype)

    def _look_up(self, rows_VD: Tensor, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """Give an embedding the rows that it is asked for, and ids among those."""
        if self._stop not in (None, 0):
            # Only what layers are called with is asked for: masks and positions.
            ids = torch.zeros_like(args[0])
            row_D = torch.full((1, rows_VD.shape[1]), self._filling, dtype=self.dtype)
            module.weight = nn.Parameter(row_D)
        else:
            wanted, ids = args[0].cpu().unique(return_inverse=True)
            module.weight = nn.Parameter(rows_VD[wanted].to(self.dtype))
        module.to(self.device)
        return (ids.to(self.device),)

    def _sliced(self, name: str, bias_V: Tensor | None, x: Tensor) -> Tensor:
        """The output embedding, a slice of its rows at a time."""
        rows = self.checkpoint.tensors[name].shape[0]
        logits, first = x.new_empty(*x.shape[:-1], rows), 0
        for slice_VD in self.checkpoint.rows(name, SLICE):
            last = first + len(slice_VD)
            logits[..., first:last] = linear(x, slice_VD.to(self.device, self.dtype))
            first = last
        return logits if bias_V is None else logits.add_(bias_V)

    def _pass(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """What a layer does while the model around it runs: hand on."""
        if index == self._stop:
            self._called = _LayerCall(args, kwargs)
            raise _Reached
        hidden = _LayerCall(args, kwargs).hidden
        if index == 0 and self._entered is not None:
            hidden = self._entered
        return (hidden,) if self.in_tuple else hidden

    def _called_with(self, index: int, batch: Batch) -> _LayerCall:
        """With what the model calls layer `index` for this batch."""
        self._called, self._stop = None, index
        try:
            with suppress(_Reached):
                self.model(**inputs_of(self.model, batch, self.device))
        except (IndexError, KeyError) as error:
            raise self._not_a_chain(
                index, f"reads what a layer before it made ({error})"
            ) from error
        finally:
            self._stop = None
        # Not carried by the exception: its frames would keep whole activations until they are collected.
        given, self._called = self._called, None
        if given is None:
            raise self._not_a_chain(index, "was not run")
        return given

    def _require_no_more(self, index: int, batch: Batch, given: _LayerCall) -> None:
        """Refuse a layer that is given something made of the embeddings besides its hidden states."""
        self._tried.add(index)
        if index == 0:
            return
        self._filling = 1.0
        again = self._called_with(index, batch)
        self._filling = 0.0
        if not _same(given.others, again.others):
            raise self._not_a_chain(index, "is given more than hidden states")

    def _not_a_chain(self, index: int, what: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self.model.config.model_type}: {self.sites[index].layer} {what}, which streaming cannot "
            "carry; convert it in memory"
        )

    @torch.no_grad()
    def enter(self, batch: Batch) -> Tensor:
        """What the first layer reads `[B, T, D]`."""
        return self._called_with(0, batch).hidden

    @torch.no_grad()
    def run(self, index: int, batch: Batch, hidden: Tensor) -> Tensor:
        """What layer `index`, whose weights are in memory, makes of hidden states `[B, T, D]`."""
        given = self._called_with(index, batch)
        if index not in self._tried:
            self._require_no_more(index, batch, given)
        layer: Any = self.layers[index]
        hidden = hidden.to(self.device, self.dtype)
        given = given.put(hidden)
        result = type(layer).forward(layer, *given.args, **given.kwargs)
        self.in_tuple = isinstance(result, tuple)
        found = result[0] if isinstance(result, tuple) else result
        assert isinstance(found, Tensor)
        return found

    @torch.no_grad()
    def leave(self, batch: Batch, hidden: Tensor) -> Outputs:
        """What the model puts out, given the last layer's output `[B, T, D]`."""
        self._entered = hidden.to(self.device, self.dtype)
        try:
            return run_outputs(self.model, batch, device=self.device)
        finally:
            self._entered = None

    @contextmanager
    def layer(
        self, index: int, seen: Callable[[str, Tensor], None] = lambda name, value: None
    ) -> Iterator[None]:
        """The weights of one layer in memory; what was fitted of it stays there.

        `seen` is given the name of every parameter, and its value as it is stored.
        """
        site, layer = self.sites[index], self.layers[index]
        for name, value in self._weights(site, layer):
            seen(f"{site.layer}.{name}", value)
            self._set(layer, name, value)
        try:
            yield
        finally:
            routed = [module for module in layer.modules() if isinstance(module, SparseMlp)]
            for module in routed:
                module.context.previous_TD = None  # the inputs of its last pass
            parts = (part for module in routed for part in (module.router, module.compensation))
            fitted = {id(value) for part in parts for value in part.parameters()}
            for name in [n for n, value in layer.named_parameters() if id(value) not in fitted]:
                set_module_tensor_to_device(layer, name, "meta")
            give_back()

    def _weights(self, site: Site, layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Names in the layer and values of all that it has on disk, each read once."""
        inside = site.module.removeprefix(f"{site.layer}.")
        module = layer.get_submodule(inside)
        codes = module.stored if isinstance(module, SparseMlp) else None
        stored = StoredMlp(self.checkpoint, self.names, site, None, codes)
        for name in [name for name, p in layer.named_parameters() if p.is_meta]:
            parent, _, last = name.rpartition(".")
            if isinstance(layer.get_submodule(parent), SparseMlp) and parent == inside:
                yield name, stored[last]
            else:
                yield name, self.checkpoint.read(self.stored(f"{site.layer}.{name}"))


def _put_back(weight: Tensor, module: nn.Module, _: Any, __: Any) -> None:
    """Let an embedding be without its rows again."""
    assert isinstance(weight, nn.Parameter)
    module.weight = weight


def _same(first: Any, second: Any) -> bool:
    """Whether two structures hold equal tensors; other things are not compared."""
    if isinstance(first, Tensor):
        return first.shape == second.shape and torch.equal(first, second)
    if isinstance(first, dict):
        return all(_same(first[key], second[key]) for key in first)
    if isinstance(first, (tuple, list)):
        return all(_same(a, b) for a, b in zip(first, second, strict=True))
    return True


def require_a_chain(checkpoint: Checkpoint) -> None:
    """Raise `UnsupportedModel` where a model cannot be run so: the layers must be one list, each with
    one MLP, and every parameter must be stored as it is."""
    model = meta_model(read_config(checkpoint))
    found = sites(model)
    lists = [model.get_submodule(path) for path in {s.layer.rpartition(".")[0] for s in found}]
    kind = found[0].family.kind
    chain = isinstance(lists[0], nn.ModuleList) and len(lists) == 1 and len(lists[0]) == len(found)
    if not chain or kind not in ("decoder", "encoder"):
        raise UnsupportedModel(
            f"{model.config.model_type}: cannot be streamed, its layers are not one chain of blocks "
            "with an MLP each; convert it in memory"
        )
    names, tied = stored_names(model, checkpoint), model.all_tied_weights_keys
    for name, _ in model.named_parameters():
        if name not in names and tied.get(name) not in names:
            raise UnsupportedModel(
                f"{checkpoint.folder}: no tensor on disk is {name} as it stands; convert it in memory"
            )
