"""What a conversion will do, worked out from `config.json` alone.

Shapes: N neurons, D width, E experts, H heads.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moefy.data.corpus import BATCH_TOKENS
from moefy.errors import RecipeError, unknown_choice
from moefy.evaluation.outputs import BACKWARD_TOKENS, LOGITS_BYTES
from moefy.methods.partition import expert_count, find_method
from moefy.methods.partition.shared import SHARED_BY
from moefy.methods.routers.gates import FLAT, LargestInputsRouter
from moefy.methods.selections import Threshold
from moefy.methods.tables import COMPENSATIONS, ROUTERS, SELECTIONS, choose
from moefy.methods.targets import LOSSES, TARGETS
from moefy.models import refusals
from moefy.models.answers import Answer, answer_of
from moefy.models.checkpoint import Checkpoint
from moefy.models.config import read_config
from moefy.models.entries import HeadEntry, LayerEntry
from moefy.models.heads import HeadSite, head_sites
from moefy.models.locate import Site, check_weights, disk_names, meta_model, side_of, sites
from moefy.models.quantised import unfilled
from moefy.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a conversion will do, known before a weight is read."""

    source: str
    model_class: str
    kind: str
    answer: Answer
    """By what the result is judged."""
    sites: list[Site]
    layers: list[LayerEntry]
    k: list[int]
    """Routed experts that run, per layer."""
    head_sites: list[HeadSite]
    """Attention blocks whose heads are routed; none where all heads run."""
    heads: list[HeadEntry]
    head_k: list[int]
    """Heads, or groups of them, that run, per attention block."""
    parameters: int
    mlp_parameters: int
    layer_parameters: int
    """Of the largest layer, attention included."""
    weights: int
    """Bytes of all parameters."""
    other: int
    """Bytes of the files beside the weights, which are copied."""
    disk: int
    """Bytes of disk needed while it runs."""
    memory: int
    """Bytes of memory at the peak, the model and its tokenizer among them, Python and its libraries not."""
    corpus: str
    notes: list[str]
    """What a person should know of the folder."""


def plan(checkpoint: Checkpoint, recipe: Recipe, corpus: str, *, adapter: bool = False) -> Plan:
    """Work out the plan from `config.json` alone.

    Raises `UnsupportedModel` or `RecipeError` where the model and the recipe do not go together.
    """
    _require_possible(recipe)
    model, mlps = _model(checkpoint)
    layers = _layers(mlps, recipe)
    blocks = [] if recipe.attention.density is None else head_sites(model)
    heads = [_head_plan(site, recipe) for site in blocks]
    total = _size(model)
    width = (getattr(model.config, "dtype", None) or torch.float32).itemsize
    sample = recipe.partition.tokens + recipe.router.tokens
    other = sum(file.stat().st_size for file in checkpoint.other_files)
    # Kept beside, layer by layer and tuned, until the result is whole; and in memory as often.
    rounded = 3 * sum(map(stored_bytes, mlps, (entry for entry, _ in layers)))
    seen = sum(s.width for s in mlps) + sum(s.width + s.neurons for s in blocks)
    return Plan(
        source=str(checkpoint.folder),
        model_class=type(model).__name__,
        kind=mlps[0].family.kind,
        answer=answer_of(model),
        sites=mlps,
        layers=[entry for entry, _ in layers],
        k=[k for _, k in layers],
        head_sites=blocks,
        heads=[entry for entry, _ in heads],
        head_k=[k for _, k in heads],
        parameters=total,
        mlp_parameters=sum(_parameters(s) for s in mlps),
        layer_parameters=max(_size(model.get_submodule(site.layer)) for site in mlps),
        weights=total * width,
        disk=sample * seen * width + rounded + (0 if adapter else total * width + other),
        other=other,
        memory=_memory(checkpoint, model, mlps, recipe, total * width, width) + rounded,
        corpus=corpus,
        notes=refusals.notes(checkpoint.config, model),
    )


def _require_possible(recipe: Recipe) -> None:
    """Raise `RecipeError` for what no model can be converted by."""
    if recipe.baseline is not None:
        raise RecipeError(
            f"recipe with baseline '{recipe.baseline}': it serves evaluation only "
            f"(moefy compare MODEL --recipes {recipe.baseline}); choose another to convert with"
        )
    find_method(recipe.partition.method)
    if recipe.partition.shared_by not in SHARED_BY:
        raise RecipeError(
            unknown_choice("partition.shared_by", recipe.partition.shared_by, SHARED_BY)
        )
    selection = choose(SELECTIONS, "selection", recipe.selection.name)
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


def _layers(mlps: list[Site], recipe: Recipe) -> list[tuple[LayerEntry, int]]:
    """`layer_plan` of every MLP; the first of encoder and decoder has none before it to look at."""
    sides = [side_of(site) for site in mlps]
    ahead = [side in sides[:number] for number, side in enumerate(sides)]
    return [
        layer_plan(site, recipe, look_ahead=recipe.router.look_ahead and has_one)
        for site, has_one in zip(mlps, ahead, strict=True)
    ]


def _model(checkpoint: Checkpoint) -> tuple[PreTrainedModel, list[Site]]:
    """The model on the meta device and its MLPs; refuses what would not stay what it is."""
    folder, tensors = checkpoint.folder, checkpoint.tensors if checkpoint.has_weights else {}
    model = meta_model(read_config(checkpoint))
    found = sites(model)
    refusals.refuse_pooling(model, checkpoint.folder)
    refusals.refuse_outputs(model, [site.layer for site in found])
    stored = {name: tensor.dtype for name, tensor in tensors.items()}
    ours = {name for site in found for name in site.parameters}
    wanted = [disk for disk, name in disk_names(model, stored).items() if name in ours]
    refusals.refuse_codes(folder, stored, wanted)
    if tensors:
        check_weights(model, checkpoint)
    return model, found


def describe(todo: Plan, recipe: Recipe, *, stream: bool = False) -> str:
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
            + (
                f", {k + first.shared} run: FFN density {active:.3f}"
                if recipe.budget.target_kl is None
                else f", as many run as a KL of {recipe.budget.target_kl:g} takes"
            ),
            f"partition {recipe.partition.method}, router {recipe.router.name}, selection "
            f"{recipe.selection.name}, compensation {first.compensation['name']}"
            + (f", budget {recipe.budget.name}" if recipe.budget.name != "uniform" else "")
            + (f", {recipe.distil.steps} steps of distillation" if recipe.distil.steps else ""),
            *_describe_heads(todo, recipe),
            *_describe_storage(todo, recipe),
            *([] if todo.answer.form == "next" else [f"judged by {todo.answer.describe()}"]),
            f"reads at most {recipe.partition.tokens} tokens to partition and "
            f"{recipe.router.tokens} to fit routers, of the corpus: {todo.corpus}",
            f"needs {(todo.weights + todo.other) / 1e9:.2f} GB of disk for the result and some for its tokens, "
            f"memory for one layer, {4e-9 * todo.layer_parameters:.2f} GB in fp32, and for its tokens"
            if stream
            else f"needs {todo.disk / 1e9:.2f} GB of disk while it runs and {todo.memory / 1e9:.2f} GB "
            f"of memory: {todo.weights / 1e9:.2f} the model, "
            f"{(todo.memory - todo.weights) / 1e9:.2f} the work",
            *todo.notes,
        ]
    )


FIXED = 110_000_000
"""Bytes for the corpus, its tokens, records, and libraries that are imported when they are needed."""
_TOKENIZER = 12
"""Memory of a tokenizer over the size of its file."""
_COMPARED = 7
"""Chunks of logits in fp32 that a comparison holds at once."""


def _memory(
    checkpoint: Checkpoint,
    model: PreTrainedModel,
    found: list[Site],
    recipe: Recipe,
    weights: int,
    width: int,
) -> int:
    """Bytes at the peak: what is held in every stage, of which the largest counts.

    Checked against measurements by experiments/memory_bars.py.
    """
    neurons, hidden = max(s.neurons for s in found), max(s.width for s in found)
    classes = getattr(model.config.get_text_config(), "vocab_size", 0)
    logits = _COMPARED * min(LOGITS_BYTES, 4 * classes * BATCH_TOKENS)
    forward = BATCH_TOKENS * width * (4 * neurons + 8 * hidden)
    layer = 3 * neurons * hidden * 4
    fit = 2 * layer + recipe.partition.tokens * neurons * 4 * 2 + 4096 * neurons * 4 * 3
    fit += (recipe.partition.tokens + recipe.router.tokens) * hidden * 4
    stages = [weights + forward, fit, 2 * weights + forward + logits]
    if recipe.allocates or recipe.distil.steps:
        metric = len(found) * hidden**2 * 4 if recipe.budget.weighs_errors else 0
        # What autograd keeps of a token in a layer: the MLP's activations, attention, norms.
        per_token = width * sum(6 * s.neurons + 9 * s.width for s in found)
        stages.append(weights + metric + BACKWARD_TOKENS * per_token + logits)
    file = checkpoint.folder / "tokenizer.json"
    tokenizer = _TOKENIZER * file.stat().st_size if file.exists() else 0
    return FIXED + tokenizer + max(stages)


def stored_bytes(site: Site, entry: LayerEntry) -> int:
    """Bytes of the rounded matrices of a layer in the side file; 0 where none is rounded."""
    if entry.storage is None:
        return 0
    codes = unfilled(site.neurons, site.width, site.gated, **entry.storage)
    return sum(tensor.numel() * tensor.itemsize for tensor in codes.tensors.values())


def _describe_storage(todo: Plan, recipe: Recipe) -> list[str]:
    size = sum(map(stored_bytes, todo.sites, todo.layers))
    if not size:
        return []
    weights = sum((3 if s.gated else 2) * s.neurons * s.width for s in todo.sites)
    return [
        f"MLP weights rounded to {recipe.storage.bits} bits with {recipe.storage.scales}-bit scales and offsets "
        f"for 32: {8 * size / weights:.2f} bits a weight, {size / 1e9:.3f} GB in moefy.safetensors"
    ]


def _describe_heads(todo: Plan, recipe: Recipe) -> list[str]:
    if not todo.heads:
        return []
    first, k, wanted = todo.heads[0], todo.head_k[0], recipe.attention
    size = first.heads // first.experts
    what = "heads" if size == 1 else f"groups of {size} heads"
    return [
        f"attention: {k} of {first.experts} {what} run in each of {len(todo.heads)} blocks, head "
        f"density {k / first.experts:.3f} (keys and values of all are computed); router "
        f"{wanted.router}, selection {wanted.selection}, compensation {wanted.compensation}"
    ]


def _head_plan(site: HeadSite, recipe: Recipe) -> tuple[HeadEntry, int]:
    wanted = recipe.attention
    assert wanted.density is not None
    if not choose(ROUTERS, "attention.router", wanted.router).reads_input_alone:
        able = sorted(name for name, kind in ROUTERS.items() if kind.reads_input_alone)
        raise RecipeError(
            f"attention.router '{wanted.router}' reads the rows of an MLP, heads have none; choose "
            f"one of: {', '.join(able)}"
        )
    if not choose(SELECTIONS, "attention.selection", wanted.selection).by_score:
        raise RecipeError(
            f"attention.selection '{wanted.selection}' does not decide by one token's scores; "
            "choose topk, threshold, dynamic_k or top_p"
        )
    if choose(COMPENSATIONS, "attention.compensation", wanted.compensation).centres:
        raise RecipeError(
            f"attention.compensation '{wanted.compensation}' is made for neurons; choose "
            "conditional_mean or mean_residual"
        )
    choose(LOSSES, "attention.loss", wanted.loss)
    experts = site.heads if wanted.group == "head" else site.groups
    entry = HeadEntry(
        block=site.block,
        heads=site.heads,
        head_dim=site.head_dim,
        width=site.width,
        experts=experts,
        router={"name": wanted.router, "hidden": wanted.hidden},
        selection={"name": wanted.selection},
        compensation={"name": wanted.compensation, "rank": wanted.rank},
    )
    return entry, max(1, round(wanted.density * experts))


def layer_plan(site: Site, recipe: Recipe, *, look_ahead: bool) -> tuple[LayerEntry, int]:
    """What is decided of one MLP before its weights are read, and its routed experts per token."""
    where = f"layer {site.index}"
    scored = choose(SELECTIONS, "selection", recipe.selection.name).by_score
    if scored and not site.gated and choose(ROUTERS, "router", recipe.router.name).reads_gate:
        raise RecipeError(
            f"{where}: router '{recipe.router.name}' reads the gate, and this model's MLPs have none; "
            "choose another, for example low_rank"
        )
    if recipe.budget.name == "one_threshold":
        _require_comparable(recipe)
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
        router={**router_of(site, recipe, (k + shared) / experts), "look_ahead": look_ahead},
        selection={"name": recipe.selection.name},
        compensation={"name": compensation_of(site, recipe), "rank": recipe.compensation.rank},
        storage=None if recipe.storage.bits == 16 else asdict(recipe.storage),
    )  # fmt: skip
    return entry, k


def _require_comparable(recipe: Recipe) -> None:
    """Raise `RecipeError` where scores of different layers are in no common unit, or decide by their rank."""
    router = choose(ROUTERS, "router", recipe.router.name)
    if not router.weighs or choose(SELECTIONS, "selection", recipe.selection.name) is not Threshold:
        raise RecipeError(
            "budget 'one_threshold' compares scores of different layers: it needs selection threshold and a "
            f"router that scores in nats ({', '.join(sorted(n for n, r in ROUTERS.items() if r.weighs))}); "
            "choose those, or budget greedy"
        )


_AUTO = {
    "flat": ("none", "none"),
    "gated": ("none", "residual"),
    "plain": ("centred", "centred_residual"),
}
"""The compensation `auto`, without a residual and with one."""


def compensation_of(site: Site, recipe: Recipe) -> str:
    """The compensation of one MLP, with `auto` decided by its activation."""
    name = recipe.compensation.name
    if name == "auto":
        kind = "flat" if site.activation in FLAT else "gated" if site.gated else "plain"
        name = _AUTO[kind][recipe.compensation.rank > 0]
    choose(COMPENSATIONS, "compensation", name)
    return name


def router_of(site: Site, recipe: Recipe, density: float) -> dict[str, Any]:
    """Name and settings of the router of one MLP of which a share `density` runs.

    Those that a recipe has by name are written of every router. Raises `RecipeError` for settings that
    this router does not have.
    """
    wanted = recipe.router
    kind = choose(ROUTERS, "router", wanted.name)
    known = [field.name for field in fields(kind.Settings)]
    for name in wanted.settings:
        if name not in known:
            raise RecipeError(unknown_choice(f"setting of router '{wanted.name}'", name, known))
    given = {"hidden": wanted.hidden, "bits": wanted.bits, "inputs": wanted.inputs}
    inputs = vars(LargestInputsRouter.planned(site, given, density))
    settings = {"codes": recipe.storage.bits, **wanted.settings}
    own = vars(kind.planned(site, {**given, **settings}, density))
    entry = {"name": wanted.name, **given, **inputs} | {n: own[n] for n in own if n in given}
    others = {name: own[name] for name in own if name not in given}
    return {**entry, "settings": others} if others else entry


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _parameters(site: Site) -> int:
    matrices = 3 if site.gated else 2
    biases = {"gate": site.neurons, "up": site.neurons, "down": site.width}
    return matrices * site.neurons * site.width + sum(biases[role] for role in site.biases)
