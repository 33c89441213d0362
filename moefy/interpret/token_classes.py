"""What kind of text a token is: the predicates that concepts and differences are told apart by.

A token may be of several classes or of none. A predicate sees the token's own text, decoded alone; a
token that holds a part of a character only is `partial` and nothing else.

Shapes: V vocabulary.
"""

import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefy.interpret.tokens import Ints

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
