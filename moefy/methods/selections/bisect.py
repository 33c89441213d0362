"""Find the setting of a selection with which a wanted number of experts runs on average.

Shapes: T tokens, E routed experts.
"""

from collections.abc import Callable

from torch import Tensor

STEPS = 50
SLACK = 1.0005
"""How far the mean may exceed what is wanted."""


def bisect(mask_of: Callable[[float], Tensor], active: float) -> float:
    """The share in [0, 1] whose mask `[T, E]` has nearest to `active` experts on per token, not more.

    `mask_of` turns on more experts the larger the share. Scores that tie (of ReLU neurons that are off)
    come and go together: they then stay off. Where every share turns on more, the least does.
    """
    low, high = 0.0, 1.0
    if _mean(mask_of(1.0)) <= active * SLACK:
        return 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        if _mean(mask_of(middle)) <= active * SLACK:
            low = middle
        else:
            high = middle
    return low if _mean(mask_of(low)) > 0 else high


def _mean(mask_TE: Tensor) -> float:
    return mask_TE.sum().item() / len(mask_TE)
