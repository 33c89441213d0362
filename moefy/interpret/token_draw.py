"""A random number for every token that depends on nothing but the seed and where the token stands.

Draws made from it are the same in whatever batches the tokens come, and nothing about neurons or
experts can change them.

Shapes: T tokens.
"""

import numpy as np

from moefy.interpret.statistics import Floats
from moefy.interpret.tokens import Tokens

_STEP = 0x9E3779B97F4A7C15


def uniforms(tokens: Tokens, seed: int) -> Floats:
    """Numbers `[T]` in [0, 1): SplitMix64 (Steele, Lea and Flood 2014) of (seed, document, position)."""
    place_T = (tokens.document_T.astype(np.uint64) << np.uint64(32)) | tokens.position_T.astype(
        np.uint64
    )
    start = np.array([(seed + 1) * _STEP & 0xFFFFFFFFFFFFFFFF], dtype=np.uint64)
    return (_mixed(place_T ^ _mixed(start)) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mixed(
    value: np.ndarray[tuple[int, ...], np.dtype[np.uint64]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint64]]:
    value = value + np.uint64(_STEP)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(value ^ (value >> np.uint64(31)), dtype=np.uint64)
