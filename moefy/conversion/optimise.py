"""How far training steps.

Learning rates are relative to the size of each matrix: Adam's steps do not know how large a weight is;
relative to its root mean square one number suits every matrix of a model.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

CLIP = 1.0
"""Norm that the gradients of one step are cut to, all together."""

LEAST = 1e-3
"""Smallest root mean square that a learning rate is relative to: weights may start at zero."""


def matched(parameters: Iterable[nn.Parameter], rate: float) -> list[dict[str, Any]]:
    """One group for every parameter, with `rate` times its root mean square as learning rate."""
    sizes = [(p, p.detach().float().square().mean().sqrt().item()) for p in parameters]
    return [{"params": [p], "lr": rate * max(size, LEAST)} for p, size in sizes]
