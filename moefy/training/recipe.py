"""How models are trained on text: what `moefy recover` and `moefy sparsify` can be told.

Strict dataclasses like those of `moefy.recipe`: unknown keys and wrong types are errors.
"""

from dataclasses import dataclass

from moefy.errors import RecipeError, unknown_choice

PARTS = ("experts", "routers", "compensations", "rest")
PENALTIES = ("hoyer", "l1", "none")


@dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """The loop of both."""

    tokens: int = 1_000_000
    """Predicted tokens that are trained on, in all."""
    batch_tokens: int = 4096
    """Tokens of one optimiser step, over all processes."""
    micro_tokens: int = 4096
    """Most positions of one forward and backward pass; gradients of several are accumulated."""
    context: int = 512
    """Tokens a document is cut to."""
    learning_rate: float = 0.01
    """Largest step of Adam, relative to the root mean square of each weight matrix."""
    check_every: int = 25
    """Steps between checks on held-out documents; what passes one is kept as a checkpoint."""
    precision: str = "fp32"
    """`fp32`, or `bf16` for mixed precision (weights and optimiser stay in fp32)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    seed: int = 0
    """Draws the documents."""

    def __post_init__(self) -> None:
        """Refuse what no training can be done with."""
        for name in ("tokens", "batch_tokens", "micro_tokens", "context", "check_every"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}: got {getattr(self, name)}, must be at least 1")
        if self.learning_rate <= 0:
            raise RecipeError(f"learning_rate: got {self.learning_rate}, must be above 0")
        if self.precision not in ("fp32", "bf16"):
            raise RecipeError(unknown_choice("precision", self.precision, ("fp32", "bf16")))

    @property
    def steps(self) -> int:
        """Optimiser steps."""
        return -(-self.tokens // self.batch_tokens)


@dataclass(frozen=True, kw_only=True)
class RecoverRecipe(TrainingRecipe):
    """Training a moefied model towards the dense one."""

    train: str = "experts,routers,compensations"
    """What is trained, by comma: `experts` (the MLPs' weights), `routers`, `compensations`, `rest`
    (attention, norms, embeddings)."""
    lora_rank: int = 0
    """Train experts, and the projections of the rest, through adapters of this rank (LoRA), which are
    merged at the end; 0 trains the weights themselves."""
    distil: float = 0.5
    """Weight of KL(dense || moefied) in the loss; cross-entropy on the text has the rest."""

    def __post_init__(self) -> None:
        """Refuse unknown parts."""
        super().__post_init__()
        if not self.parts:
            raise RecipeError(f"train: names nothing; choose of {', '.join(PARTS)}")
        for part in self.parts:
            if part not in PARTS:
                raise RecipeError(unknown_choice("train", part, PARTS))
        if not 0 <= self.distil <= 1:
            raise RecipeError(f"distil: got {self.distil}, must be between 0 and 1")
        if self.lora_rank < 0:
            raise RecipeError(f"lora_rank: got {self.lora_rank}, must be at least 0")

    @property
    def parts(self) -> tuple[str, ...]:
        """`train` as names."""
        return tuple(part.strip() for part in self.train.split(",") if part.strip())


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
