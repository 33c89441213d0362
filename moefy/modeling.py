"""SparseMlp, the module that takes the place of a dense MLP, and `load`, which puts it there.

    model = load("out")                 # a transformers model: generate, device_map, lm-eval work
    with all_experts(model):            # the dense function, from the same weights
        dense = model(**inputs).logits

A SparseMlp owns the weights once, neuron-major and in expert order. Which backend computes it never
changes the function. It knows nothing of files beyond reading an artefact, and nothing of training.

Shapes: T tokens, D width, N neurons, E routed experts, S shared experts, F neurons per expert.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from moefy.artefact import (
    ADAPTER,
    META,
    SIDE,
    Artefact,
    LayerEntry,
    read_artefact,
    verify_source,
    write_side_files,
)
from moefy.checkpoint import Checkpoint, copy_folder, overwrite, sha256
from moefy.errors import CheckpointError, MoefyError, unknown_choice
from moefy.locate import Site, disk_names, meta_model, permute, read_mlp, sites
from moefy.mlp import DenseMlp
from moefy.routing import COMPENSATIONS, ROUTERS, SELECTIONS, choose
from moefy.routing.base import Compensation, Router, Selection
from moefy_kernels import expert_views_mlp, masked_mlp

Backend = Callable[[Tensor, DenseMlp, Tensor], Tensor]
BACKENDS: dict[str, Backend] = {"masked": masked_mlp, "views": expert_views_mlp}
"""How the experts of a mask are computed; all are the same function. `auto` measures them."""

_WEIGHTS = ("up_ND", "down_ND", "gate_ND", "up_bias_N", "gate_bias_N", "down_bias_D")
_fastest: dict[tuple[Any, ...], str] = {}


class SparseMlp(nn.Module):
    """An MLP in experts: weights in expert order, router, selection, compensation.

    The `shared` first experts always run; scores and masks cover the others.
    """

    def __init__(
        self,
        mlp: DenseMlp,
        *,
        experts: int,
        shared: int,
        router: Router,
        selection: Selection,
        compensation: Compensation,
    ) -> None:
        super().__init__()
        for name in _WEIGHTS:
            value = getattr(mlp, name)
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        self.activation = mlp.activation
        self.experts, self.shared = experts, shared
        self.router, self.selection, self.compensation = router, selection, compensation
        self.backend = "auto"
        self.chosen = ""
        """The backend of the last forward pass."""
        self.all_on = False
        self.observer: Callable[[Tensor, Tensor], None] | None = None
        """Called with the input `[T, D]` and the mask `[T, S + E]` of every forward pass."""

    @property
    def expert_size(self) -> int:
        """F, neurons per expert."""
        return self.weights.neurons // self.experts

    @property
    def weights(self) -> DenseMlp:
        """All neurons in expert order, as views of the parameters."""
        return DenseMlp(activation=self.activation, **{n: getattr(self, n) for n in _WEIGHTS})

    def mask(self, x_TD: Tensor) -> Tensor:
        """Which experts run `[T, S + E]` (bool)."""
        shape = (x_TD.shape[0], self.experts)
        if self.all_on:
            return torch.ones(shape, dtype=torch.bool, device=x_TD.device)
        mlp = self.weights
        routed = mlp.take(slice(self.shared * self.expert_size, None)) if self.shared else mlp
        routed_TE = self.selection(self.router(x_TD, routed))
        if not self.shared:
            return routed_TE
        return torch.cat([routed_TE.new_ones(shape[0], self.shared), routed_TE], dim=1)

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor:
        """Output of the experts that run plus the compensation, shaped as `hidden`.

        `residual` is for families whose MLP module adds it itself.
        """
        x_TD = hidden.reshape(-1, hidden.shape[-1])
        mask_TE = self.mask(x_TD)
        if self.observer is not None:
            self.observer(x_TD, mask_TE)
        y_TD = self.compute(x_TD, mask_TE)
        extra_TD = self.compensation(x_TD, mask_TE[:, self.shared :])
        if extra_TD is not None:
            y_TD = y_TD + extra_TD.to(y_TD.dtype)
        y = y_TD.view(*hidden.shape[:-1], -1)
        return y if residual is None else y + residual

    def compute(self, x_TD: Tensor, mask_TE: Tensor) -> Tensor:
        """Output `[T, D]` of the experts in the mask, by the backend that `backend` names."""
        name = self.backend
        if name == "auto":
            name = self._auto(x_TD, mask_TE)
        elif name not in BACKENDS:
            raise MoefyError(unknown_choice("backend", name, [*BACKENDS, "auto"]))
        self.chosen = name
        return BACKENDS[name](x_TD, self.weights, mask_TE)

    def _auto(self, x_TD: Tensor, mask_TE: Tensor) -> str:
        # Training needs the smooth path, and a mask on a GPU can only be walked by copying it back.
        if torch.is_grad_enabled() or x_TD.device.type != "cpu" or torch.compiler.is_compiling():
            return "masked"
        active = int(mask_TE.sum()) / mask_TE.numel()
        key = (
            tuple(self.weights.up_ND.shape),
            self.experts,
            self.gate_ND is None,
            x_TD.dtype,
            torch.get_num_threads(),
            x_TD.shape[0].bit_length(),
            round(8 * active),
        )
        if key not in _fastest:
            _fastest[key] = _measure(x_TD, self.weights, mask_TE)
        return _fastest[key]


def _measure(x_TD: Tensor, weights: DenseMlp, mask_TE: Tensor) -> str:
    """The faster backend for this very input: best of three, taken in turn."""
    best = dict.fromkeys(BACKENDS, float("inf"))
    for _ in range(3):
        for name, backend in BACKENDS.items():
            begin = time.perf_counter()
            backend(x_TD, weights, mask_TE)
            best[name] = min(best[name], time.perf_counter() - begin)
    return min(best, key=lambda name: best[name])


def sparse_mlps(model: nn.Module) -> dict[int, SparseMlp]:
    """The SparseMlps of a model by layer index; empty for a dense model."""
    found = [module for module in model.modules() if isinstance(module, SparseMlp)]
    return dict(enumerate(found))


@contextmanager
def all_experts(model: nn.Module) -> Iterator[None]:
    """Every expert of every layer runs: the dense function."""
    modules = sparse_mlps(model).values()
    for module in modules:
        module.all_on = True
    try:
        yield
    finally:
        for module in modules:
            module.all_on = False


def use_backend(model: nn.Module, name: str) -> None:
    """Compute every layer with this entry of `BACKENDS`, or with `auto`."""
    for module in sparse_mlps(model).values():
        module.backend = name


def install(model: PreTrainedModel, site: Site, sparse: SparseMlp) -> None:
    """Put a SparseMlp where `site` is; a splice leaves identities for what it swallowed."""
    _replace(model, site.module, sparse)
    if site.act is not None:
        _replace(model, site.act, nn.Identity())
        _replace(model, site.path("down"), nn.Identity())


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def build_routing(entry: LayerEntry) -> tuple[Router, Selection, Compensation]:
    """The router, selection and compensation that an entry names, without their tensors."""
    routed = entry.experts - entry.shared
    kind, hidden = entry.router["name"], entry.router["hidden"]
    router = choose(ROUTERS, "router", kind)(entry.width, routed, hidden)
    settings = {key: value for key, value in entry.selection.items() if key != "name"}
    selection = choose(SELECTIONS, "selection", entry.selection["name"])(**settings)
    compensation = choose(COMPENSATIONS, "compensation", entry.compensation)(entry.width, routed)
    return router, selection, compensation


def placement() -> dict[str, Any]:
    """How this machine runs models best, as arguments of `load` and `load_dense`.

    All GPUs where there are some. On a CPU without arithmetic in 16 bits, which it would emulate
    fifty times slower, fp32.
    """
    if torch.cuda.is_available():
        return {"device_map": "auto"}
    return {} if _has_bf16() else {"dtype": torch.float32}


def _has_bf16() -> bool:
    flags = Path("/proc/cpuinfo")
    text = flags.read_text() if flags.exists() else ""
    return "avx512_bf16" in text or "amx_bf16" in text or " bf16" in text


def load_dense(checkpoint: Checkpoint, **kwargs: Any) -> PreTrainedModel:
    """The stock transformers model of a checkpoint folder, in its own dtype unless told otherwise."""
    config = AutoConfig.from_pretrained(checkpoint.folder)
    kind = type(meta_model(config))
    kwargs = {"dtype": "auto", **kwargs}
    model: PreTrainedModel = kind.from_pretrained(checkpoint.folder, **kwargs)
    model.eval()
    return model


def load(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    verify: bool = True,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a moefied checkpoint as a transformers model whose MLPs are SparseMlps.

    `base` says where the source of an adapter lies if it moved; `verify=False` skips the hashes of
    the weights. Other arguments (`dtype`, `device_map`, ...) go to `from_pretrained`; weights
    that are offloaded to CPU or disk by `device_map` are refused.

    Raises `CheckpointError` for an artefact that is damaged or whose base is not to be had.
    """
    folder = Path(folder)
    artefact = read_artefact(folder, verify=verify)
    checkpoint = weights_of(artefact, folder, base, verify)
    model = load_dense(checkpoint, **kwargs)
    found = sites(model)
    if len(found) != len(artefact.layers):
        raise CheckpointError(
            f"{folder}: {len(artefact.layers)} layers in {META}, {len(found)} in the model"
        )
    for site, entry in zip(found, artefact.layers, strict=True):
        install(model, site, _sparse(model, site, entry, artefact))
    model.moefy = artefact  # type: ignore[assignment]
    model.moefy_sites = found  # type: ignore[assignment]
    model.moefy_checkpoint = checkpoint  # type: ignore[assignment]
    model.save_pretrained = MethodType(_save_pretrained, model)  # type: ignore[method-assign]
    model.eval()
    return model


def weights_of(
    artefact: Artefact, folder: Path, base: str | Path | None = None, verify: bool = True
) -> Checkpoint:
    """The checkpoint that holds an artefact's weights: its own folder, or the base of an adapter."""
    if artefact.form != ADAPTER:
        return Checkpoint.open(folder)
    where = str(base or artefact.source["name"])
    try:
        checkpoint = Checkpoint.open(where)
    except CheckpointError as error:
        raise CheckpointError(
            f"{folder}: the base of this adapter cannot be opened: {error}"
        ) from None
    if verify:
        verify_source(artefact, checkpoint)
    return checkpoint


def _sparse(model: PreTrainedModel, site: Site, entry: LayerEntry, artefact: Artefact) -> SparseMlp:
    """Take the weights out of the dense modules; only the down projection is copied (transposed)."""
    device = model.get_parameter(site.path("up") + ".weight").device
    if device.type == "meta":
        raise MoefyError(
            f"{site.layer}: its weights are offloaded by device_map; give a device_map that keeps "
            "every layer on a device"
        )
    mlp = read_mlp(site, lambda name: model.get_parameter(name).detach())
    if artefact.form == ADAPTER:
        mlp = mlp.take(artefact.permutation(site.index).to(device))
    mlp = mlp.contiguous()
    router, selection, compensation = build_routing(entry)
    for part, module in (("router", router), ("compensation", compensation)):
        try:
            module.load_state_dict(artefact.of_layer(site.index, part))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{SIDE}: layers.{site.index}.{part}: {reason}") from None
        module.to(device=device)
    return SparseMlp(
        mlp,
        experts=entry.experts,
        shared=entry.shared,
        router=router,
        selection=selection,
        compensation=compensation,
    )


def stock_parameter(site: Site, sparse: SparseMlp, name: str) -> Tensor:
    """A SparseMlp's weights as the dense parameter called `name`, in its stored layout."""
    mlp, role = sparse.weights, "down" if name.startswith(site.path("down") + ".") else "up"
    if site.gated and not site.family.fused and name.startswith(site.path("gate") + "."):
        role = "gate"
    kind = "bias" if name.endswith(".bias") else "weight"
    if role == "down":
        value = mlp.down_bias_D if kind == "bias" else mlp.down_ND.T
    else:
        pick = {"weight": ("gate_ND", "up_ND"), "bias": ("gate_bias_N", "up_bias_N")}[kind]
        gate, up = getattr(mlp, pick[0]), getattr(mlp, pick[1])
        fused = site.family.fused and gate is not None
        value = torch.cat([gate, up]) if fused else (gate if role == "gate" else up)
    assert value is not None
    return value.T if kind == "weight" and site.family.transposed else value


def save(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model that `load` gave, in the same form: `load`, `save`, `load` changes no byte.

    The files are copied from where the model was loaded; tensors whose values have changed since
    are overwritten in place, and `weights_modified` then says so. An adapter whose weights have
    changed is refused: convert it in full form to train it.
    """
    artefact: Artefact = model.moefy  # type: ignore[assignment]
    checkpoint: Checkpoint = model.moefy_checkpoint  # type: ignore[assignment]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    adapter = artefact.form == ADAPTER
    meta = meta_model(AutoConfig.from_pretrained(checkpoint.folder))
    found = sites(meta)
    owners = {name: site for site in found for name in site.parameters}
    if not adapter:
        copy_folder(checkpoint.folder, folder)
    stored = Checkpoint.open(folder if not adapter else checkpoint.folder)
    state, modules = model.state_dict(), sparse_mlps(model)
    changed = False
    for disk, name in disk_names(meta, stored.tensors).items():
        site = owners.get(name)
        now = state[name] if site is None else stock_parameter(site, modules[site.index], name)
        if adapter and site is not None:
            now = permute(site, name, now, artefact.permutation(site.index).argsort())
        before = stored.read(disk)
        now = now.detach().cpu().to(before.dtype)
        if not torch.equal(now, before):
            if adapter:
                raise MoefyError(f"{folder}: {name} has changed; an adapter cannot hold weights")
            changed = True
            overwrite(stored.tensors[disk], now)
    tensors = dict(artefact.tensors)
    for index, module in modules.items():
        for part in ("router", "compensation"):
            for key, value in getattr(module, part).state_dict().items():
                tensors[f"layers.{index}.{part}.{key}"] = value.detach().cpu()
    values = {f: getattr(artefact, f) for f in artefact.__dataclass_fields__}
    values["tensors"] = tensors
    values["weights_modified"] = artefact.weights_modified or changed
    values["sha256"] = {} if adapter else {file.name: sha256(file) for file in stored.files}
    write_side_files(folder, Artefact(**values))


def _save_pretrained(model: PreTrainedModel, save_directory: str | Path, **_: Any) -> None:
    save(model, save_directory)
