"""A transformers model whose weights stay on disk, run layer by layer instead of batch by batch.

    skeleton = Skeleton(checkpoint, torch.float32)
    hidden = skeleton.enter(batch)                      # what the first layer reads
    for index in range(len(skeleton.sites)):
        with skeleton.layer(index):                     # its weights are in memory now
            hidden = skeleton.run(index, batch, hidden)
    logits = skeleton.leave(batch, hidden).logits

The stock model itself says what is called with what: masks, positions and whatever else its layers are
given are taken from its own forward pass, in which layers hand on what they get. A model fits where
every layer turns hidden states into hidden states and nothing else passes between layers.

Shapes: B documents, T positions, D width, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from torch.nn.functional import linear

from moefy.activations import inputs_of
from moefy.artefact import Artefact
from moefy.checkpoint import Checkpoint
from moefy.data import Batch
from moefy.errors import UnsupportedModel
from moefy.inputs import read_config
from moefy.locate import Site, meta_model, sites
from moefy.modeling import moefied
from moefy.offload import StoredMlp, stored_names
from moefy.sparse_mlp import SparseMlp

SLICE = 16384
"""Rows of the output embedding that are in memory at a time."""


class _Reached(Exception):
    """A layer was reached; with what it was called."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_, self.kwargs = args, kwargs


class Skeleton:
    """A model of which only the layer in use is in memory."""

    def __init__(
        self, checkpoint: Checkpoint, dtype: torch.dtype, artefact: Artefact | None = None
    ) -> None:
        """`artefact` makes it the moefied model of a folder in full form.

        Raises `UnsupportedModel` where the layers do not simply follow each other.
        """
        config = read_config(checkpoint)
        with init_empty_weights(include_buffers=False):
            self.model = type(meta_model(config))._from_config(config)
        self.model.eval()
        self.model.tie_weights()
        self.checkpoint, self.dtype = checkpoint, dtype
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.names = stored_names(self.model, checkpoint)
        self.sites = sites(self.model)
        self._require_a_chain()
        if artefact is not None:
            moefied(self.model, artefact, permute=False)
        self.layers = [self.model.get_submodule(site.layer) for site in self.sites]
        self.in_tuple = False
        """Whether layers return their hidden states in a tuple."""
        self._entered: Tensor | None = None
        self._stop: int | None = None
        for index, layer in enumerate(self.layers):
            layer.forward = partial(self._pass, index)
        self._load_rest()

    def _require_a_chain(self) -> None:
        """One list of layers, each with one MLP; nothing else has been tried."""
        lists = {site.layer.rpartition(".")[0] for site in self.sites}
        found = [self.model.get_submodule(path) for path in lists]
        chain = len(found) == 1 and isinstance(found[0], nn.ModuleList)
        kind = self.sites[0].family.kind
        if not chain or len(found[0]) != len(self.sites) or kind not in ("decoder", "encoder"):
            raise UnsupportedModel(
                f"{self.model.config.model_type}: cannot be streamed, its layers are not one chain "
                "of blocks with an MLP each; convert it in memory"
            )

    def stored(self, name: str) -> str:
        """The stored tensor of a parameter, or of the one that it is tied to."""
        tied: dict[str, str] = self.model.all_tied_weights_keys
        if name not in self.names:
            name = tied.get(name, name)
        if name not in self.names:
            raise UnsupportedModel(
                f"{self.checkpoint.folder}: no tensor on disk is {name} as it stands; convert the "
                "model in memory"
            )
        return self.names[name]

    def _load_rest(self) -> None:
        """All that belongs to no layer, but the embeddings: of those single rows are read."""
        below = tuple(f"{site.layer}." for site in self.sites)
        given = self.model.get_input_embeddings()
        read, written = given, self.model.get_output_embeddings()
        skip: set[int] = set()
        owners = {module: name for name, module in self.model.named_modules()}
        if isinstance(read, nn.Embedding):
            skip.add(id(read))
            rows = self.checkpoint.map(self.stored(f"{owners[read]}.weight"))
            read.padding_idx = (
                None  # of use to gradients alone; the row may not be among those read
            )
            read.register_forward_pre_hook(partial(self._look_up, rows))
            read.register_forward_hook(partial(_give_back, read.weight))
        if type(written) is nn.Linear:
            skip.add(id(written))
            mapped = self.checkpoint.map(self.stored(f"{owners[written]}.weight"))
            bias = None
            if written.bias is not None:
                bias = self.checkpoint.read(self.stored(f"{owners[written]}.bias"))
                bias = bias.to(self.device, self.dtype)
            written.forward = partial(self._sliced, mapped, bias)  # type: ignore[method-assign]
        for path, module in self.model.named_modules():
            if id(module) in skip or f"{path}.".startswith(below):
                continue
            for name, _ in list(module.named_parameters(path, recurse=False)):
                self._set(self.model, name, self.checkpoint.read(self.stored(name)))

    def _set(self, module: nn.Module, name: str, value: Tensor) -> None:
        set_module_tensor_to_device(module, name, self.device, value=value, dtype=self.dtype)

    def _look_up(self, rows_VD: Tensor, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        """Give an embedding the rows that it is asked for, and ids among those."""
        if self._stop not in (None, 0):
            # Only what layers are called with is asked for: masks and positions.
            ids = torch.zeros_like(args[0])
            module.weight = nn.Parameter(torch.zeros(1, rows_VD.shape[1], dtype=self.dtype))
        else:
            wanted, ids = args[0].cpu().unique(return_inverse=True)
            module.weight = nn.Parameter(rows_VD[wanted].to(self.dtype))
        module.to(self.device)
        return (ids.to(self.device),)

    def _sliced(self, rows_VD: Tensor, bias_V: Tensor | None, x: Tensor) -> Tensor:
        """The output embedding, a slice of its rows at a time."""
        parts = [linear(x, rows.to(self.device, self.dtype)) for rows in rows_VD.split(SLICE)]
        logits = torch.cat(parts, -1)
        return logits if bias_V is None else logits + bias_V

    def _pass(self, index: int, *args: Any, **kwargs: Any) -> Any:
        """What a layer does while the model around it runs: hand on."""
        if index == self._stop:
            raise _Reached(args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == 0 and self._entered is not None:
            hidden = self._entered
        return (hidden,) if self.in_tuple else hidden

    def _call(self, index: int, batch: Batch) -> _Reached:
        self._stop = index
        try:
            self.model(**inputs_of(self.model, batch, self.device))
        except _Reached as reached:
            return reached
        finally:
            self._stop = None
        raise UnsupportedModel(f"{self.sites[index].layer} was not run; convert in memory")

    @torch.no_grad()
    def enter(self, batch: Batch) -> Tensor:
        """What the first layer reads `[B, T, D]`."""
        reached = self._call(0, batch)
        hidden = reached.args_[0] if reached.args_ else reached.kwargs["hidden_states"]
        assert isinstance(hidden, Tensor)
        return hidden

    @torch.no_grad()
    def run(self, index: int, batch: Batch, hidden: Tensor) -> Tensor:
        """What layer `index`, whose weights are in memory, makes of hidden states `[B, T, D]`."""
        reached = self._call(index, batch)
        layer: Any = self.layers[index]
        hidden = hidden.to(self.device, self.dtype)
        if reached.args_:
            result = type(layer).forward(layer, hidden, *reached.args_[1:], **reached.kwargs)
        else:
            result = type(layer).forward(layer, **{**reached.kwargs, "hidden_states": hidden})
        self.in_tuple = isinstance(result, tuple)
        found = result[0] if isinstance(result, tuple) else result
        assert isinstance(found, Tensor)
        return found

    @torch.no_grad()
    def leave(self, batch: Batch, hidden: Tensor) -> Any:
        """What the model makes of the last layer's output `[B, T, D]`."""
        self._entered = hidden.to(self.device, self.dtype)
        try:
            return self.model(**inputs_of(self.model, batch, self.device))
        finally:
            self._entered = None

    @contextmanager
    def layer(
        self, index: int, seen: Callable[[str, Tensor], None] = lambda name, value: None
    ) -> Iterator[None]:
        """The weights of one layer in memory; what was fitted of it stays there.

        `seen` is told the name of every parameter, and its value as it is stored.
        """
        site, layer = self.sites[index], self.layers[index]
        for name, value in self._weights(site, layer):
            seen(f"{site.layer}.{name}", value)
            self._set(layer, name, value)
        try:
            yield
        finally:
            routed = (module for module in layer.modules() if isinstance(module, SparseMlp))
            parts = (part for module in routed for part in (module.router, module.compensation))
            kept = {id(value) for part in parts for value in part.parameters()}
            for name in [n for n, value in layer.named_parameters() if id(value) not in kept]:
                set_module_tensor_to_device(layer, name, "meta")

    def _weights(self, site: Site, layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Names in the layer and values of all that it has on disk, each read once."""
        stored = StoredMlp(self.checkpoint, self.names, site, None)
        inside = site.module.removeprefix(f"{site.layer}.")
        for name in [name for name, p in layer.named_parameters() if p.is_meta]:
            parent, _, last = name.rpartition(".")
            if isinstance(layer.get_submodule(parent), SparseMlp) and parent == inside:
                yield name, stored[last]
            else:
                yield name, self.checkpoint.read(self.stored(f"{site.layer}.{name}"))


def _give_back(weight: Tensor, module: nn.Module, _: Any, __: Any) -> None:
    """Let an embedding be without its rows again."""
    assert isinstance(weight, nn.Parameter)
    module.weight = weight
