"""What to do with a model, as data: a `Recipe` of frozen parts, read from strict YAML.

    recipe = load("default")                      # a shipped recipe, or a path to a YAML file
    recipe = override(recipe, {"router.name": "linear", "density": "0.5"})

It knows names and numbers only: whether a method exists is checked by the table that holds it, and
nothing here imports torch.
"""

import dataclasses
import reprlib
import typing
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from moefy.errors import RecipeError, unknown_choice

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

BUDGETS = ("uniform", "greedy", "solver", "one_threshold")

R = TypeVar("R", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class PartitionRecipe:
    """How the neurons of a layer are grouped."""

    method: str = "contribution"
    """A name of `moefy ls methods`, or `package.module:function`."""
    expert_size: int | None = None
    """Neurons per expert; None takes 32 or the nearest divisor of the neuron count."""
    experts: int | None = None
    """Number of experts; excludes `expert_size`."""
    shared: int | None = 0
    """Experts that always run; null lets ExpertWeaver's rule say how many."""
    shared_by: str = "contribution"
    """Which neurons they are made of: `contribution`, `activation_rate` or `variation`."""
    tokens: int = 8192
    """Tokens whose activations the method sees."""

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other."""
        if self.expert_size is not None and self.experts is not None:
            raise RecipeError("partition: expert_size and experts exclude each other; give one")
        for name in ("expert_size", "experts", "tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"partition.{name}: got {value}, must be at least 1")
        if self.shared is not None and self.shared < 0:
            raise RecipeError(f"partition.shared: got {self.shared}, must be at least 0")


@dataclass(frozen=True, kw_only=True)
class RouterRecipe:
    """Which router predicts the experts, and how it is fitted."""

    name: str = "mlp"
    """A name of `moefy ls routers`."""
    hidden: int = 128
    """Hidden width of routers that have one, and the rank of `low_rank`."""
    bits: int = 2
    """Bits a weight of the `low_bit` router: 1, 2 or 4."""
    inputs: float | None = None
    """Share of a token's inputs that `largest_inputs` reads, at most 1; None grows with the density."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What else the router itself has to set, by name; those above may stand here too."""
    target: str = "contribution"
    """What it predicts of an expert: `contribution`, `activation` or `deviation`."""
    loss: str = "weighted_topk"
    """`weighted_topk`, `share_of_largest`, `norm_mse` or `any_active`."""
    look_ahead: bool = False
    """Read the input of the MLP before, so that the choice is known a layer early."""
    tokens: int = 65536
    """Most tokens to fit on; fewer are used where the corpus has fewer."""
    epochs: int = 20
    """Most passes over those tokens; fitting stops early on held-out documents."""
    learning_rate: float = 3e-3
    batch_size: int = 1024

    def __post_init__(self) -> None:
        """Refuse a share of the inputs outside (0, 1]."""
        if self.inputs is not None and not 0 < self.inputs <= 1:
            raise RecipeError(
                f"router.inputs: got {self.inputs}, must be above 0 and at most 1, or null"
            )


@dataclass(frozen=True, kw_only=True)
class SelectionRecipe:
    """How scores become the set of experts that run."""

    name: str = "topk"
    """A name of `moefy ls selections`."""
    k: int | None = None
    """Routed experts that run for a token; None takes the number from the density."""
    most: float | None = None
    """Hard cap of selections that vary: experts of one token over their mean number, at least 1."""

    def __post_init__(self) -> None:
        """Refuse a cap below the mean, and layers in which no expert is chosen."""
        if self.k is not None and self.k < 1:
            raise RecipeError(f"selection.k: got {self.k}, must be at least 1")
        if self.most is not None and self.most < 1:
            raise RecipeError(f"selection.most: got {self.most}, must be at least 1")


@dataclass(frozen=True, kw_only=True)
class CompensationRecipe:
    """What stands in for the experts that did not run."""

    name: str = "conditional_mean"
    """A name of `moefy ls compensations`, or `auto`: `none` after ReLU, which leaves most neurons at
    exactly zero and so little to stand in for, `residual` with a gate, else `centred_residual`."""
    rank: int = 16
    """Rank of the low-rank residual; 0 makes `auto` leave it out. Other compensations have none."""


@dataclass(frozen=True, kw_only=True)
class AttentionRecipe:
    """Attention heads as experts; how their router is fitted besides is as for MLPs."""

    density: float | None = None
    """Share of the heads that run for a token; None leaves attention as it is."""
    group: str = "head"
    """`head`: every head is an expert. `kv`: the heads that share keys and values are one."""
    router: str = "mlp"
    """A router that reads the input alone: see `moefy ls routers`."""
    hidden: int = 32
    """Hidden width of routers that have one, and the rank of `low_rank`."""
    loss: str = "weighted_topk"
    """As `router.loss`; the target is always the head's contribution."""
    selection: str = "topk"
    """A selection that looks at one token's scores: see `moefy ls selections`."""
    compensation: str = "conditional_mean"
    """A name of `moefy ls compensations`."""
    rank: int = 16
    """Rank of the low-rank residual; other compensations have none."""

    def __post_init__(self) -> None:
        """Refuse a density outside (0, 1] and unknown groups."""
        if self.density is not None and not 0 < self.density <= 1:
            raise RecipeError(
                f"attention.density: got {self.density}, must be above 0 and at most 1, or null"
            )
        if self.group not in ("head", "kv"):
            raise RecipeError(unknown_choice("attention.group", self.group, ("head", "kv")))


@dataclass(frozen=True, kw_only=True)
class BudgetRecipe:
    """How the density is spread over the layers; its mean over neurons stays `density`."""

    name: str = "uniform"
    """`uniform`, `greedy` (measured output error), `solver` (measured KL), or `one_threshold`: scores of all
    layers in one unit, of router bit_planes, under the same threshold."""
    per: str = "weights"
    """What the solver holds constant: active `weights`, or measured `time` of a token."""
    target_kl: float | None = None
    """KL to dense (nats per token) to reach with the least density; `density` is then not used."""

    @property
    def weighs_errors(self) -> bool:
        """Whether it asks what an error of every layer's output costs."""
        return self.name in ("greedy", "one_threshold")

    def __post_init__(self) -> None:
        """Refuse unknown budgets."""
        if self.name not in BUDGETS:
            raise RecipeError(unknown_choice("budget.name", self.name, BUDGETS))
        if self.target_kl is not None and not self.target_kl > 0:
            raise RecipeError(
                f"budget.target_kl: got {self.target_kl}, must be above 0 nats per token, or null"
            )
        if self.per not in ("weights", "time"):
            raise RecipeError(unknown_choice("budget.per", self.per, ("weights", "time")))


@dataclass(frozen=True, kw_only=True)
class DistilRecipe:
    """Training routers and compensations against the dense model, all other weights frozen."""

    steps: int = 0
    """Optimiser steps; 0 leaves distillation out."""
    tokens: int = 1536
    """Tokens of a step."""
    learning_rate: float = 0.05
    """Largest step of Adam, relative to the root mean square of each weight matrix."""
    scope: str = "auto"
    """`model` (KL of the logits), `layer` (output error), or `auto`: whichever fits in memory."""

    def __post_init__(self) -> None:
        """Refuse unknown scopes."""
        if self.scope not in ("auto", "model", "layer"):
            raise RecipeError(
                unknown_choice("distil.scope", self.scope, ("auto", "model", "layer"))
            )


@dataclass(frozen=True, kw_only=True)
class StorageRecipe:
    """In how many bits the matrices of MLPs are stored, rounded before anything is fitted."""

    bits: int = 16
    """16 leaves them as the source has them; 8, 4, 3 or 2 with a scale and an offset for 32 inputs."""
    scales: int = 8
    """Bits of each of those: 8, in 255ths of the largest of an output, or 16 (fp16)."""

    def __post_init__(self) -> None:
        """Refuse other numbers of bits."""
        for name, known in (("bits", (16, 8, 4, 3, 2)), ("scales", (8, 16))):
            if getattr(self, name) not in known:
                raise RecipeError(
                    f"storage.{name}: got {getattr(self, name)}, must be one of "
                    f"{', '.join(map(str, known))}"
                )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a conversion does, apart from the model and the data."""

    density: float = 0.25
    """FFN density: the share of routed and shared MLP neurons that run for a token."""
    partition: PartitionRecipe = field(default_factory=PartitionRecipe)
    router: RouterRecipe = field(default_factory=RouterRecipe)
    selection: SelectionRecipe = field(default_factory=SelectionRecipe)
    compensation: CompensationRecipe = field(default_factory=CompensationRecipe)
    attention: AttentionRecipe = field(default_factory=AttentionRecipe)
    budget: BudgetRecipe = field(default_factory=BudgetRecipe)
    distil: DistilRecipe = field(default_factory=DistilRecipe)
    storage: StorageRecipe = field(default_factory=StorageRecipe)
    baseline: str | None = None
    """`teal` or `wina` instead of all of the above: input sparsity, for evaluation only."""
    seed: int = 0
    context: int = 512
    """Tokens a document is cut to when the model is run on it."""

    @classmethod
    def named(
        cls, name: str | Path, settings: dict[str, Any] | None = None, **top: Any
    ) -> "Recipe":
        """A shipped recipe or YAML file with settings replaced.

        Recipe.named("default", density=0.5)
        Recipe.named("default", {"router.bits": 4}, seed=1)
        """
        return override(load(name), {**(settings or {}), **top})

    @property
    def allocates(self) -> bool:
        """Whether layers may get different densities, which is decided with all of them at hand."""
        return self.budget.name != "uniform" or self.budget.target_kl is not None

    def __post_init__(self) -> None:
        """Refuse a density outside (0, 1]."""
        if not 0 < self.density <= 1:
            raise RecipeError(f"density: got {self.density}, must be above 0 and at most 1")


def shipped() -> dict[str, str]:
    """Names of the shipped recipes, each with the comment on its first line."""
    found = {}
    for file in sorted((resources.files("moefy") / "recipes").iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            first = file.read_text(encoding="utf-8").splitlines()[0]
            found[file.name.removesuffix(".yaml")] = first.lstrip("# ")
    return found


def for_stream(name: Any) -> Any:
    """What a streamed conversion takes for the default, which compares layers with each other."""
    return "largest_inputs" if name == "default" else name


def load(name_or_path: str | Path) -> Recipe:
    """Read a shipped recipe by name, or a YAML file.

    Raises `RecipeError` for an unknown name, broken YAML, an unknown key or a wrong type.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise RecipeError(f"recipe {path}: no such file")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise RecipeError(f"recipe {path}: cannot be read: {error}; write it anew") from None
    else:
        names = shipped()
        if str(name_or_path) not in names:
            raise RecipeError(
                unknown_choice("recipe", str(name_or_path), names) + ", or a .yaml file"
            )
        text = (resources.files("moefy") / "recipes" / f"{name_or_path}.yaml").read_text("utf-8")
    return from_dict(_yaml(text, f"recipe {name_or_path}") or {}, where=str(name_or_path))


def from_dict(data: Any, where: str = "recipe") -> Recipe:
    """Build a `Recipe` from nested dicts; unknown keys and wrong types are errors."""
    recipe: Recipe = _build(Recipe, data, where)
    return recipe


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Nested dicts that `from_dict` reads back to an equal recipe."""
    data = dataclasses.asdict(recipe)
    if not data["router"]["settings"]:
        del data["router"]["settings"]
    if recipe.storage == StorageRecipe():
        del data["storage"]
    return data


def flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def override(recipe: R, settings: dict[str, Any]) -> R:
    """A copy with dotted keys replaced, of a recipe of any kind: `{"router.name": "linear", "density": "0.5"}`.

    A density takes the place of a target for KL, unless both are asked for.
    Values may be strings as they come from a command line; they are read as YAML.
    """
    data = dataclasses.asdict(recipe)
    for key, value in settings.items():
        *parents, last = key.split(".")
        node = data
        for parent in parents:
            child = node.get(parent)
            if not isinstance(child, dict):
                raise RecipeError(unknown_choice("recipe key", key, flat(data)))
            node = child
        own = parents[-1:] == ["settings"]  # the names of settings are a router's own
        if not own and (last not in node or isinstance(node[last], dict)):
            raise RecipeError(unknown_choice("recipe key", key, flat(data)))
        node[last] = _yaml(value, f"--set {key}") if isinstance(value, str) else value
    if "density" in settings and "budget.target_kl" not in settings and "budget" in data:
        data["budget"]["target_kl"] = None
    changed: R = _build(type(recipe), data, "--set")
    return changed


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        what = (
            "nested too deeply"
            if isinstance(error, RecursionError)
            else " ".join(str(error).split())
        )
        raise RecipeError(f"{where}: not YAML: {what[:300]}") from None


def _build(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: got {reprlib.repr(data)}, expected keys and values")
    types = typing.get_type_hints(kind)
    values = {}
    for key, value in data.items():
        if key not in types:
            raise RecipeError(f"{where}: {unknown_choice('recipe key', str(key), types)}")
        values[key] = _value(types[key], value, f"{where}: {key}")
    return kind(**values)


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, where)
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        return value
    allowed = typing.get_args(kind) or (kind,)
    if isinstance(value, int | float) and not -1e300 <= value <= 1e300:
        raise RecipeError(f"{where}: got {reprlib.repr(value)}, expected a finite number")
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, allowed) or isinstance(value, bool) != (kind is bool):
        names = " or ".join("null" if t is type(None) else t.__name__ for t in allowed)
        raise RecipeError(f"{where}: got {reprlib.repr(value)}, expected {names}")
    return value
