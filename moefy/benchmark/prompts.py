"""Token ids that all engines are given: the bundled corpus where there is a tokenizer, or random ones.

Shapes: B sequences, T tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moefy.data.corpus import load_corpus
from moefy.data.inputs import load_tokenizer


@dataclass(frozen=True)
class Prompt:
    """Ids, and what they are in words."""

    ids_BT: Tensor
    what: str


def prompt(folder: Path, vocabulary: int, batch: int, length: int, seed: int = 0) -> Prompt:
    """`batch` sequences of `length` tokens for the model in `folder`, which has `vocabulary` tokens."""
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        generator = torch.Generator().manual_seed(seed)
        ids_BT = torch.randint(vocabulary, (batch, length), generator=generator)
        return Prompt(ids_BT, "random token ids")
    corpus = load_corpus()
    found: list[int] = []
    for document in corpus.take(len(corpus.documents)).documents:
        found += tokenizer(document.text, add_special_tokens=False)["input_ids"]
        if len(found) >= batch * length:
            break
    found *= -(-batch * length // len(found))  # a batch larger than the corpus reads it again
    ids_BT = torch.tensor(found[: batch * length]).view(batch, length)
    return Prompt(ids_BT, "text of the bundled corpus")
