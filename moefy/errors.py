"""Errors a user can act on. Every message says what failed, where, what was got and the remedy."""

import difflib
from collections.abc import Iterable


class MoefyError(Exception):
    """Base of every error that is the user's to mend; the CLI prints it as one line."""


class RecipeError(MoefyError):
    """A recipe, or an override of one, that cannot be used."""


class CheckpointError(MoefyError):
    """A checkpoint or artefact on disk that is missing, damaged or not what it says it is."""


class CorpusError(MoefyError):
    """Text, token ids or images that cannot be used."""


class UnsupportedModel(MoefyError):
    """A model whose MLPs cannot be split into experts."""


class OutputError(MoefyError):
    """An output folder that is in the way or cannot be written."""


def unknown_choice(what: str, got: str, known: Iterable[str]) -> str:
    """`unknown router 'linar'; did you mean 'linear'? known: centroid, linear, mlp`."""
    names = sorted(known)
    close = difflib.get_close_matches(got, names, n=1)
    hint = f" did you mean '{close[0]}'?" if close else ""
    return f"unknown {what} '{got}';{hint} known: {', '.join(names)}"
