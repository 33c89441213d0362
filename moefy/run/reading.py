"""The boundary to what is read from outside: errors of other libraries become one line with the file's name.

with reading(file):
    tokenizer = AutoTokenizer.from_pretrained(file, trust_remote_code=False)
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moefy.errors import CheckpointError, MoefyError

MOST_JSON = 2**28
"""Bytes of the largest JSON file that is read: tokenizers of 256,000 words take a tenth of it."""
AGAIN = "copy or download it again"


@contextmanager
def reading(
    file: str | Path, remedy: str = AGAIN, kind: type[MoefyError] = CheckpointError
) -> Iterator[None]:
    """Turn whatever a library raises on the content of `file` into one line.

    Only calls of other libraries belong inside. Panics of code in Rust are no `Exception`.
    """
    try:
        yield
    except (MoefyError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise kind(f"{file}: cannot be read ({reason(error)}); {remedy}") from error


def reason(error: BaseException) -> str:
    """What an error says, in one line of at most 300 characters."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, MemoryError):
        return "it asks for more memory than there is"
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def read_json(file: Path, remedy: str = AGAIN, kind: type[MoefyError] = CheckpointError) -> Any:
    """The content of a JSON file.

    Raises `kind` where it is no JSON, nested too deeply, larger than `MOST_JSON`, says a key twice, or
    has a number that is not finite.
    """
    with reading(file, remedy, kind):
        size = file.stat().st_size
        if size > MOST_JSON:
            raise ValueError(f"{size} bytes of JSON, at most {MOST_JSON} are read")
        text = file.read_text(encoding="utf-8")
    try:
        return json.loads(
            text, object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite
        )
    except (ValueError, RecursionError) as error:
        raise kind(f"{file}: not JSON that can be read ({reason(error)}); {remedy}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value
