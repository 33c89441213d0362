"""Find the setting of a selection with which a wanted number of experts runs on average.

Shapes: T tokens, E routed experts.
"""

from collections.abc import Callable

from torch import Tensor

STEPS = 50


def bisect(mask_of: Callable[[float], Tensor], active: float) -> float:
    """The share in [0, 1] whose mask `[T, E]` has nearest to `active` experts on per token.

    `mask_of` turns on more experts the larger the share. Where even 1 turns on fewer, 1 it is.
    """
    low, high = 0.0, 1.0
    best, nearest = 1.0, abs(_mean(mask_of(1.0)) - active)
    for _ in range(STEPS):
        middle = (low + high) / 2
        got = _mean(mask_of(middle))
        if abs(got - active) < nearest:
            best, nearest = middle, abs(got - active)
        low, high = (middle, high) if got < active else (low, middle)
    return best


def _mean(mask_TE: Tensor) -> float:
    return mask_TE.sum().item() / len(mask_TE)
