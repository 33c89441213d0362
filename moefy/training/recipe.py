"""How models are trained on text: what `moefy recover` and `moefy sparsify` can be told.

Strict dataclasses like those of `moefy.recipe`: unknown keys and wrong types are errors. What is left open
is decided by the machine (`for_this_machine`), before anything of the run is.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from moefy.errors import RecipeError, unknown_choice
from moefy.run.computing import instructions, now

PARTS = ("experts", "routers", "compensations", "norms", "projections", "embeddings")
NAMES: dict[str, tuple[str, ...]] = {
    **{part: (part,) for part in PARTS},
    "rest": ("norms", "projections", "embeddings"),
    "lora": ("experts", "routers", "compensations", "norms", "projections"),
    "all": ("experts", "routers", "compensations", "norms", "projections"),
}
"""What `train` may name, and the parts that stand for it."""
THROUGH_ADAPTERS = ("experts", "projections")
"""Parts that adapters can train."""
LORA_RANK = 16
"""Rank of `train=lora` where `lora_rank` says nothing."""
PENALTIES = ("hoyer", "l1", "none")

R = TypeVar("R", bound="TrainingRecipe")


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """The loop of both."""

    tokens: int | None = None
    """Predicted tokens that are trained on, in all; None takes `TOKENS` of the machine."""
    batch_tokens: int | None = None
    """Tokens of one optimiser step, over all processes; None takes 1024 on a CPU, so that few tokens make
    many steps, and 4096 on a GPU."""
    micro_tokens: int | None = None
    """Most positions of one forward and backward pass; gradients of several are accumulated. None takes
    512 on a CPU, where memory is short and nothing is gained by more, and 4096 on a GPU."""
    context: int = 512
    """Tokens a document is cut to."""
    learning_rate: float = 0.01
    """Largest step of Adam, relative to the root mean square of each weight matrix."""
    check_every: int = 25
    """Steps between checks on held-out documents; what passes one is kept as a checkpoint."""
    precision: str = "auto"
    """`fp32`, `bf16` for mixed precision (weights and optimiser stay in fp32), or `auto`: `bf16` where the
    machine multiplies it (AMX, AVX512-BF16, a GPU)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    seed: int = 0
    """Draws the documents."""

    def __post_init__(self) -> None:
        """Refuse what no training can be done with."""
        for name in ("tokens", "batch_tokens", "micro_tokens", "context", "check_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name}: got {value}, must be at least 1")
        if self.learning_rate <= 0:
            raise RecipeError(f"learning_rate: got {self.learning_rate}, must be above 0")
        if self.precision not in PRECISIONS:
            raise RecipeError(unknown_choice("precision", self.precision, PRECISIONS))

    @property
    def steps(self) -> int:
        """Optimiser steps, of a recipe that says how many tokens."""
        assert self.tokens is not None
        return -(-self.tokens // self.step_tokens)

    @property
    def step_tokens(self) -> int:
        """`batch_tokens` of a recipe that says it."""
        assert self.batch_tokens is not None
        return self.batch_tokens


PRECISIONS = ("auto", "fp32", "bf16")
TOKENS = {"cpu": 250_000, "amx": 1_000_000, "gpu": 20_000_000}
"""Tokens that a model of some 100 M parameters is trained on in 90 minutes, of two cores or of a GPU."""


def for_this_machine(recipe: R) -> R:
    """The recipe with all that it leaves open decided: it then decides the result."""
    gpu, fast = now().on_gpu, instructions()
    kind = "gpu" if gpu else "amx" if "AMX" in fast else "cpu"
    sixteen = torch.cuda.is_bf16_supported() if gpu else "AMX" in fast or "AVX512-BF16" in fast
    precision = recipe.precision
    if precision == "auto":
        precision = "bf16" if sixteen else "fp32"
    return replace(
        recipe,
        tokens=recipe.tokens or TOKENS[kind],
        batch_tokens=recipe.batch_tokens or (4096 if gpu else 1024),
        micro_tokens=recipe.micro_tokens or (4096 if gpu else 512),
        precision=precision,
    )


@dataclass(frozen=True, kw_only=True)
class RecoverRecipe(TrainingRecipe):
    """Training a moefied model towards the dense one."""

    train: str = "experts,routers,compensations"
    """What is trained, by comma: `experts` (the MLPs' weights), `routers`, `compensations`, `norms` (with
    all other vectors), `projections` (of attention), `embeddings`. `rest` is the last three, `all` is all
    but embeddings, and `lora` the same with experts and projections through adapters of rank 16."""
    lora_rank: int = 0
    """Train experts and projections through adapters of this rank (LoRA), which are merged at the end; 0
    trains the weights themselves."""
    distil: float = 1.0
    """Weight of KL(dense || moefied) in the loss; cross-entropy on the text has the rest."""

    def __post_init__(self) -> None:
        """Refuse unknown parts."""
        super().__post_init__()
        for name in self._named:
            if name not in NAMES:
                raise RecipeError(unknown_choice("train", name, NAMES))
        if not self.parts:
            raise RecipeError(f"train: names nothing; choose of {', '.join(NAMES)}")
        if not 0 <= self.distil <= 1:
            raise RecipeError(f"distil: got {self.distil}, must be between 0 and 1")
        if self.lora_rank < 0:
            raise RecipeError(f"lora_rank: got {self.lora_rank}, must be at least 0")

    @property
    def _named(self) -> list[str]:
        return [name.strip() for name in self.train.split(",") if name.strip()]

    @property
    def parts(self) -> tuple[str, ...]:
        """What is trained, of `PARTS`."""
        named = {part for name in self._named for part in NAMES[name]}
        if self.rank and "embeddings" not in self._named:
            named -= {"embeddings"}  # of `rest`: adapters are there to leave large matrices alone
        return tuple(part for part in PARTS if part in named)

    @property
    def rank(self) -> int:
        """Rank of the adapters; 0 for none."""
        return self.lora_rank or (LORA_RANK if "lora" in self._named else 0)


@dataclass(frozen=True, kw_only=True)
class SparsifyRecipe(TrainingRecipe):
    """Training a dense model towards sparse activations, before it is converted."""

    relu: bool = False
    """Put ReLU in the place of the model's own activation first (ReLUfication)."""
    penalty: str = "hoyer"
    """`hoyer` (square Hoyer over N: about the share of neurons that carry the output), `l1` (mean size
    of the activations), or `none`."""
    weight: float = 0.3
    """What the penalty counts beside the cross-entropy."""

    def __post_init__(self) -> None:
        """Refuse unknown penalties."""
        super().__post_init__()
        if self.gradient_checkpointing:
            raise RecipeError(
                "gradient_checkpointing: the penalty reads activations, which are to be kept; leave it "
                "off, or lower micro_tokens"
            )
        if self.penalty not in PENALTIES:
            raise RecipeError(unknown_choice("penalty", self.penalty, PENALTIES))
        if self.weight < 0:
            raise RecipeError(f"weight: got {self.weight}, must be at least 0")
