"""Find the MLPs of a transformers model, and name their tensors in the model and on disk.

    model = meta_model(read_config(checkpoint))
    for site in sites(model):
        mlp = read_mlp(site, model.get_parameter)

Rows of `moefy.models.families` say where to look; a type that has no row is searched by structure. This
module reads no files and changes no model.

Shapes: D model width, N neurons.
"""

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from moefy.errors import CheckpointError, UnsupportedModel
from moefy.models import search as structure
from moefy.models.answers import kind_of
from moefy.models.checkpoint import Checkpoint
from moefy.models.families import FAMILIES, Family, config_value
from moefy.models.mlp import DenseMlp
from moefy.run.reading import reason

_EXPERT_COUNTS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
_DEFAULT_CLASS = {
    "decoder": "AutoModelForCausalLM",
    "encoder": "AutoModel",
    "encoder-decoder": "AutoModelForSeq2SeqLM",
    "image": "AutoModelForImageClassification",
}


class Place(Protocol):
    """A module whose input is looked at."""

    @property
    def index(self) -> int:
        """A number that no other place of the model has."""

    @property
    def layer(self) -> str:
        """Full path of the layer, or block, that it belongs to."""

    @property
    def module(self) -> str:
        """Full path of the module."""

    @property
    def width(self) -> int:
        """Width of the input."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One MLP of a model: where it is and what it computes."""

    index: int
    """Position over all MLPs of the model, from 0; encoder before decoder."""
    layer: str
    """Full path of the layer's module."""
    family: Family
    """The row it was found by; `up` and `gate` are those that this model has."""
    neurons: int
    """N."""
    width: int
    """D."""
    activation: str
    """Key of transformers' `ACT2FN`."""
    gated: bool
    biases: frozenset[str]
    """Which of "gate", "up", "down" have a bias."""
    expert: int | None = None
    """Of an expert of a mixture whose experts lie in one tensor `[E, ...]`: its number there; `up`, `gate`
    and `down` then name tensors. None for an MLP with tensors of its own."""

    @property
    def module(self) -> str:
        """Full path of the module that SparseMlp replaces: the container, or `up` for a splice."""
        return f"{self.layer}.{self.family.container or self.family.up}"

    @property
    def act(self) -> str | None:
        """Full path of the activation module of a splice, which becomes an identity."""
        return None if self.family.act is None else f"{self.layer}.{self.family.act}"

    def path(self, role: str) -> str:
        """Full path of the module that holds "gate", "up" or "down".

        Where gate and up are fused both are the same module. Raises `KeyError` for a role that
        this MLP does not have.
        """
        names = {"up": self.family.up, "down": self.family.down}
        if self.gated:
            names["gate"] = self.family.up if self.family.fused else str(self.family.gate)
        return f"{self.layer}.{names[role]}"

    def parameter(self, role: str, kind: str = "weight") -> str:
        """Full name of the parameter with the `weight` or `bias` of "gate", "up" or "down"."""
        if self.expert is None:
            return f"{self.path(role)}.{kind}"
        return self.path(role) if kind == "weight" else f"{self.path(role)}_{kind}"

    def part(self, tensor: Tensor) -> Tensor:
        """What of a parameter is this MLP's: all of it, or the slice of one expert (a view)."""
        return tensor if self.expert is None else tensor[self.expert]

    @property
    def neuron_axes(self) -> dict[str, int]:
        """Parameters with a neuron axis, and which axis of `part` it is; a fused one holds 2N there."""
        rows = int(self.family.transposed)
        axes = {}
        for role in ("gate", "up") if self.gated and not self.family.fused else ("up",):
            axes[self.parameter(role)] = rows
            if role in self.biases:
                axes[self.parameter(role, "bias")] = 0
        axes[self.parameter("down")] = 1 - rows
        return axes

    @property
    def parameters(self) -> tuple[str, ...]:
        """All parameters of the MLP, the output bias included."""
        bias = (self.parameter("down", "bias"),) if "down" in self.biases else ()
        return (*self.neuron_axes, *bias)


def sites(model: PreTrainedModel) -> list[Site]:
    """Every MLP of `model`, real or on the meta device, in the order in which they run.

    Raises `UnsupportedModel` for a model that has experts already, whose layers share MLP weights,
    or whose MLPs cannot be found.
    """
    config = model.config
    _refuse_experts(model)
    known = FAMILIES.get(config.model_type)
    modules = dict(model.named_modules(remove_duplicate=False))
    found: list[Site] = []
    for row in [known] if known else structure.search(model):
        family = replace(row, kind=kind_of(model))
        for key in family.refuse:
            if config_value(config, key):
                raise UnsupportedModel(
                    f"{config.model_type}: config.json has {key}=true, whose MLP sums in another "
                    f"way; set {key} to false"
                )
        for pattern, depth in zip(family.layers, family.depth, strict=True):
            layers = matching(modules, pattern)
            expected = config_value(config, depth)
            if layers and len(layers) != expected:
                raise UnsupportedModel(
                    f"{config.model_type}: {len(layers)} modules match '{pattern}', config.json "
                    f"says {depth}={expected}; layers that share their weights cannot be split"
                )
            for layer in layers:
                found.append(_site(len(found), layer, family, modules, config))
    if not found:
        raise UnsupportedModel(
            f"{config.model_type}: {type(model).__name__} has no layers of that type"
        )
    _refuse_shared(model, found, modules)
    return found


def side_of(site: Place) -> str:
    """Whether a layer reads the tokens of the `encoder` or the `decoder`."""
    return "encoder" if "encoder" in site.layer.split(".") else "decoder"


def read_mlp(site: Site, get: Callable[[str], Tensor]) -> DenseMlp:
    """The weights of one MLP, neuron-major, in the dtypes in which `get` gives them.

    `get` takes the name of a parameter of the model, such as `site.parameter("up")`. Fused
    and transposed storage is undone by views: nothing is copied.
    """

    def weight(role: str) -> Tensor:
        tensor = site.part(get(site.parameter(role)))
        return tensor.T if site.family.transposed else tensor

    def bias(role: str) -> Tensor | None:
        return site.part(get(site.parameter(role, "bias"))) if role in site.biases else None

    N = site.neurons
    gate_ND = gate_bias_N = None
    up_ND, up_bias_N = weight("up"), bias("up")
    if site.family.fused:
        gate_ND, up_ND = up_ND[:N], up_ND[N:]
        if up_bias_N is not None:
            gate_bias_N, up_bias_N = up_bias_N[:N], up_bias_N[N:]
    elif site.gated:
        gate_ND, gate_bias_N = weight("gate"), bias("gate")
    return DenseMlp(
        up_ND=up_ND,
        down_ND=weight("down").T,
        activation=site.activation,
        gate_ND=gate_ND,
        up_bias_N=up_bias_N,
        gate_bias_N=gate_bias_N,
        down_bias_D=bias("down"),
    )


def permute(site: Site, name: str, tensor: Tensor, neurons: Tensor) -> Tensor:
    """A parameter of `site` with its neurons in the order `neurons` `[N]`, in the stored layout.

    `name` is the name of the parameter in the model. A parameter without a neuron axis (the output
    bias) comes back as it is.
    """
    axis = site.neuron_axes.get(name)
    if axis is None:
        return tensor
    part = site.part(tensor)
    if site.family.fused and part.shape[axis] == 2 * site.neurons:
        neurons = torch.cat([neurons, neurons + site.neurons])
    part = part.index_select(axis, neurons)
    if site.expert is None:
        return part
    others = tensor.clone()
    others[site.expert] = part
    return others


def _class_of(config: PreTrainedConfig, where: str) -> Any:
    """The class that `meta_model` builds."""
    names = config.architectures if isinstance(config.architectures, list | tuple) else ()
    for name in names:
        kind = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
            return kind
    if config.model_type not in transformers.CONFIG_MAPPING:
        raise UnsupportedModel(f"{where} has no model_type '{config.model_type}'")
    family = FAMILIES.get(config.model_type)
    return getattr(transformers, _DEFAULT_CLASS[family.kind] if family else "AutoModel")


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of the model of `config`, without building it."""
    kind = _class_of(config, f"config.json: transformers {transformers.__version__}")
    if not issubclass(kind, PreTrainedModel):
        found = kind._model_mapping[type(config)]
        kind = found[0] if isinstance(found, list | tuple) else found
    one: type[PreTrainedModel] = kind
    return one


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of `config` on the meta device: every module and shape, no memory.

    Its class is the first of `config.architectures` that transformers knows, or else the usual one
    for the kind of model. Raises `UnsupportedModel` where transformers cannot build it.
    """
    where = f"config.json: transformers {transformers.__version__}"
    kind = _class_of(config, where)
    if issubclass(kind, PreTrainedModel):
        build = kind._from_config
    else:
        build = functools.partial(kind.from_config, trust_remote_code=False)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = build(config)
    except Exception as error:  # whatever modeling code makes of sizes that contradict each other
        raise UnsupportedModel(
            f"{where} cannot build {kind.__name__} for model_type '{config.model_type}': {reason(error)}"
        ) from error
    model.train(False)
    return model


def disk_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Which parameter of `model` each tensor on disk is loaded into, by transformers' own rules.

    `keys` are the names in the checkpoint. Tensors that the model does not have, and those that
    transformers computes rather than renames, are not in the result. Raises `UnsupportedModel`
    where the installed transformers does not offer the functions that this needs, which it does
    not promise to keep.
    """
    state = model.state_dict()
    try:
        renamed = _renamed(model, state, keys)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UnsupportedModel(
            f"transformers {transformers.__version__} maps tensor names in a way that is not known "
            f"here ({error}); use transformers 5.17 to 5.24"
        ) from error
    return {key: name for key, name, computed in renamed if name in state and not computed}


def check_weights(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Whether `model`, of the meta device, gets every parameter from disk, in its own shape.

    transformers gives what is missing random values. Raises `CheckpointError` naming the tensor.
    """
    state, folder = model.state_dict(), checkpoint.folder
    found = set()
    for key, name, computed in _renamed(model, state, checkpoint.tensors):
        found.add(name)
        stored = checkpoint.tensors[key]
        shape = stored.shape
        floats = name in state and state[name].is_floating_point() and not computed
        if floats and not stored.dtype.startswith(("F", "BF")):
            raise CheckpointError(
                f"{folder}: {key} is stored as {stored.dtype}, {type(model).__name__} has numbers with a "
                "point there; download it again, or dequantize it"
            )
        if name in state and not computed and shape != tuple(state[name].shape):
            raise CheckpointError(
                f"{folder}: {key} has shape {list(shape)}, config.json makes it "
                f"{list(state[name].shape)}; one of them is of another model"
            )
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for one, other in ties.items():
        if one in found or other in found:
            found |= {one, other}
    unneeded = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    missing = [n for n in state if n not in found and not any(p.search(n) for p in unneeded)]
    if missing:
        raise CheckpointError(
            f"{folder}: no tensor on disk is {missing[0]}"
            + (f", nor {len(missing) - 1} others" if len(missing) > 1 else "")
            + f" of {type(model).__name__}; give the whole model, or name its class in "
            "architectures of config.json"
        )


def _renamed(
    model: PreTrainedModel, state: dict[str, Tensor], keys: Iterable[str]
) -> list[tuple[str, str, bool]]:
    """Disk names and model names as `from_pretrained` pairs them, and whether it computes rather than
    renames."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters: list[Any] = [entry for entry in mapping if not isinstance(entry, WeightRenaming)]
    pairs = []
    for key in keys:
        name, converter = rename_source_key(
            key, renamings, converters, model.base_model_prefix, state
        )
        if name not in state and key in state:
            name, converter = rename_source_key(key, [], [], model.base_model_prefix, state)
        pairs.append((key, name, converter is not None))
    return pairs


def matching(modules: dict[str, nn.Module], pattern: str) -> list[str]:
    """Paths that end in `pattern`, by index."""
    regex = re.compile(r"(?:^|.*\.)" + re.escape(pattern).replace(r"\{\}", r"(\d+)"))
    matches = [match for path in modules if (match := regex.fullmatch(path))]
    return [match.group() for match in sorted(matches, key=lambda match: int(match.group(1)))]


def _site(
    index: int, layer: str, family: Family, modules: dict[str, nn.Module], config: PreTrainedConfig
) -> Site:
    if family.plain_up is not None and f"{layer}.{family.plain_up}" in modules:
        family = replace(family, up=family.plain_up, gate=None, plain_up=None)
    roles = {"up": family.up, "down": family.down}
    if family.gate is not None:
        roles["gate"] = family.gate
    maps: dict[str, Any] = {}
    for role, name in roles.items():
        module = modules.get(f"{layer}.{name}")
        if not isinstance(getattr(module, "weight", None), Tensor):
            raise UnsupportedModel(
                f"{config.model_type}: {layer} has no linear map '{name}' ({role}); found "
                f"{type(module).__name__}"
            )
        maps[role] = module
    activation = config_value(config, family.activation)
    if (
        not isinstance(activation, str)
        or activation not in ACT2FN
        or any(ACT2FN[activation].parameters())
    ):
        raise UnsupportedModel(
            f"{config.model_type}: activation {activation!r} is not a function of one number "
            "from transformers' ACT2FN"
        )
    neurons, width = _checked_shape(layer, maps, family, config)
    return Site(
        index=index,
        layer=layer,
        family=family,
        neurons=neurons,
        width=width,
        activation=activation,
        gated=family.fused or family.gate is not None,
        biases=frozenset(r for r, m in maps.items() if getattr(m, "bias", None) is not None),
    )


def _checked_shape(
    layer: str, maps: dict[str, Any], family: Family, config: PreTrainedConfig
) -> tuple[int, int]:
    """N and D, which the linear maps and the config have to agree on."""
    first, second = maps["down"].weight.shape
    neurons, width = (first, second) if family.transposed else (second, first)
    rows = maps["up"].weight.shape[int(family.transposed)]
    if not neurons or not width:
        raise UnsupportedModel(f"{config.model_type}: {layer} has {neurons} neurons, width {width}")
    for what, got, rule in (("neurons", neurons, family.neurons), ("width", width, family.width)):
        expected = config_value(config, rule)
        if got != expected or rows != neurons * (2 if family.fused else 1):
            raise UnsupportedModel(
                f"{config.model_type}: {layer} has {got} {what}, config.json says {rule}={expected}"
            )
    return neurons, width


def _refuse_experts(model: PreTrainedModel) -> None:
    config = model.config
    settings = config.to_dict()
    for part in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        for key in _EXPERT_COUNTS:
            count = part.get(key)
            if isinstance(count, int) and count > 0:
                raise UnsupportedModel(
                    f"{config.model_type}: config.json has {key}={count}, so this is a mixture of "
                    "experts already; give its dense counterpart"
                )
    for path, _ in model.named_modules():
        if path.endswith(".experts"):
            raise UnsupportedModel(
                f"{config.model_type}: {path} exists, so this is a mixture of experts already; "
                "give its dense counterpart"
            )


def _refuse_shared(
    model: PreTrainedModel, found: list[Site], modules: dict[str, nn.Module]
) -> None:
    owners: dict[int, str] = {}
    for site in found:
        for name in site.parameters:
            path, _, leaf = name.rpartition(".")
            parameter = getattr(modules[path], leaf)
            other = owners.setdefault(id(parameter), name)
            if other != name:
                raise UnsupportedModel(
                    f"{model.config.model_type}: {other} and {name} are one tensor; layers that "
                    "share their weights cannot be split"
                )
