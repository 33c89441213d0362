"""What is timed: one row an engine. A new engine is a file with its function, and a row of `ENGINES`.

    eager, compiled                     the dense computation: torch as it is, torch.compile
    masked, views, ..., auto            moefy's backends, as `BACKENDS` names them
    experts:eager, experts:batched_mm,  transformers' implementations of stock mixtures of experts
    experts:grouped_mm, experts:moefy
    llama.cpp                           llama.cpp on a GGUF file

Dense and moefied engines have variants: a graph of `torch.compile`, and linear maps by `moefy.native_linears`.

Shapes: T tokens, D width, E experts, B sequences.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear

from moefy.benchmark.engines.base import (
    AUTO,
    Call,
    Engine,
    Models,
    Session,
    TransformersSession,
)
from moefy.benchmark.engines.exported import llama_cpp, stock_layers, stock_session
from moefy.benchmark.layers import Case
from moefy.errors import MoefyError, unknown_choice
from moefy.experts.backends import BACKENDS
from moefy.experts.backends.base import CPU, GPU
from moefy.experts.backends.cpu import native_linears
from moefy.experts.sparse_mlp import SparseMlp, use_backend
from moefy.models.mlp import activation_function

ALL = "all"


def mlp(
    x_TD: Tensor,
    act: Callable[[Tensor], Tensor],
    up_ND: Tensor,
    gate_ND: Tensor | None,
    down_DN: Tensor,
    up_bias_N: Tensor | None,
    gate_bias_N: Tensor | None,
    down_bias_D: Tensor | None,
) -> Tensor:
    """The dense MLP as stock models compute it."""
    up_TN = linear(x_TD, up_ND, up_bias_N)
    h_TN = act(up_TN) if gate_ND is None else act(linear(x_TD, gate_ND, gate_bias_N)) * up_TN
    return linear(h_TN.to(down_DN.dtype), down_DN, down_bias_D)


def _dense_layers(engine: Engine, case: Case) -> list[Call]:
    compute = mlp
    if engine.compiled:
        # What was compiled for other shapes would count against the limit of recompilations.
        torch.compiler.reset()
        compute = torch.compile(mlp, dynamic=False)
    return [
        partial(
            compute, x_TD, activation_function(w.activation), w.up_ND, w.gate_ND, w.down_ND.T,
            w.up_bias_N, w.gate_bias_N, w.down_bias_D,
        )
        for x_TD, w in zip(case.inputs, case.layers.stock, strict=True)
    ]  # fmt: skip


def _dense_session(engine: Engine, models: Models, ids_BT: Tensor, prompt: int) -> Session:
    return TransformersSession(
        models.dense, ids_BT, prompt, dense=True, compiled=engine.compiled,
        before=lambda: native_linears(models.dense, engine.linears),
    )  # fmt: skip


def _moefied_layers(engine: Engine, case: Case) -> list[Call]:
    """Layers with their routers, or with masks given their experts alone."""

    def compute(module: SparseMlp, x_TD: Tensor, mask_TE: Tensor) -> Tensor:
        module.backend = engine.backend
        if not case.routed:
            return module.compute(x_TD, mask_TE, module.running)
        y_TD: Tensor = module(x_TD)
        return y_TD

    cases = zip(case.layers.modules, case.inputs, case.masks, strict=True)
    return [partial(compute, *one) for one in cases]


def _moefied_session(engine: Engine, models: Models, ids_BT: Tensor, prompt: int) -> Session:
    return TransformersSession(
        models.sparse, ids_BT, prompt, compiled=engine.compiled,
        before=lambda: use_backend(native_linears(models.sparse, engine.linears), engine.backend),
    )  # fmt: skip


EAGER = Engine(name="eager", dense=True, layers=_dense_layers, session=_dense_session)
AUTOMATIC = Engine(name=AUTO, backend=AUTO, layers=_moefied_layers, session=_moefied_session)
STOCK = ("eager", "batched_mm", "grouped_mm", "moefy")
"""Implementations of transformers' experts."""
LLAMA_CPP = Engine(name="llama.cpp", session=llama_cpp, own_size=True)

ENGINES = {
    row.label: row
    for row in (
        EAGER,
        replace(EAGER, compiled=True),
        AUTOMATIC,
        *(
            Engine(
                name=f"experts:{name}",
                layers=partial(stock_layers, name),
                session=partial(stock_session, name),
                devices=frozenset({GPU} if name == "moefy" else {CPU, GPU}),
            )
            for name in STOCK
        ),
        LLAMA_CPP,
    )
}
GROUPS = {"experts": [f"experts:{name}" for name in STOCK]}
"""Names for several rows."""


def backend(name: str) -> Engine:
    """The row of one of moefy's backends."""
    return replace(AUTOMATIC, name=name, backend=name, devices=BACKENDS[name].devices)


def rows() -> dict[str, Engine]:
    """All engines; backends are read when asked for, so that one registered later is among them."""
    return {**ENGINES, **{name: backend(name) for name in BACKENDS}}


def choose(
    named: Sequence[str] = (),
    *,
    compiled: bool = False,
    linears: bool = False,
    experts: Mapping[str, str | Path] | None = None,
    gguf: Sequence[str | Path] = (),
) -> list[Engine]:
    """The engines of these names, with the variants asked for beside them; nothing or `all` is every one.

    `experts` has folders of stock mixtures of experts by the implementation that runs them (or `all`), `gguf`
    the files that llama.cpp runs. The eager dense engine is always among them, since something has to be
    compared with. Raises `MoefyError` for names that are unknown and files of one name.
    """
    table, folders, files = rows(), _folders(experts or {}), _files(gguf)
    names = [*named, *folders] or ([] if files else [ALL])
    for name in named:
        if name not in (*table, *GROUPS, ALL):
            raise MoefyError(unknown_choice("engine", name, [*table, *GROUPS, ALL]))
    chosen = dict.fromkeys([EAGER.label])
    for name in names:
        chosen |= dict.fromkeys(table if name == ALL else GROUPS.get(name, [name]))
    if files:
        chosen.pop(LLAMA_CPP.label, None)
    made = [replace(table[name], path=folders.get(name)) for name in chosen]
    every = [EAGER, AUTOMATIC] if ALL in names else []
    return (
        list(
            {
                variant.label: variant
                for row in made
                for variant in _variants(row, compiled or row in every, linears or row in every)
            }.values()
        )
        + files
    )


def _variants(row: Engine, compiled: bool, linears: bool) -> list[Engine]:
    """A row, and beside it those of its variants that are asked for, if it is one that has any."""
    made = [row]
    if row.dense or row.backend:
        made += [replace(row, compiled=True)] * compiled
        made += [replace(one, linears=True) for one in made] * linears
    return made


def _folders(experts: Mapping[str, str | Path]) -> dict[str, Path]:
    """Folders by the label of the engine that runs them."""
    folders: dict[str, Path] = {}
    for name, folder in experts.items():
        if name not in (*STOCK, ALL):
            raise MoefyError(unknown_choice("implementation of experts", name, [*STOCK, ALL]))
        if not Path(folder, "config.json").is_file():
            raise MoefyError(f"--experts {name}={folder}: not a model folder (no config.json)")
        folders |= {f"experts:{one}": Path(folder) for one in (STOCK if name == ALL else [name])}
    return folders


def _files(gguf: Sequence[str | Path]) -> list[Engine]:
    """One engine a file, called as the file is."""
    files: dict[str, Path] = {}
    for file in map(Path, gguf):
        if not file.is_file():
            raise MoefyError(f"--gguf {file}: no such file")
        if file.name in files:
            raise MoefyError(
                f"--gguf {file}: {files[file.name]} goes by the same name, {file.name}; rename one of them"
            )
        files[file.name] = file
    return [replace(LLAMA_CPP, name=name, path=file) for name, file in files.items()]
