"""Which documents a training step reads: drawn anew in every round, the same for the same seed."""

from collections.abc import Iterator

import torch

from moefy.data import Sample, sample_length


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
