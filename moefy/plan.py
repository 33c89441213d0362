"""What a conversion will do, worked out from `config.json` alone.

Shapes: N neurons, D width, E experts.
"""

from dataclasses import dataclass

import torch

from moefy.artefact import LayerEntry
from moefy.checkpoint import Checkpoint
from moefy.errors import RecipeError, unknown_choice
from moefy.inputs import read_config
from moefy.locate import Site, meta_model, side_of, sites
from moefy.partition import SHARED_BY, expert_count, find_method
from moefy.recipe import Recipe
from moefy.routing import COMPENSATIONS, LOSSES, ROUTERS, SELECTIONS, TARGETS, choose


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
    if recipe.partition.shared_by not in SHARED_BY:
        raise RecipeError(
            unknown_choice("partition.shared_by", recipe.partition.shared_by, SHARED_BY)
        )
    selection = choose(SELECTIONS, "selection", recipe.selection.name)
    choose(COMPENSATIONS, "compensation", recipe.compensation.name)
    choose(TARGETS, "router.target", recipe.router.target)
    choose(LOSSES, "router.loss", recipe.router.loss)
    if recipe.distil.steps and not selection.by_score:
        raise RecipeError(
            f"distil.steps={recipe.distil.steps}: selection '{recipe.selection.name}' does not "
            "decide by one token's scores; choose topk or threshold, or set distil.steps=0"
        )
    if selection.by_score and not choose(ROUTERS, "router", recipe.router.name).deployable:
        raise RecipeError(
            f"router '{recipe.router.name}' reads what it should predict, it serves evaluation "
            "only (moefy eval --router oracle); choose another to convert with"
        )
    config = read_config(checkpoint)
    model = meta_model(config)
    found = sites(model)
    layers, active = [], []
    sides: set[str] = set()
    for site in found:
        # The first MLP of encoder and decoder has none before it.
        first = side_of(site) not in sides
        sides.add(side_of(site))
        entry, k = _layer_plan(site, recipe, look_ahead=recipe.router.look_ahead and not first)
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
            + (" (as many shared as the rule says)" if recipe.partition.shared is None else "")
            + (f" ({first.shared} shared)" if first.shared else "")
            + f", {k + first.shared} run: FFN density {active:.3f}",
            f"partition {recipe.partition.method}, router {recipe.router.name}, selection "
            f"{recipe.selection.name}, compensation {recipe.compensation.name}"
            + (f", budget {recipe.budget.name}" if recipe.budget.name != "uniform" else "")
            + (f", {recipe.distil.steps} steps of distillation" if recipe.distil.steps else ""),
            f"reads at most {recipe.partition.tokens} tokens to partition and "
            f"{recipe.router.tokens} to fit routers, of the corpus: {todo.corpus}",
            f"needs {todo.disk / 1e9:.2f} GB of disk while it runs and {todo.memory / 1e9:.2f} GB of "
            "memory beyond what running the model takes",
        ]
    )


def _layer_plan(site: Site, recipe: Recipe, *, look_ahead: bool) -> tuple[LayerEntry, int]:
    where = f"layer {site.index}"
    wanted = recipe.partition
    experts = expert_count(site.neurons, wanted.expert_size, wanted.experts, where)
    shared = wanted.shared or 0
    routed = experts - shared
    k = recipe.selection.k
    if k is None:
        k = max(1, round(recipe.density * experts) - shared)
    if routed < 1 or k > routed:
        raise RecipeError(
            f"{where}: {k} routed experts should run, there are {experts} experts, "
            f"{shared} of them shared; lower selection.k or partition.shared"
        )
    entry = LayerEntry(
        layer=site.layer,
        neurons=site.neurons,
        width=site.width,
        experts=experts,
        shared=shared,
        router={
            "name": recipe.router.name, "hidden": recipe.router.hidden, "look_ahead": look_ahead
        },
        selection={"name": recipe.selection.name},
        compensation={"name": recipe.compensation.name, "rank": recipe.compensation.rank},
    )  # fmt: skip
    return entry, k


def _parameters(site: Site) -> int:
    matrices = 3 if site.gated else 2
    biases = {"gate": site.neurons, "up": site.neurons, "down": site.width}
    return matrices * site.neurons * site.width + sum(biases[role] for role in site.biases)
