"""What every router, selection and compensation is, and the compensation that adds nothing.

Shapes: T tokens, D width, E routed experts.
"""

import inspect
import threading
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn

from moefy.errors import RecipeError
from moefy.models.locate import Site
from moefy.models.mlp import DenseMlp
from moefy.models.quantised import Quantised
from moefy.models.schema import Field, number, optional

WIDE_BITS = 16
"""Bits of a weight that nobody has rounded: bf16."""


class WeightBits(NamedTuple):
    """Bits of one weight as it is stored, scales included."""

    inputs: float = WIDE_BITS
    """Of gate and up: a neuron's scales are read with its weights."""
    down: float = WIDE_BITS
    """Of down, as far as it is read with its neuron: the code."""
    down_scales: float = 0
    """Of down, for every neuron whether it runs or not: 32 neurons share scales."""

    @classmethod
    def of(cls, mlp: DenseMlp) -> "WeightBits":
        """Those of matrices in codes, or of bf16."""
        stored = mlp.stored
        if stored is None:
            return cls()
        return cls(stored.bits + stored.overhead("up"), stored.bits, stored.overhead("down"))


class Context(threading.local):
    """What is known of one forward pass beyond the input of a layer; every thread sees that of its own pass."""

    def __init__(
        self,
        *,
        mask_BT: Tensor | None = None,
        batch: int = 1,
        cache: object | None = None,
        prompt: bool = True,
    ) -> None:
        self.mask_BT = mask_BT
        """Positions that hold tokens, for the tokens of this pass."""
        self.batch = batch
        """Sequences in the batch."""
        self.cache = cache
        """The key-value cache, whose identity stands for the sequences that are being generated."""
        self.prompt = prompt
        """Whether nothing came before these tokens: prefill, or a pass without a cache."""
        self.previous_TD: Tensor | None = None
        """Input of the MLP before this one in the same pass, for routers that look ahead."""
        self.attended: Tensor | None = None
        """What an attention module was given, until its heads are projected."""

    def __reduce__(self) -> tuple[type["Context"], tuple[()]]:
        """A copied or pickled model has no pass behind it: none of its tensors go along."""
        return Context, ()


class RoughCodes(NamedTuple):
    """What scores are made of that are the expected size of a neuron's contribution, given its top bits.

    `size sqrt((act(g)^2 + act'(g)^2 v_g) (u^2 + v_u))` of the rough gate g and up u, their mean errors added; without a
    gate `size sqrt(act(u)^2 + act'(u)^2 v_u)`. Slopes as `bit_planes` takes them.
    """

    planes: int
    """Top bits that are read."""
    matrices: Mapping[str, Quantised]
    """The codes of `gate` and `up` that they are the top bits of."""
    errors: Mapping[str, tuple[Tensor, Tensor]]
    """Mean and variance `[N]` of what each leaves out."""
    size_N: Tensor


class Router(nn.Module):
    """Scores `[T, E]` of the routed experts from the input of the MLP; a higher score runs first.

    Subclasses take `(width, experts)` and their `Settings` by name, or define `make`. Their parameters
    and buffers are what is saved.
    """

    @dataclass(frozen=True, kw_only=True)
    class Settings:
        """What a recipe may set of a router, by name and type: numbers, strings, and booleans."""

    trainable: ClassVar[bool] = True
    """Whether there is something to fit after `initialise`."""
    deployable: ClassVar[bool] = True
    """False for routers that need the very work they are meant to save."""
    reads_input_alone: ClassVar[bool] = False
    """True where nothing is taken from gate and up rows, so that it can score attention heads."""

    weighs: ClassVar[bool] = False
    """True where scores can be in one unit in all layers: it defines `weigh`."""
    reads_gate: ClassVar[bool] = False
    """True if the router cannot score an MLP without a gate."""

    @classmethod
    def settings(cls, given: Mapping[str, Any]) -> Settings:
        """Its settings out of `given`, which may hold those of others too.

        Raises `RecipeError` for one of another type, and where one without a default is not given.
        """
        types, values = get_type_hints(cls.Settings), {}
        given = {**given, **(given.get("settings") or {})}
        for field in fields(cls.Settings):
            if field.name in given:
                value, kind = given[field.name], types[field.name]
                if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
                    raise RecipeError(
                        f"router.{field.name}: got {value!r}, expected "
                        f"{getattr(kind, '__name__', kind)}"
                    )
                values[field.name] = value
            elif field.default is MISSING:
                raise RecipeError(f"router.{field.name} is missing; set router.settings")
        return cls.Settings(**values)

    @classmethod
    def planned(cls, site: Site, given: Mapping[str, Any], density: float) -> Settings:
        """Its settings for one MLP of which a share `density` runs, from what a recipe gives."""
        return cls.settings(given)

    @classmethod
    def make(cls, width: int, experts: int, neurons: int, given: Mapping[str, Any]) -> "Router":
        """The router of a layer of `neurons` routed neurons; `given` is `router` of its entry."""
        return cls(width, experts, **vars(cls.settings(given)))

    @property
    def computes_gate(self) -> bool:
        """True where scores are made of every neuron's gate, which is then not computed again.

        Such a router defines `scores`.
        """
        return False

    def scores(self, gate_TN: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]` from gates before their activation `[T, N]`, where `computes_gate`."""
        raise TypeError(f"{type(self).__name__} does not score by gates")

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, whole: DenseMlp) -> None:
        """Set the parameters from the routed neurons, in expert order, and a sample of inputs."""

    def weigh(self, mlp: DenseMlp, metric_DD: Tensor) -> None:
        """Count contributions by what they cost: half the Fisher matrix of the output, or a number for it."""
        raise TypeError(f"{type(self).__name__} does not define weigh")

    def follow(self, mlp: DenseMlp) -> None:
        """Take note that training has changed the weights of the routed neurons."""

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`; `mlp` holds the routed neurons in expert order."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def rough_codes(self) -> RoughCodes | None:
        """What its scores are made of, if a kernel that reads codes can make them."""
        return None

    def weights_read(self, mlp: DenseMlp) -> int:
        """Weights read for one token: what this router adds to the active parameters."""
        return sum(value.numel() for value in self.state_dict().values())

    def bits_read(self, mlp: DenseMlp) -> float:
        """Bits read for one token: what this router adds to the bits of the experts that run."""
        gate = mlp.neurons * mlp.width if self.computes_gate else 0
        return WIDE_BITS * (self.weights_read(mlp) - gate) + self.bits_reused(mlp)

    def bits_reused(self, mlp: DenseMlp) -> float:
        """Bits among these that belong to the neurons themselves: the experts that run read them no more.

        Counted over all neurons of `mlp`.
        """
        return WeightBits.of(mlp).inputs * mlp.neurons * mlp.width if self.computes_gate else 0

    def products(self, mlp: DenseMlp) -> int:
        """Multiplications for one token: what this router adds to the computed share."""
        return self.weights_read(mlp)


class Selection:
    """Turns scores `[T, E]` into the mask `[T, E]` (bool) of the experts that run."""

    by_score: ClassVar[bool] = True
    """Whether a higher score of one token alone decides, as straight-through training needs."""
    varies: ClassVar[bool] = False
    """Whether tokens may run different numbers of experts."""

    @classmethod
    def fit(cls, scores_TE: Tensor, active: float, most: int | None = None) -> "Selection":
        """Settings with which `active` experts run on average for these scores, never over `most`."""
        raise TypeError(f"{cls.__name__} does not define fit")

    def __call__(self, scores_TE: Tensor, context: Context | None = None) -> Tensor:
        """The mask `[T, E]`."""
        raise TypeError(f"{type(self).__name__} does not define __call__")

    def remembered(self, context: Context) -> Tensor | None:
        """The mask where it needs no scores of these tokens; None where it does.

        One row for each sequence of the batch, which holds for all of its tokens.
        """
        return None

    def settings(self) -> dict[str, Any]:
        """JSON values that rebuild this selection: `type(self)(**settings)`."""
        return dict(vars(self))

    @classmethod
    def declared(cls, experts: int) -> dict[str, Field]:
        """What each of `settings` may be if there are `experts` routed ones.

        Nothing is made of settings that are something else. A selection that does not say takes a
        number, or null, for each of its arguments.
        """
        return {name: optional(number()) for name in inspect.signature(cls).parameters}


class Compensation(nn.Module):
    """What is added for the experts that did not run; zero where every expert runs.

    Subclasses take `(width, experts, rank)`, or define `make`. Their parameters and buffers are what is saved; no
    parameter needs a gradient unless distillation asks for it.
    """

    adds: ClassVar[bool] = True
    """False if it never adds anything."""
    centres: ClassVar[bool] = False
    """Whether neurons that are off stand at a constant of their own, from which all is counted."""

    @classmethod
    def make(cls, width: int, experts: int, neurons: int, rank: int) -> "Compensation":
        """The compensation of a layer of `neurons` routed neurons."""
        return cls(width, experts, rank)

    def initialise(self, mlp: DenseMlp, x_TD: Tensor, active: int) -> None:
        """Find, from a sample of inputs, what has to be known before anything is routed.

        `mlp` has the routed neurons in fp32 and expert order; `active` experts are going to run.
        """

    def centred(self, mlp: DenseMlp) -> DenseMlp:
        """The same function counted from where its neurons stand when off; or `mlp` itself."""
        return mlp

    def follow(self, mlp: DenseMlp) -> None:
        """Take note that training has changed the weights of the layer."""

    def fit(self, chunks: Iterable[tuple[Tensor, Tensor, Tensor]], mlp: DenseMlp) -> None:
        """Set the parameters from inputs `[T, D]`, activations `[T, N]` and masks `[T, E]`.

        All cover the routed neurons and come in chunks of tokens, so that memory does not grow with
        the sample; `chunks` may be walked through more than once.
        """

    def forward(self, x_TD: Tensor, mask_TE: Tensor) -> Tensor | None:
        """The compensation `[T, D]`, or None if it adds nothing.

        The mask is bool, or, in training, a number per expert that carries a gradient.
        """
        return None

    def weights_read(self, active: float) -> float:
        """Weights read for a token that runs `active` experts."""
        return 0

    def bits_read(self, active: float) -> float:
        """Bits read for a token that runs `active` experts: what this adds to the budget."""
        return WIDE_BITS * self.weights_read(active)


def stored(router: Router, compensation: Compensation) -> dict[str, Tensor]:
    """Their tensors, by the names that the side file gives them within a layer."""
    return {
        f"{part}.{name}": value.detach().cpu().contiguous()
        for part, module in (("router", router), ("compensation", compensation))
        for name, value in module.state_dict().items()
    }


def frozen(*shape: int) -> nn.Parameter:
    """A parameter of zeros without a gradient."""
    return nn.Parameter(torch.zeros(*shape), requires_grad=False)


def off(mask_TE: Tensor) -> Tensor:
    """1 where an expert is off, 0 where it is on, in fp32 or wider `[T, E]`."""
    wide = mask_TE.dtype if mask_TE.is_floating_point() else torch.float32
    return 1 - mask_TE.to(torch.promote_types(wide, torch.float32))


class NoCompensation(Compensation):
    """None: nothing stands in for experts that are off."""

    adds = False

    def __init__(self, width: int, experts: int, rank: int) -> None:
        super().__init__()
