"""How much memory an inspection's listeners hold, as formulas of the sizes of a model and a text.

What a process holds beside it: the model, the text, the logits of one
batch, one layer's MLP in fp32, and what one table is made from.
"""

import math
from dataclasses import dataclass

from moefy.inspection import routing
from moefy.inspection.controls import random_partition
from moefy.inspection.experts import FIGURES, examples
from moefy.inspection.experts.concepts import BINS

RECORD = 37
"""Bytes of a kept token without the norms around it."""
WINDOW = 2 * (2 * examples.REACH + 1)
TOKEN = 6 * 8
"""Bytes of a token in `Tokens`."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model, of the same experts in every layer, and of what is read."""

    layers: int
    width: int
    neurons: int
    experts: int
    """Of a layer, the shared ones included."""
    shared: int
    tokens: int
    documents: int
    blocks: int
    """Blocks of documents that sums are kept by: at most about 512."""
    concepts: int
    """Domains and classes of tokens."""

    @property
    def compared(self) -> int:
        """Most tokens that random partitions are compared on."""
        limits = (
            random_partition.TOKENS,
            random_partition.ENTRIES // self.neurons,
            random_partition.INPUTS // (self.width * self.layers),
        )
        return min(self.tokens, *limits)


def state_bytes(s: Sizes) -> dict[str, int]:
    """Bytes that every listener holds once the pass is over, by its name."""
    routed = s.experts - s.shared
    kept, sampled = examples.sizes(s.layers * s.experts)
    shown = 4 * kept + 2 * (kept // 2) + 2 * sampled
    of_expert = (RECORD + WINDOW) * shown + RECORD * 2 * examples.SAMPLE + 4
    size = s.neurons // s.experts
    of_layer = {
        "contributions": 16 * s.blocks * (FIGURES * s.experts + 4) + 8,
        "router": 16 * s.blocks * (3 * routed + 3) + _bits(routed, s),
        "examples": s.experts * of_expert,
        "spectrum": 8 * (s.neurons * size + s.neurons + s.experts),
        "direct": 16 * (s.neurons + s.experts)
        + 8
        + 16 * s.blocks * (3 * s.experts + 1)
        + _bits(s.experts, s),
        "predictivity": 4 * (s.concepts + 1) * s.neurons * BINS + 2 * _bits(s.concepts, s),
    }
    found = {name: s.layers * each for name, each in of_layer.items()}
    sample = min(s.tokens, routing.TOKENS)
    found["routing"] = sample * (TOKEN + s.layers * math.ceil(s.experts / 8))
    return found


def _bits(things: int, s: Sizes) -> int:
    """A bit for each document and thing."""
    return math.ceil(things / 8) * s.documents


def scratch_bytes(s: Sizes) -> int:
    """Bytes of the scratch file that random partitions are compared on."""
    return 4 * s.layers * s.compared * s.width
