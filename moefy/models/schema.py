"""What the fields of a file may hold, checked before anything is built from them.

check({"k": 3}, {"k": whole(0, 64)}, "moefy.json: layers[0].selection")
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moefy.errors import CheckpointError

LARGEST = 2**31
"""No count or size of a model is larger."""
NAMED = re.compile(r"[a-z][a-z0-9_]*")
PLUGIN = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")
"""`package.module:Name`: code that is imported."""
_HASH = re.compile(r"[0-9a-f]{64}")


class Invalid(ValueError):
    """What is wrong with a value, without where it stands."""


@dataclass(frozen=True)
class Field:
    """What one field may hold: `check` raises `Invalid` for anything else."""

    check: Callable[[Any], None]
    required: bool = True


def optional(field: Field) -> Field:
    """The same, or null, or left out."""
    return Field(lambda value: None if value is None else field.check(value), required=False)


def whole(least: int, most: int = LARGEST) -> Field:
    """A whole number from `least` to `most`."""

    def check(value: Any) -> None:
        if type(value) is not int or not least <= value <= most:
            raise Invalid(f"must be a whole number from {least} to {most}")

    return Field(check)


def number(least: float = -math.inf, most: float = math.inf, *, above: bool = False) -> Field:
    """A finite number from `least` to `most`; `above`: larger than `least`."""

    def check(value: Any) -> None:
        finite = type(value) in (int, float) and -1e300 <= value <= 1e300
        if not finite or not least <= value <= most or (above and value == least):
            low = "" if least == -math.inf else f" {'above' if above else 'from'} {least:g}"
            high = "" if most == math.inf else f" to {most:g}"
            raise Invalid(f"must be a finite number{low}{high}")

    return Field(check)


def flag() -> Field:
    """True or false."""
    return _kind(bool, "true or false")


def text(pattern: re.Pattern[str] | None = None, what: str = "text that is not empty") -> Field:
    """Text that matches a pattern as a whole; without one, any that is not empty."""

    def check(value: Any) -> None:
        if not isinstance(value, str) or not value or "\0" in value:
            raise Invalid(f"must be {what}")
        if pattern is not None and not pattern.fullmatch(value):
            raise Invalid(f"must be {what}")

    return Field(check)


def string() -> Field:
    """Any text, the empty one included."""
    return _kind(str, "text")


def one_of(*known: str | int) -> Field:
    """One of these words or numbers."""

    def check(value: Any) -> None:
        if type(value) not in (str, int) or value not in known:
            raise Invalid(f"must be one of {', '.join(map(str, known))}")

    return Field(check)


def table() -> Field:
    """Keys and values, which somebody else checks."""
    return _kind(dict, "keys and values")


def rows() -> Field:
    """A list, which somebody else checks."""
    return _kind(list, "a list")


def words() -> Field:
    """Keys with texts."""

    def check(value: Any) -> None:
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise Invalid("must be keys with texts")

    return Field(check)


def scalars() -> Field:
    """Keys with texts, finite numbers, or true and false."""

    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise Invalid("must be keys and values")
        for name, one in value.items():
            if type(one) not in (str, bool):
                try:
                    number().check(one)
                except Invalid as error:
                    raise Invalid(f"{name!r} {error}") from None

    return Field(check)


def hashes() -> Field:
    """SHA-256 by the name of the file within its folder."""

    def check(value: Any) -> None:
        if not isinstance(value, dict):
            raise Invalid("must be names of files with their SHA-256")
        for name, digest in value.items():
            if not is_inside(name):
                raise Invalid(f"{name!r} is not the name of a file within the folder")
            if not isinstance(digest, str) or not _HASH.fullmatch(digest):
                raise Invalid(f"{name!r} has no SHA-256 of 64 hexadecimal digits")

    return Field(check)


def method_name(plugins: bool) -> Field:
    """A name of a table; with `plugins`, `package.module:Name` as well."""

    def check(value: Any) -> None:
        if isinstance(value, str) and PLUGIN.fullmatch(value):
            if not plugins:
                raise Invalid(
                    "names code to be imported; if you trust this folder, load it with "
                    "plugins=True or --allow-plugins"
                )
        elif not isinstance(value, str) or not NAMED.fullmatch(value):
            raise Invalid("must be the name of a shipped method")

    return Field(check)


def is_inside(name: str) -> bool:
    """Whether a path stays in its folder: relative, forward slashes, no `..`."""
    parts = name.split("/")
    return not (
        any(part in ("", ".", "..") for part in parts)
        or any(c in name for c in "\\\0")
        or (len(name) > 1 and name[1] == ":")
    )


def check(values: Any, fields: Mapping[str, Field], where: str) -> None:
    """Raise `CheckpointError` unless `values` has just these fields, each with what it may hold."""
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: got {_short(values)}, must be keys and values")
    unknown = sorted(set(values) - set(fields), key=str)
    missing = sorted(name for name, f in fields.items() if f.required and name not in values)
    if missing or unknown:
        what = f"'{missing[0]}' is missing" if missing else f"'{unknown[0]}' is unknown"
        raise CheckpointError(f"{where}: field {what}; convert the source again")
    for name, field in fields.items():
        if name in values:
            check_one(values[name], field, f"{where}: {name}")


def check_one(value: Any, field: Field, where: str) -> None:
    """Raise `CheckpointError` unless a value is what its field may hold."""
    try:
        field.check(value)
    except Invalid as error:
        raise CheckpointError(f"{where}: got {_short(value)}, {error}") from None


def _kind(kind: type, what: str) -> Field:
    def check(value: Any) -> None:
        if type(value) is not kind:
            raise Invalid(f"must be {what}")

    return Field(check)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
