"""How far training steps, and which documents a step reads.

Learning rates are relative to the size of each matrix: Adam's steps do not know how large a weight is;
relative to its root mean square one number suits every matrix of a model. Documents are drawn anew in
every round, the same for the same seed.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from moefy.data.corpus import Sample, sample_length

CLIP = 1.0
"""Norm that the gradients of one step are cut to, all together."""

LEAST = 1e-3
"""Smallest root mean square that a learning rate is relative to: weights may start at zero."""


def matched(parameters: Iterable[nn.Parameter], rate: float) -> list[dict[str, Any]]:
    """One group for every parameter, with `rate` times its root mean square as learning rate."""
    sizes = [(p, p.detach().float().square().mean().sqrt().item()) for p in parameters]
    return [{"params": [p], "lr": rate * max(size, LEAST)} for p, size in sizes]


def draws(samples: list[Sample], tokens: int, seed: int, least: int = 1) -> Iterator[list[Sample]]:
    """Documents that hold about `tokens` positions together, at least `least` of them; without end."""
    generator = torch.Generator().manual_seed(seed)
    group: list[Sample] = []
    size = 0
    while True:
        for index in torch.randperm(len(samples), generator=generator).tolist():
            group.append(samples[index])
            size += sample_length(samples[index])
            if size >= tokens and len(group) >= least:
                yield group
                group, size = [], 0
