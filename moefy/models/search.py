"""Find the MLPs of a model type that has no row in `moefy.models.families`, by running its layers.

Each layer of a repeated list is copied with a probe in place of every linear map. A probe answers
with random numbers and notes what went in, so a layer of any size is run without its weights. An MLP
is then a set of probes for which `h = act(u)` or `h = act(g) * u` holds in fp64 between what the
probes gave (`g`, `u`) and what the next one took (`h`): the code of the layer itself says so.

Shapes: T tokens, D model width, N neurons.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from moefy.errors import UnsupportedModel
from moefy.models.answers import kind_of
from moefy.models.families import Family

_TOKENS = 16
_TOLERANCE = 1e-9
_SPREAD = 4.0  # of the random numbers: far enough from 0 to tell relu6 from relu

# The first would take attention for an MLP, the others have parameters.
_NOT_ACTIVATIONS = ("linear", "prelu", "xielu")


@torch.no_grad()
def search(model: PreTrainedModel) -> list[Family]:
    """Rows for the type of `model`, real or on the meta device: one for each list of layers.

    Raises `UnsupportedModel`, saying what was looked for, where no list of layers is found whose
    every layer holds exactly one MLP, or where the model has fewer MLPs than layers.
    """
    config = model.config
    where = f"model_type '{config.model_type}' is not in the table of families"
    if config.get_text_config() is not config:
        raise UnsupportedModel(f"{where} and is made of several models; give the text model alone")
    rows: list[Family] = []
    done: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{parent}.") for parent in done)
        if isinstance(module, nn.ModuleList) and len(module) and not inside:
            row = _row_of_list(path, module, model)
            if row is not None:
                done.append(path)
                rows.append(row)
    found = sum(int(row.depth[0][1:]) for row in rows)
    layers = getattr(config, "num_hidden_layers", None) or 1
    if found == 0:
        raise UnsupportedModel(
            f"{where}, and no list of layers was found in which each layer computes "
            "down(act(up x)) or down(act(gate x) * up x) once, with nn.Linear or Conv1D maps and an "
            "activation of transformers' ACT2FN, in a module of its own or around an activation "
            "module"
        )
    if found < layers:
        raise UnsupportedModel(
            f"{where}; it has {found} MLPs in {layers} layers; layers that share their weights "
            "cannot be split"
        )
    return rows


@dataclass(frozen=True)
class _Map:
    """A linear map: its class and how many numbers go in and come out."""

    kind: type
    inputs: int
    outputs: int


@dataclass(frozen=True)
class _Seen:
    """What went through a module, once."""

    taken: Tensor
    given: Tensor


@dataclass(frozen=True)
class _LayerRun:
    """One run of a module of a layer; "" is the layer itself."""

    module: str
    x: Tensor
    residual: Tensor
    output: Any
    calls: dict[str, _Seen]


class _Probe(nn.Module):
    """Stands in for a linear map: takes `[..., inputs]`, gives random numbers `[..., outputs]`."""

    def __init__(self, linear: _Map, generator: torch.Generator) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.inputs, linear.outputs
        self.generator = generator
        self.weight = torch.empty(0, dtype=torch.float64)  # T5 asks for its dtype
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """Random numbers in the shape of the answer; `ValueError` for an input of another width."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"got {x.shape[-1]} numbers a token, expected {self.in_features}")
        shape = (*x.shape[:-1], self.out_features)
        return _SPREAD * torch.randn(shape, dtype=torch.float64, generator=self.generator)


def _row_of_list(path: str, layers: nn.ModuleList, model: PreTrainedModel) -> Family | None:
    """The one row that all layers of a list share, or None."""
    rows: dict[Any, Family | None] = {}
    for layer in layers:
        types = tuple((name, type(part)) for name, part in layer.named_modules())
        key = (types, tuple(_linear_maps(layer).items()))
        if key not in rows:
            rows[key] = _row_of_layer(layer, model)
    first, *others = rows.values()
    if first is None or any(row != first for row in others):
        return None
    return replace(first, layers=(f"{path}.{{}}",), depth=(f"={len(layers)}",))


def _row_of_layer(layer: nn.Module, model: PreTrainedModel) -> Family | None:
    """The row of the only MLP in a layer; None if there is none, or more than one."""
    maps = _linear_maps(layer)
    generator = torch.Generator().manual_seed(0)
    probed = _probed_copy(layer, maps, generator)
    rows: dict[str, Family] = {}
    for run in _runs(probed, maps, generator):
        for row in _mlps(run.calls, maps, model):
            usable = _with_container(row, run) or _with_splice(row, run)
            if usable is not None:
                rows.setdefault(row.down, usable)
    return next(iter(rows.values())) if len(rows) == 1 else None


def _linear_maps(layer: nn.Module) -> dict[str, _Map]:
    """Every linear map inside a layer, by name."""
    maps = {}
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear) and _is_linear(module):
            maps[name] = _Map(nn.Linear, module.in_features, module.out_features)
        elif type(module) is Conv1D:
            maps[name] = _Map(Conv1D, *module.weight.shape)
    return maps


def _is_linear(module: nn.Linear) -> bool:
    """Whether the class of `module` computes what `nn.Linear` does, as Falcon's own class does."""
    if type(module) is nn.Linear:
        return True
    plain = nn.Linear(3, 2, device="cpu", dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    output, _ = _run(lambda: type(module).forward(plain, x))
    return isinstance(output, Tensor) and _equal(output, plain(x))


def _probed_copy(layer: nn.Module, maps: dict[str, _Map], generator: torch.Generator) -> nn.Module:
    """The layer in fp64 on the CPU, linear maps as probes and other parameters random."""
    modules = dict(layer.named_modules())
    memo: dict[int, Any] = {id(modules[name]): _Probe(maps[name], generator) for name in maps}
    probed = copy.deepcopy(layer, memo).to_empty(device="cpu").double().eval()
    for tensor in (*probed.parameters(), *probed.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        else:
            tensor.zero_()
    return probed


def _runs(
    probed: nn.Module, maps: dict[str, _Map], generator: torch.Generator
) -> Iterator[_LayerRun]:
    """Runs of every module of a layer that holds two linear maps or more, innermost first; last
    the layer's own MLP method, where it has one as BERT's does, and the layer itself."""
    chunk = getattr(probed, "feed_forward_chunk", None)
    inner = [name for name, _ in probed.named_modules() if name]
    calls: list[tuple[str, Callable[..., Any]]] = [
        (name, probed.get_submodule(name)) for name in sorted(inner, key=lambda n: -n.count("."))
    ]
    for name, call in [*calls, *([("", chunk)] if chunk else []), ("", probed)]:
        inside = [m for path, m in maps.items() if path.startswith(f"{name}." if name else "")]
        if len(inside) < 2:
            continue
        forward = call.forward if isinstance(call, nn.Module) else call
        needed = [
            parameter
            for parameter in inspect.signature(forward).parameters.values()
            if parameter.default is parameter.empty
            and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        for width in sorted({m.inputs for m in inside}):
            shape = (1, _TOKENS, width)
            x = torch.randn(shape, dtype=torch.float64, generator=generator)
            residual = torch.randn(shape, dtype=torch.float64, generator=generator)
            second = residual if name else None  # a layer's further arguments are masks and such
            arguments = [x, *[second] * (len(needed) - 1)]
            output, through = _record(probed, partial(call, *arguments))
            if through:
                yield _LayerRun(name, x, residual, output, through)


def _record(probed: nn.Module, run: Callable[[], Any]) -> tuple[Any, dict[str, _Seen]]:
    """The output of a run, and what went through each module without children that it used once;
    nothing where the run fails."""
    seen: dict[str, list[_Seen]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, taken: tuple[Any, ...], given: Any) -> None:
            if taken and isinstance(taken[0], Tensor) and isinstance(given, Tensor):
                seen.setdefault(name, []).append(_Seen(taken[0], given))

        return hook

    leaves = [(name, m) for name, m in probed.named_modules() if not list(m.children())]
    handles = [module.register_forward_hook(note(name)) for name, module in leaves]
    output, failed = _run(run)
    for handle in handles:
        handle.remove()
    if failed:
        return None, {}
    output = output[0] if isinstance(output, tuple) else output
    return output, {name: made[0] for name, made in seen.items() if len(made) == 1}


_REFUSALS = (
    AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""How a forward pass says that its arguments do not suit it: wrong type, shape, number or content."""


def _run(run: Callable[[], Any]) -> tuple[Any, bool]:
    """The output of a run, and whether the layer refused arguments that were guessed for it: this is
    then not how it is called. Any other error is one, and passes."""
    try:
        return run(), False
    except _REFUSALS:
        return None, True


def _mlps(
    calls: dict[str, _Seen], maps: dict[str, _Map], model: PreTrainedModel
) -> Iterator[Family]:
    """Rows, without container or splice, of all MLPs seen in a run."""
    acts = _activations(model.config)
    probes = {name: call for name, call in calls.items() if name in maps}
    for down, call in probes.items():
        h = call.taken
        for up, other in probes.items():
            if maps[up].kind is not maps[down].kind or maps[up].inputs != maps[down].outputs:
                continue
            u = other.given
            for gate, fused, product in _products(up, u, h, probes):
                few = [_few(tensor) for tensor in (*product, h)]
                # A few numbers first: nearly every guess is wrong, and shows it at once. Where
                # several approximations of one function are left, the closest is the one.
                likely = [name for name, act in acts.items() if _error(act, *few) <= _TOLERANCE]
                errors = {name: _error(acts[name], *product, h) for name in likely}
                name, error = min(errors.items(), key=itemgetter(1), default=("", torch.inf))
                if error <= _TOLERANCE:
                    yield _row(model, maps, up, down, gate, fused, name)


def _error(act: Callable[[Tensor], Tensor], g: Tensor, factor: Tensor, h: Tensor) -> float:
    return _distance(act(g) * factor, h)


def _few(tensor: Tensor) -> Tensor:
    """The first numbers of the first token."""
    return tensor.reshape(-1, tensor.shape[-1])[0, :32]


def _products(
    up: str, u: Tensor, h: Tensor, probes: dict[str, _Seen]
) -> Iterator[tuple[str | None, bool, tuple[Tensor, Tensor]]]:
    """Ways in which `u` may become `h`: gate, whether fused, and the `g` and `f` of `act(g) * f`."""
    if u.shape[:-1] != h.shape[:-1]:
        return
    if u.shape[-1] == 2 * h.shape[-1]:
        first, second = u.chunk(2, dim=-1)
        yield None, True, (first, second)
    if u.shape != h.shape:
        return
    yield None, False, (u, torch.ones_like(u))
    for gate, call in probes.items():
        if gate != up and call.given.shape == h.shape and torch.equal(call.taken, probes[up].taken):
            yield gate, False, (call.given, u)


def _row(
    model: PreTrainedModel,
    maps: dict[str, _Map],
    up: str,
    down: str,
    gate: str | None,
    fused: bool,
    activation: str,
) -> Family:
    return Family(
        model_type=model.config.model_type,
        kind=kind_of(model),
        layers=(),
        depth=(),
        up=up,
        down=down,
        gate=gate,
        fused=fused,
        transposed=maps[up].kind is Conv1D,
        activation=f"={activation}",
        neurons=f"={maps[down].inputs}",
        width=f"={maps[down].outputs}",
    )


def _with_container(row: Family, run: _LayerRun) -> Family | None:
    """The row, if the module that was run is the MLP and nothing else."""
    inside = all(name.startswith(f"{run.module}.") for name in (row.up, row.down) if run.module)
    if not run.module or not inside or not isinstance(run.output, Tensor):
        return None
    if not _equal(run.calls[row.up].taken, run.x):
        return None
    y = run.calls[row.down].given
    if _equal(run.output, y):
        return replace(row, container=run.module)
    if _equal(run.output, y.reshape(run.x.shape) + run.residual):
        return replace(row, container=run.module, residual=True)
    return None


def _with_splice(row: Family, run: _LayerRun) -> Family | None:
    """The row, if a module of its own computes the activation between `up` and `down`."""
    if row.gate is not None or row.fused:
        return None
    u, h = run.calls[row.up].given, run.calls[row.down].taken
    for name, call in run.calls.items():
        if name != row.up and _equal(call.taken, u) and _equal(call.given, h):
            return replace(row, act=name)
    return None


def _activations(config: PreTrainedConfig) -> dict[str, Callable[[Tensor], Tensor]]:
    """Functions without parameters from ACT2FN, those that the config names first."""
    named = [v for v in config.to_dict().values() if isinstance(v, str) and v in ACT2FN]
    return {name: ACT2FN[name] for name in (*named, *ACT2FN) if name not in _NOT_ACTIVATIONS}


def _equal(a: Tensor, b: Tensor) -> bool:
    return _distance(a, b) <= _TOLERANCE


def _distance(a: Tensor, b: Tensor) -> float:
    """Greatest difference over greatest number; leading axes may differ, other shapes are far."""
    if a.numel() != b.numel() or a.shape[-1] != b.shape[-1]:
        return float("inf")
    b = b.reshape(a.shape)
    scale = torch.linalg.vector_norm(b, torch.inf)
    return float(torch.dist(a, b, p=torch.inf) / scale)
