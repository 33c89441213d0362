"""What every token that is read is: its document, its place, its class, and a random number of its own.

Classes are the predicates that concepts and differences are told apart by. A token may be of several or
of none. A predicate sees the token's own text, decoded alone; a token that holds a part of a character
only is `partial` and nothing else.

`uniforms` depends on nothing but the seed and where a token stands: draws made from it are the same in
whatever batches the tokens come, and nothing about neurons or experts can change them.

Shapes: T tokens, V vocabulary.
"""

import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefy.data.shards import Ints
from moefy.evaluation.statistics import Floats

NOTHING: Ints = np.zeros(0, dtype=np.int64)
NONE = -1
"""Where there is no such token."""


@dataclass(frozen=True)
class Tokens:
    """Tokens `[T]`, all int64; `NONE` if there is no such token."""

    ids_T: Ints
    """The token that is read."""
    previous_T: Ints
    """The token before it in the document."""
    target_T: Ints
    """The token that comes next, which a language model is to predict here."""
    predicted_T: Ints
    """The token that the moefied model puts first here."""
    position_T: Ints
    """Position in the document, from 0."""
    document_T: Ints
    """Number of the document in `Documents`."""

    def __len__(self) -> int:
        return len(self.ids_T)

    def take(self, index: NDArray[np.bool_] | Ints | slice) -> "Tokens":
        """The tokens at these places."""
        return Tokens(*(getattr(self, field.name)[index] for field in fields(self)))

    @classmethod
    def join(cls, parts: list["Tokens"]) -> "Tokens":
        """Several runs of tokens as one, or none."""
        return cls(
            *(
                np.concatenate([NOTHING, *(getattr(part, field.name) for part in parts)])
                for field in fields(cls)
            )
        )


_BROKEN = "�"


def _latin(letter: str) -> bool:
    return "LATIN" in unicodedata.name(letter, "")


def _punctuation(text: str) -> bool:
    core = text.strip()
    return bool(core) and all(unicodedata.category(c)[0] in "PS" for c in core)


CLASSES: dict[str, Callable[[str], bool]] = {
    "digits": lambda text: text.strip().isdigit(),
    "punctuation": _punctuation,
    "whitespace": lambda text: bool(text) and text.isspace(),
    "capitalised": lambda text: text.strip()[:1].isupper(),
    "lowercase": lambda text: text.strip().isalpha() and text.strip().islower(),
    "word_start": lambda text: text[:1] == " " and text.strip().isalpha(),
    "non_latin": lambda text: any(c.isalpha() and not _latin(c) for c in text),
}
"""Predicates over the text of a token that holds whole characters."""
PARTIAL = "partial"
"""A piece of a character that UTF-8 writes as several bytes."""


def token_classes(tokenizer: Any, vocabulary: int) -> dict[str, NDArray[np.bool_]]:
    """Which tokens `[V]` are of each class; empty without a tokenizer. Special tokens are of none."""
    if tokenizer is None:
        return {}
    special = set(tokenizer.all_special_ids)
    known = min(vocabulary, len(tokenizer))
    texts = tokenizer.batch_decode(
        [[token] for token in range(known)], clean_up_tokenization_spaces=False
    )
    texts = ["" if token in special else text for token, text in enumerate(texts)]
    texts += [""] * (vocabulary - known)
    found = {PARTIAL: np.array([_BROKEN in text for text in texts])}
    for name, predicate in CLASSES.items():
        found[name] = np.array([_BROKEN not in t and predicate(t) for t in texts], dtype=bool)
    return found


def classes_of(ids_T: Ints, classes: dict[str, NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """Membership `[classes, T]` of tokens, in the order of `classes`; ids below 0 are of none."""
    if not classes:
        return np.zeros((0, len(ids_T)), dtype=bool)
    table_CV = np.stack(list(classes.values()))
    return np.asarray(table_CV[:, np.maximum(ids_T, 0)] & (ids_T >= 0))


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
