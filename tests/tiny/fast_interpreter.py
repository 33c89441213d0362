"""Triton's interpreter looks through the whole of `triton.language` at every call; let it do so once.

A third of the time of an interpreted kernel goes there otherwise. What is replaced stays the same.
"""

import functools
import inspect
from types import SimpleNamespace
from typing import Any

from triton.language import core
from triton.runtime import interpreter


@functools.cache
def _builtins(owner: Any) -> list[str]:
    return [name for name, member in inspect.getmembers(owner) if core.is_builtin(member)]


def _members(owner: Any) -> list[tuple[str, Any]]:
    return [(name, getattr(owner, name)) for name in _builtins(owner)]


def install() -> None:
    """From now on `inspect.getmembers`, as the interpreter sees it, remembers the names of builtins."""
    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": _members})
