"""What all levels ask of their settings, and how the command line writes them."""

from collections.abc import Sequence

from moefy.benchmark.timing import LEAST_SAMPLES
from moefy.errors import MoefyError


def check(batches: Sequence[int], densities: Sequence[float], samples: int) -> None:
    """Raise `MoefyError` for a sweep that cannot be timed."""
    if not batches or min(batches) < 1 or len(set(batches)) < len(batches):
        raise MoefyError(f"--batches {_listed(batches)}: expected different numbers from 1 on")
    if any(not 0 < density <= 1 for density in densities):
        raise MoefyError(f"--densities {_listed(densities)}: expected numbers above 0, at most 1")
    if samples < LEAST_SAMPLES:
        raise MoefyError(
            f"--samples {samples}: from fewer than {LEAST_SAMPLES} no noise can be told"
        )


def parse_batches(text: str) -> list[int]:
    """`1,2,4` as numbers."""
    parts = text.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise MoefyError(f"--batches {text}: expected numbers by comma, such as 1,2,4,8,16")
    return [int(part) for part in parts]


def parse_densities(text: str) -> list[float]:
    """`.1,.25,.5` as numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise MoefyError(
            f"--densities {text}: expected numbers by comma, such as .1,.25,.5"
        ) from None


def _listed(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
