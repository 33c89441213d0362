"""What a conversion will do, worked out from `config.json` alone.

Shapes: N neurons, D width, E experts.
"""

from dataclasses import dataclass

import torch

from moefy.artefact import LayerEntry
from moefy.checkpoint import Checkpoint
from moefy.errors import RecipeError
from moefy.inputs import read_config
from moefy.locate import Site, meta_model, sites
from moefy.partition import expert_count, find_method
from moefy.recipe import Recipe
from moefy.routing import COMPENSATIONS, ROUTERS, SELECTIONS, choose


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a conversion will do, known before a weight is read."""

    source: str
    model_class: str
    kind: str
    sites: list[Site]
    layers: list[LayerEntry]
    k: list[int]
    """Routed experts that run, per layer."""
    parameters: int
    mlp_parameters: int
    disk: int
    """Bytes of disk needed while it runs."""
    memory: int
    """Bytes of memory beyond what running the model takes."""
    corpus: str


def plan(checkpoint: Checkpoint, recipe: Recipe, corpus: str, *, adapter: bool = False) -> Plan:
    """Work out the plan from `config.json` alone.

    Raises `UnsupportedModel` or `RecipeError` where the model and the recipe do not go together.
    """
    find_method(recipe.partition.method)
    choose(SELECTIONS, "selection", recipe.selection.name)
    choose(COMPENSATIONS, "compensation", recipe.compensation.name)
    if not choose(ROUTERS, "router", recipe.router.name).deployable:
        raise RecipeError(
            f"router '{recipe.router.name}' reads what it should predict, it serves evaluation "
            "only (moefy eval --router oracle); choose another to convert with"
        )
    config = read_config(checkpoint)
    model = meta_model(config)
    found = sites(model)
    layers, active = [], []
    for site in found:
        entry, k = _layer_plan(site, recipe)
        layers.append(entry)
        active.append(k)
    total = sum(p.numel() for p in model.parameters())
    dtype = getattr(config, "dtype", None) or torch.float32
    width = dtype.itemsize
    sample = recipe.partition.tokens + recipe.router.tokens
    largest = max(found, key=lambda s: s.neurons * s.width)
    weights = 3 * largest.neurons * largest.width * 4
    chunk = 4096 * largest.neurons * 4 * 3 + recipe.partition.tokens * largest.neurons * 4 * 2
    return Plan(
        source=str(checkpoint.folder),
        model_class=type(model).__name__,
        kind=found[0].family.kind,
        sites=found,
        layers=layers,
        k=active,
        parameters=total,
        mlp_parameters=sum(_parameters(s) for s in found),
        disk=sum(sample * s.width * width for s in found) + (0 if adapter else total * width),
        memory=2 * weights + chunk + sample * largest.width * 4,
        corpus=corpus,
    )


def describe(todo: Plan, recipe: Recipe) -> str:
    """The plan in a few lines."""
    first, k = todo.layers[0], todo.k[0]
    same = all(e.experts == first.experts and e.neurons == first.neurons for e in todo.layers)
    active = (k + first.shared) / first.experts
    return "\n".join(
        [
            f"{todo.source}: {todo.model_class}, {todo.parameters / 1e6:.1f} M parameters, "
            f"{todo.mlp_parameters / todo.parameters:.0%} of them in {len(todo.layers)} MLPs",
            f"{'every' if same else 'first'} layer: {first.neurons} neurons in {first.experts} experts "
            f"of {first.neurons // first.experts}"
            + (f" ({first.shared} shared)" if first.shared else "")
            + f", {k + first.shared} run: FFN density {active:.3f}",
            f"partition {recipe.partition.method}, router {recipe.router.name}, selection "
            f"{recipe.selection.name}, compensation {recipe.compensation.name}",
            f"reads at most {recipe.partition.tokens} tokens to partition and "
            f"{recipe.router.tokens} to fit routers, of the corpus: {todo.corpus}",
            f"needs {todo.disk / 1e9:.2f} GB of disk while it runs and {todo.memory / 1e9:.2f} GB of "
            "memory beyond what running the model takes",
        ]
    )


def _layer_plan(site: Site, recipe: Recipe) -> tuple[LayerEntry, int]:
    where = f"layer {site.index}"
    wanted = recipe.partition
    experts = expert_count(site.neurons, wanted.expert_size, wanted.experts, where)
    routed = experts - wanted.shared
    k = recipe.selection.k
    if k is None:
        k = max(1, round(recipe.density * experts) - wanted.shared)
    if routed < 1 or k > routed:
        raise RecipeError(
            f"{where}: {k} routed experts should run, there are {experts} experts, "
            f"{wanted.shared} of them shared; lower selection.k or partition.shared"
        )
    entry = LayerEntry(
        layer=site.layer,
        neurons=site.neurons,
        width=site.width,
        experts=experts,
        shared=wanted.shared,
        router={"name": recipe.router.name, "hidden": recipe.router.hidden},
        selection={"name": recipe.selection.name},
        compensation=recipe.compensation.name,
    )
    return entry, k


def _parameters(site: Site) -> int:
    matrices = 3 if site.gated else 2
    biases = {"gate": site.neurons, "up": site.neurons, "down": site.width}
    return matrices * site.neurons * site.width + sum(biases[role] for role in site.biases)
