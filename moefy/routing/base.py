"""What every router, selection and compensation is.

Shapes: T tokens, D width, E routed experts.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from moefy.mlp import DenseMlp


class Router(nn.Module):
    """Scores `[T, E]` of the routed experts from the input of the MLP; a higher score runs first.

    Subclasses take `(width, experts, hidden)` and may ignore what they do not need. Their
    parameters are what is saved.
    """

    trainable: ClassVar[bool] = True
    """Whether there is something to fit after `initialise`."""
    deployable: ClassVar[bool] = True
    """False for routers that need the very work they are meant to save."""

    def initialise(self, mlp: DenseMlp) -> None:
        """Set the parameters from the routed neurons, which stand in expert order."""

    def forward(self, x_TD: Tensor, mlp: DenseMlp) -> Tensor:
        """Scores `[T, E]`; `mlp` holds the routed neurons in expert order."""
        raise TypeError(f"{type(self).__name__} does not define forward")

    def weights_read(self) -> int:
        """Weights read for one token: what this router adds to the active budget."""
        return sum(p.numel() for p in self.parameters())


class Selection:
    """Turns scores `[T, E]` into the mask `[T, E]` (bool) of the experts that run."""

    @classmethod
    def fit(cls, scores_TE: Tensor, active: int) -> "Selection":
        """Choose the settings so that `active` experts run (on average) for these scores."""
        raise TypeError(f"{cls.__name__} does not define fit")

    def __call__(self, scores_TE: Tensor) -> Tensor:
        """The mask `[T, E]`."""
        raise TypeError(f"{type(self).__name__} does not define __call__")

    def settings(self) -> dict[str, Any]:
        """JSON values that rebuild this selection: `type(self)(**settings)`."""
        return dict(vars(self))


class Compensation(nn.Module):
    """What is added for the experts that did not run; zero where every expert runs.

    Subclasses take `(width, experts)`. Their buffers are what is saved.
    """

    def fit(self, chunks: Iterable[tuple[Tensor, Tensor]], mlp: DenseMlp) -> None:
        """Set the buffers from activations `[T, N]` of the routed neurons and masks `[T, E]`.

        Both come in chunks of tokens, so that memory does not grow with the sample.
        """

    def forward(self, x_TD: Tensor, mask_TE: Tensor) -> Tensor | None:
        """The compensation `[T, D]`, or None where there is none at all."""
        return None

    def weights_read(self) -> int:
        """Weights read for one token: what this adds to the active budget."""
        return sum(b.numel() for b in self.buffers())
