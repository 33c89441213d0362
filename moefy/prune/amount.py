"""How many units may go: the most whose removal costs the domains to retain no more than was allowed."""

from collections.abc import Callable

PRECISION = 0.02
"""How far the search stops from the most that fits, as a share of it."""


def largest(total: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `total` that fits, by doubling and then halving; 0 where 1 does not.

    The cost is taken to rise with the number: where it does not, this is the first number that does
    not fit, within `PRECISION`.
    """
    good = 0
    while good < total:
        probe = min(2 * good or 1, total)
        if not fits(probe):
            break
        good = probe
    else:
        return total
    bad = probe
    while bad - good > max(1, PRECISION * good):
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good
