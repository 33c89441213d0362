"""What a function of the public API is called with, checked against its annotations before anything is done.

@checked
def revert(folder: str | Path, out: str | Path, *, overwrite: bool = False) -> None: ...

revert(3, "out")    # MoefyError: revert: folder: got 3, expected text or a path
"""

import os
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from functools import cache, wraps
from inspect import Parameter, signature
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from moefy.errors import MoefyError

P = ParamSpec("P")
T = TypeVar("T")
_NAMES: dict[Any, str] = {
    str: "text", Path: "a path", int: "a whole number", float: "a number", bool: "True or False",
    type(None): "None",
}  # fmt: skip
_KINDS: dict[Any, Any] = {Path: os.PathLike, int: Integral, float: Real}
"""What is taken for a class besides itself: numbers of numpy are numbers."""


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """The same function; `MoefyError` in one line for an argument of another type than it is annotated with."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        check_arguments(function, args, kwargs)
        return function(*args, **kwargs)

    return wrapped


def check_arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise `MoefyError` for the first argument of a wrong type; names and numbers of arguments are Python's."""
    hints, names = _annotations(function)
    for name, value in (*zip(names, args, strict=False), *kwargs.items()):
        if name in hints and not _fits(value, hints[name]):
            raise MoefyError(
                f"{function.__name__}: {name}: got {reprlib.repr(value)}, expected {_words(hints[name])}"
            )


@cache
def _annotations(function: Callable[..., Any]) -> tuple[dict[str, Any], list[str]]:
    """Annotations by name, and the names of what may be given by position."""
    parameters = signature(function).parameters.values()
    plain = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    open_ = {
        p.name for p in parameters if p.kind in (Parameter.VAR_KEYWORD, Parameter.VAR_POSITIONAL)
    }
    hints = typing.get_type_hints(function)
    return {name: hint for name, hint in hints.items() if name not in open_}, plain


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says; of what is not known here, anything is."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is tuple:
        if not isinstance(value, Collection) or isinstance(value, str | bytes | Mapping | Set):
            return False
        same = len(value) == len(inside)
        return same and all(_fits(v, one) for v, one in zip(value, inside, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(
            _fits(k, inside[0]) and _fits(v, inside[1]) for k, v in value.items()
        )
    if origin is Callable:
        return callable(value)
    if isinstance(origin, type) and issubclass(origin, Iterable):
        if isinstance(value, str | bytes) or not isinstance(value, Iterable):
            return False
        return not isinstance(value, Collection) or all(_fits(v, inside[0]) for v in value)
    if hint is Any or not isinstance(hint, type):
        return True
    if isinstance(value, bool) and hint in (int, float):
        return False
    return isinstance(value, (hint, _KINDS.get(hint, hint)))


def _words(hint: Any) -> str:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(one) for one in inside)
    if origin is tuple:
        return f"({', '.join(map(_words, inside))})"
    if origin is Callable:
        return "a function"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"{_words(inside[0])} with {_words(inside[1])} each"
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return f"a list, each {_words(inside[0])}"
    return _NAMES.get(hint, f"a {getattr(hint, '__name__', hint)}")
